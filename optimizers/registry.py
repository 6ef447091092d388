"""Every public recipe, with what is needed to make, test, compare and document it."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxopt_suite.optimizers import subset_norm, subspace_momentum
from jaxopt_suite.optimizers.adamw_8bit import adamw_8bit, bytes_8bit, elements_8bit
from jaxopt_suite.optimizers.demo import demo
from jaxopt_suite.optimizers.diloco import (
    co2_adamw,
    diloco_adamw,
    eager_diloco_adamw,
    outer_params,
    savic,
    streaming_diloco_adamw,
)
from jaxopt_suite.optimizers.grams import grams
from jaxopt_suite.optimizers.int8_mean import adamw_int8
from jaxopt_suite.optimizers.onebit_adam import onebit_adam
from jaxopt_suite.optimizers.powersgd import powersgd
from jaxopt_suite.optimizers.shampoo import memory, shampoo, soap
from jaxopt_suite.optimizers.terngrad import terngrad


@dataclasses.dataclass(frozen=True)
class Paper:
    """A reference; ``arxiv`` is the identifier, empty where the method has no arXiv version."""

    title: str
    arxiv: str
    year: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A ready optimizer and what is known about it.

    Attributes:
      name: as on the command line.
      factory: ``factory(learning_rate, **hyperparameters)``, an optax-style constructor.
      learning_rate: peak rate tuned on the default task: the ``nano`` model on the standard
        library's sources, batch 16, sequence length 128, 200 steps
        (``benchmarks/results/learning_rate_sweep.json``); of recipes that communicate on eight
        workers (``benchmarks/results/communication_task.json``).
      defaults: hyperparameters that comparisons use in place of the factory's own defaults.
      paper: where the method is from.
      state_formula: array elements of state for an m-by-n matrix, a = min(m, n), b = max(m, n),
        r = rank clipped to what the matrix has; counters of one element are not counted. It ends
        with "bytes" if it counts these.
      state_elements: the elements as a function ``(m, n, **hyperparameters)``.
      state_bytes: the bytes as such a function; None: four an element.
      peer: whether it is somebody else's, listed as a baseline.
      communicates: whether it calls collectives; such a factory has an argument ``axis_name``.
      apart: whether workers' parameters differ between its synchronisations.
      wire: what a worker sends per step for an m-by-n matrix, in bytes; N workers.
      steps_per_round: as a function of the hyperparameters, the steps in which each branch of the
        program that sends something between workers is taken once; None: not known.
      schedule: the learning-rate schedule it is meant for: ``"cosine"`` or ``"constant"``, both
        after a linear warm-up.
      eval_params: ``(opt_state, params) -> params``: where to evaluate, if not at the parameters
        that are trained.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    learning_rate: float
    paper: Paper
    state_formula: str
    state_elements: Callable[..., int]
    state_bytes: Callable[..., int] | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    peer: bool = False
    communicates: bool = False
    apart: bool = False
    wire: str = "nothing"
    steps_per_round: Callable[..., int | None] = lambda **_: None
    schedule: str = "cosine"
    eval_params: Callable[[Any, Any], Any] | None = None

    def hyperparameters(self) -> dict[str, Any]:
        """The legal hyperparameters and their default values; no learning rate, no axis name."""
        signature = inspect.signature(self.factory)
        own = {
            name: parameter.default
            for name, parameter in signature.parameters.items()
            if name not in ("learning_rate", "axis_name")
        }
        return own | dict(self.defaults)

    def make(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        axis_name: str | None = None,
        **hyperparameters: Any,
    ) -> optax.GradientTransformation:
        """Builds the transformation.

        Args:
          learning_rate: a number or a schedule.
          axis_name: the workers' axis, for a recipe that communicates and for no other.
          **hyperparameters: any of ``self.hyperparameters()``.

        Raises:
          ValueError: for a name the recipe does not have (the message lists the legal ones), a
            value the factory refuses, or an axis name too few or too many.
        """
        axis = self._axis(axis_name)
        legal = self.hyperparameters()
        for name in hyperparameters:
            if name not in legal:
                raise ValueError(
                    f"{self.name} has no hyperparameter {name!r}; "
                    f"it has: {', '.join(sorted(legal))}"
                )
        return self.factory(learning_rate, **{**axis, **self.defaults, **hyperparameters})

    def _axis(self, axis_name: str | None) -> dict[str, str]:
        if not self.communicates:
            if axis_name is not None:
                raise ValueError(f"{self.name} does not communicate, got axis_name={axis_name!r}")
            return {}
        if axis_name is None:
            raise ValueError(
                f"{self.name} communicates between workers: give it their axis_name, and run it "
                "under parallel.run_workers(..., axis_name=...) or "
                "parallel.make_train_step(..., worker_axis=...)"
            )
        return {"axis_name": axis_name}


_SN = Paper(
    "Lean and Mean Adaptive Optimization via Subset-Norm and Subspace-Momentum "
    "with Convergence Guarantees",
    "2411.07120",
    2024,
)


def _subset_elements(m: int, n: int, *, subset: subset_norm.Subset = "heuristic", **_: Any) -> int:
    """Second-moment elements of subset-norm: the shape that the transformation itself allocates."""
    return math.prod(subset_norm.nu_shape((m, n), subset))


def _snsm_elements(
    m: int, n: int, *, rank: int = 128, projection: str = "svd", **hyperparameters: Any
) -> int:
    a, b = min(m, n), max(m, n)
    if projection in ("svd", "approx_svd"):
        r = min(rank, a)
        momentum = r * b + r * a
    else:
        r = min(rank, b)
        momentum = r * a + r
    return momentum + _subset_elements(m, n, **hyperparameters)


def _adafactor_elements(m: int, n: int, *, min_dim_size_to_factor: int = 128, **_: Any) -> int:
    # optax keeps placeholders of one element where a leaf is (not) factored.
    return m + n + 1 if min(m, n) >= min_dim_size_to_factor else m * n + 2


def _galore_elements(m: int, n: int, *, rank: int = 128, **_: Any) -> int:
    a, b = min(m, n), max(m, n)
    r = min(rank, a)
    return 2 * r * a + r * b


def _outer_loop_elements(m: int, n: int, *, outer_momentum: float | None = 0.9, **_: Any) -> int:
    return (3 if outer_momentum is None else 4) * m * n


def _hidden_matrices(params: optax.Params) -> Any:
    """Muon for the matrices between embedding and head, AdamW for the rest, as its authors do."""

    def dimension_numbers(path: tuple[Any, ...], leaf: Any) -> Any:
        outer = any(name in jax.tree_util.keystr(path) for name in ("embed", "head"))
        hidden = len(jnp.shape(leaf)) == 2 and not outer
        return optax.contrib.MuonDimensionNumbers() if hidden else None

    return jax.tree_util.tree_map_with_path(dimension_numbers, params)


def _ours() -> list[Recipe]:
    return [
        Recipe(
            name="grams",
            factory=grams,
            learning_rate=0.008,
            paper=Paper(
                "Grams: Gradient Descent with Adaptive Momentum Scaling", "2412.17107", 2024
            ),
            state_formula="2mn",
            state_elements=lambda m, n, **_: 2 * m * n,
        ),
        Recipe(
            name="adam_sn",
            factory=subset_norm.adam_sn,
            learning_rate=0.04,
            paper=_SN,
            state_formula="mn + b",
            state_elements=lambda m, n, **hp: m * n + _subset_elements(m, n, **hp),
        ),
        Recipe(
            name="rmsprop_sn",
            factory=subset_norm.rmsprop_sn,
            learning_rate=0.005,
            paper=_SN,
            state_formula="b",
            state_elements=_subset_elements,
        ),
        Recipe(
            name="adagrad_sn",
            factory=subset_norm.adagrad_sn,
            learning_rate=0.15,
            paper=_SN,
            state_formula="b",
            state_elements=lambda m, n, **hp: (
                (0 if hp.get("b1") is None else m * n) + _subset_elements(m, n, **hp)
            ),
        ),
        Recipe(
            name="adam_snsm",
            factory=subspace_momentum.adam_snsm,
            learning_rate=0.04,
            defaults={"rank": 32, "refresh_every": 50},
            paper=_SN,
            state_formula="rb + ra + b",
            state_elements=_snsm_elements,
        ),
        Recipe(
            name="shampoo",
            factory=shampoo,
            learning_rate=0.008,
            defaults={"b2": 0.95},  # statistics that forget within 200 steps
            paper=Paper(
                "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo "
                "Optimizer for Training Neural Networks At-Scale",
                "2309.06497",
                2023,
            ),
            state_formula="2mn + 2m² + 2n² + 5 (one block)",
            state_elements=lambda m, n, **hp: memory.shampoo_elements([(m, n)], **hp),
        ),
        Recipe(
            name="soap",
            factory=soap,
            learning_rate=0.008,
            defaults={"b1": 0.9},
            paper=Paper("SOAP: Improving and Stabilizing Shampoo using Adam", "2409.11321", 2024),
            state_formula="2mn + 2m² + 2n² + 3 (one block)",
            state_elements=lambda m, n, **hp: memory.soap_elements([(m, n)], **hp),
        ),
        Recipe(
            name="adamw_8bit",
            factory=adamw_8bit,
            learning_rate=0.008,
            paper=Paper("8-bit Optimizers via Block-wise Quantization", "2110.02861", 2021),
            state_formula="2mn + 8m⌈n/256⌉ bytes",
            state_elements=elements_8bit,
            state_bytes=bytes_8bit,
        ),
    ]


def _communicating() -> list[Recipe]:
    communicating = functools.partial(Recipe, communicates=True)
    return [
        communicating(
            name="adamw_int8",
            factory=adamw_int8,
            learning_rate=0.004,
            paper=Paper("INTELLECT-1 Technical Report", "2412.01152", 2024),
            state_formula="2mn",
            state_elements=lambda m, n, **_: 2 * m * n,
            wire="2mn (N-1)/N and scales",
        ),
        communicating(
            name="onebit_adam",
            factory=onebit_adam,
            learning_rate=0.004,
            defaults={"warmup_steps": 40, "variance_floor": 0.01},  # a fifth of 200 steps
            paper=Paper(
                "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence "
                "Speed",
                "2102.02888",
                2021,
            ),
            state_formula="4mn",
            state_elements=lambda m, n, **_: 4 * m * n,
            wire="8mn (N-1)/N while warming up, then mn/4 (N-1)/N",
        ),
        communicating(
            name="powersgd",
            factory=powersgd,
            learning_rate=0.32,
            paper=Paper(
                "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
                "1905.13727",
                2019,
            ),
            state_formula="2mn + rn",
            state_elements=lambda m, n, *, rank=4, **_: 2 * m * n + min(rank, m, n) * n,
            wire="8r(m+n) (N-1)/N",
        ),
        communicating(
            name="terngrad",
            factory=terngrad,
            learning_rate=0.008,
            paper=Paper(
                "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning",
                "1705.07878",
                2017,
            ),
            state_formula="2mn",
            state_elements=lambda m, n, **_: 2 * m * n,
            wire="3mn/4 (N-1)/N up to 7 workers, 5mn/4 (N-1)/N up to 127",
        ),
        communicating(
            name="demo",
            factory=demo,
            learning_rate=0.004,
            paper=Paper("DeMo: Decoupled Momentum Optimization", "2411.19870", 2024),
            state_formula="mn",
            state_elements=lambda m, n, **_: m * n,
            wire="11mn/256 (N-1)",
        ),
    ]


def _apart() -> list[Recipe]:
    """Those with an outer loop: AdamW inside, of which a worker has its own."""
    apart = functools.partial(
        Recipe,
        communicates=True,
        apart=True,
        eval_params=outer_params,
        # A function of the count has no one answer.
        steps_per_round=lambda *, sync_every, **_: None if callable(sync_every) else sync_every,
    )
    return [
        apart(
            name="diloco",
            factory=diloco_adamw,
            learning_rate=0.004,
            paper=Paper(
                "DiLoCo: Distributed Low-Communication Training of Language Models",
                "2311.08105",
                2023,
            ),
            state_formula="4mn",
            state_elements=_outer_loop_elements,
            wire="8mn (N-1)/N every sync_every steps",
        ),
        apart(
            name="streaming_diloco",
            factory=streaming_diloco_adamw,
            learning_rate=0.004,
            paper=Paper(
                "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch",
                "2501.18512",
                2025,
            ),
            state_formula="4mn",
            state_elements=_outer_loop_elements,
            wire="17mn/16 (N-1)/N every sync_every steps",
        ),
        apart(
            name="local_adamw",
            factory=diloco_adamw,
            learning_rate=0.004,
            defaults={"outer_learning_rate": 1.0, "outer_momentum": None},
            paper=Paper("Local SGD Converges Fast and Communicates Little", "1805.09767", 2018),
            state_formula="3mn",
            state_elements=_outer_loop_elements,
            wire="8mn (N-1)/N every sync_every steps",
        ),
        apart(
            name="eager_diloco",
            factory=eager_diloco_adamw,
            learning_rate=0.004,
            paper=Paper(
                "Eager Updates For Overlapped Communication and Computation in DiLoCo",
                "2502.12996",
                2025,
            ),
            state_formula="5mn",
            state_elements=lambda m, n, **_: 5 * m * n,
            wire="8mn (N-1)/N every sync_every steps",
        ),
        apart(
            name="co2",
            factory=co2_adamw,
            learning_rate=0.004,
            paper=Paper(
                "CO2: Efficient Distributed Training with Full Communication-Computation Overlap",
                "2401.16265",
                2024,
            ),
            state_formula="5mn",
            state_elements=lambda m, n, **_: 5 * m * n,
            wire="8mn (N-1)/N every sync_every steps",
        ),
        apart(
            name="savic",
            factory=savic,
            learning_rate=0.002,
            defaults={"sync_every": 50},
            paper=Paper("Local Methods with Adaptivity via Scaling", "2406.00846", 2024),
            state_formula="2mn",
            state_elements=lambda m, n, **_: 2 * m * n,
            wire="16mn (N-1)/N every sync_every steps",
        ),
    ]


def _peers() -> list[Recipe]:
    peer = functools.partial(Recipe, peer=True)
    return [
        peer(
            name="adamw",
            factory=optax.adamw,
            learning_rate=0.008,
            paper=Paper("Decoupled Weight Decay Regularization", "1711.05101", 2017),
            state_formula="2mn",
            state_elements=lambda m, n, **_: 2 * m * n,
        ),
        peer(
            name="lion",
            factory=optax.lion,
            learning_rate=0.002,
            paper=Paper("Symbolic Discovery of Optimization Algorithms", "2302.06675", 2023),
            state_formula="mn",
            state_elements=lambda m, n, **_: m * n,
        ),
        peer(
            name="adafactor",
            factory=optax.adafactor,
            learning_rate=0.04,
            paper=Paper(
                "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", "1804.04235", 2018
            ),
            state_formula="m + n + 1 (mn + 2 where a < 128)",
            state_elements=_adafactor_elements,
        ),
        peer(
            name="muon",
            factory=optax.contrib.muon,
            learning_rate=0.016,
            defaults={
                "consistent_rms": 0.2,  # steps of AdamW's size, so that AdamW's rates carry over
                "muon_weight_dimension_numbers": _hidden_matrices,
            },
            paper=Paper("Muon is Scalable for LLM Training", "2502.16982", 2025),
            state_formula="mn (2mn for embedding, head and vectors, which get AdamW), and 3 in all",
            state_elements=lambda m, n, **_: m * n + 3,  # optax keeps its coefficients there
        ),
        peer(
            name="sgd",
            factory=optax.sgd,
            learning_rate=0.15,
            defaults={"momentum": 0.9},
            paper=Paper(
                "On the importance of initialization and momentum in deep learning", "", 2013
            ),
            state_formula="mn",
            state_elements=lambda m, n, **_: m * n,
        ),
        peer(
            name="schedule_free",
            factory=optax.contrib.schedule_free_adamw,
            learning_rate=0.006,
            paper=Paper("The Road Less Scheduled", "2405.15682", 2024),
            state_formula="2mn",
            state_elements=lambda m, n, **_: 2 * m * n,
            schedule="constant",
            eval_params=optax.contrib.schedule_free_eval_params,
        ),
        peer(
            name="galore",
            factory=optax.contrib.galore,
            learning_rate=0.02,
            defaults={"rank": 32, "update_proj_gap": 50},
            paper=Paper(
                "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
                "2403.03507",
                2024,
            ),
            state_formula="2ra + rb",
            state_elements=_galore_elements,
        ),
    ]


def registry() -> dict[str, Recipe]:
    """Every public recipe by name: ours, those of them that communicate last, then the peers."""
    return {recipe.name: recipe for recipe in [*_ours(), *_communicating(), *_apart(), *_peers()]}
