"""AdamW in 8 bits against bitsandbytes: the PyTorch form of its block-wise update, run eagerly.

Of each moment two digits are kept, so a last bit may decide a code: where a moment over its scale
is within rounding of the middle between two entries, each side takes its own, and that coordinate
differs by a hundredth for some steps. That happens about once in a million codes. The case is small
enough that it does not happen in it, and a departure has the figure for a larger matrix.
"""

import ast
import functools
import math
import pathlib
from typing import Any, Optional

import optax

from benchmarks.parity.compare import (
    LEARNING_RATE,
    Case,
    Departure,
    Method,
    difference_of_updates,
    full_rank_gradients,
)
from jaxopt_suite.optimizers import adamw_8bit

_BETAS, _EPS, _BLOCK = (0.9, 0.999), 1e-8, 256
_SHAPES = {"matrix": (8, 512), "stack": (2, 4, 256), "vector": (1024,)}
_RAGGED = {"matrix": (24, 200)}
_LARGE = {"matrix": (256, 256)}


_FUNCTIONS = {
    "bitsandbytes/functional.py": ("create_dynamic_map",),
    "bitsandbytes/backends/triton/kernels_optim.py": (
        "_dequantize_blockwise_pytorch",
        "_quantize_blockwise_pytorch",
        "optimizer_update_8bit_blockwise_pytorch",
    ),
}


def _ours(weight_decay: float = 0.0, **changes: Any) -> optax.GradientTransformation:
    settings = {"block": _BLOCK, "min_size": 0, **changes}
    return adamw_8bit(LEARNING_RATE, *_BETAS, _EPS, weight_decay, **settings)


class _Official:
    """The official update as an optimizer: codes and scales by parameter."""

    def __init__(self, functions: Any, params: dict[str, Any], weight_decay: float) -> None:
        torch = functions["torch"]
        self._torch, self._update = torch, functions["optimizer_update_8bit_blockwise_pytorch"]
        self._params, self._weight_decay, self.count = params, weight_decay, 0
        make_map = functions["create_dynamic_map"]
        self._maps = make_map(signed=True), make_map(signed=False)
        scales = lambda p: torch.zeros(-(-p.numel() // _BLOCK))
        codes = lambda p: torch.zeros(p.shape, dtype=torch.uint8)
        self.state = {
            name: (codes(p), codes(p), scales(p), scales(p)) for name, p in params.items()
        }

    def step(self) -> None:
        self.count += 1
        for name, p in self._params.items():
            codes1, codes2, scales1, scales2 = self.state[name]
            self._update(
                *(p, p.grad, codes1, codes2, *_BETAS, 0.0, 0.0, _EPS, self.count, LEARNING_RATE),
                *(*self._maps, scales1, scales2, self._weight_decay, 1.0, False),
                optimizer_name="adam",
            )


def _functions(root: pathlib.Path) -> dict[str, Any]:
    """The official functions, without the files around them, which need Triton and CUDA libraries.

    Their decorator compiles them, which would change last bits from machine to machine.
    """
    import torch  # the reference's own dependency, none of ours

    scope: dict[str, Any] = {"torch": torch, "math": math, "Optional": Optional}
    for file, names in _FUNCTIONS.items():
        tree = ast.parse((root / file).read_text())
        found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
        for node in found:
            node.decorator_list = []
        exec(compile(ast.Module(list(found), []), file, "exec"), scope)
    return scope


def _build(consts: Any) -> tuple[list[Case], list[Departure]]:
    functions = _functions(pathlib.Path(consts.__file__).parents[1])
    case = Case(
        name="blocks of 256, decoupled decay 0.1",
        settings={"betas": _BETAS, "eps": _EPS, "block": _BLOCK, "min_size": 0},
        ours=_ours,
        official=functools.partial(_Official, functions),
        transposed=False,
        weight_decay=0.1,
        gradients=functools.partial(full_rank_gradients, _SHAPES, steps=30),
    )
    return [case], [
        Departure(
            "Blocks do not run on from one row into the next, as the official ones do: the same "
            "where the block divides the row (figure: rows of 200).",
            lambda: difference_of_updates(case, shapes=_RAGGED).value,
        ),
        Departure(
            "A moment within rounding of the middle between two codes may get the one here and the "
            "other there (figure: a matrix of 256 by 256).",
            lambda: difference_of_updates(case, shapes=_LARGE).value,
        ),
        Departure(
            "Of two codes equally near, the one nearer to zero is taken; the official PyTorch code "
            "takes the lower, the CUDA kernel one of the moment's sign."
        ),
        Departure(
            "A gradient that is not finite, or whose square is not, sets its own moments to zero; "
            "so does the CUDA kernel for the former, while in the PyTorch code it spoils its block."
        ),
        Departure("Weight decay is 1e-4 by default, as in optax; the official default is 1e-2."),
    ]


METHOD = Method(
    name="adamw_8bit",
    repository="bitsandbytes-foundation/bitsandbytes",
    marks=tuple(_FUNCTIONS),
    packages=("torch",),
    module="bitsandbytes/consts.py",  # says where the clone is; see _functions
    build=_build,
)
