"""1-bit Adam against deepspeedai/DeepSpeed, with four workers.

DeepSpeed itself needs a GPU. Its optimizer and its compressed all-reduce are two files of plain
PyTorch; they are run as they are, with stand-ins for what they import of the rest: communication,
the name of the device, and the packing of bits, which is a kernel.
"""

import contextlib
import functools
import importlib.util
import pathlib
import sys
import types
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optax

from benchmarks.parity import _fleet
from benchmarks.parity.compare import (
    EPS,
    LEARNING_RATE,
    Case,
    Departure,
    Method,
    difference_of_updates,
)
from jaxopt_suite.optimizers import onebit_adam

WORKERS = 4
_B1, _B2 = 0.9, 0.999
_WARMUP_STEPS = 8  # of 25
_OFFICIAL = {"bias_correction": False, "dense": lambda path, leaf: False}


def _ours(weight_decay: float, **settings: Any) -> optax.GradientTransformation:
    one = onebit_adam(
        LEARNING_RATE,
        _B1,
        _B2,
        EPS,
        weight_decay=weight_decay,
        axis_name=_fleet.AXIS,
        warmup_steps=_WARMUP_STEPS,
        **{**_OFFICIAL, **settings},
    )
    return _fleet.ours(one, WORKERS, output_axis=0)


class _Packer:
    """Eight signs a byte."""

    def load(self) -> "_Packer":
        return self

    def packbits(self, x: Any, size: int, rank: int) -> Any:
        import torch

        del size, rank
        return torch.from_numpy(np.packbits(~np.signbit(x.numpy())))

    def unpackbits(self, x: Any, size: int, rank: int) -> Any:
        import torch

        del size, rank
        return torch.from_numpy(2.0 * np.unpackbits(x.numpy()).astype(np.float32) - 1.0)


class _Official:
    """The two files, and what they take for DeepSpeed while they run."""

    def __init__(self, utils: Any) -> None:
        device = types.SimpleNamespace(current_device_name=lambda: "cpu", empty_cache=lambda: None)
        self._modules = {
            "deepspeed": _module(comm=None),
            "deepspeed.comm": _module(),
            "deepspeed.accelerator": _module(get_accelerator=lambda: device),
            "deepspeed.ops": _module(),
            "deepspeed.ops.op_builder": _module(PackbitsBuilder=_Packer),
            "deepspeed.utils": _module(),
            "deepspeed.utils.torch": _module(required_torch_version=lambda **versions: True),
            "deepspeed.runtime": _module(),
            "deepspeed.runtime.comm": _module(),
            "deepspeed.runtime.comm.utils": utils,
        }
        comm = pathlib.Path(utils.__file__).parent
        with unittest.mock.patch.dict(sys.modules, self._modules):
            self._compressed = _load(comm / "compressed.py")
            self.adam = _load(comm.parent / "fp16" / "onebit" / "adam.py")
        self._modules["deepspeed.runtime.comm.compressed"] = self._compressed

    @contextlib.contextmanager
    def running(self, distributed: _fleet.Distributed) -> Iterator[None]:
        """While this lasts, their communication is that of these ranks."""
        with (
            unittest.mock.patch.dict(sys.modules, self._modules),
            unittest.mock.patch.object(self._compressed, "dist", distributed),
            unittest.mock.patch.object(self.adam, "dist", distributed),
        ):
            yield

    def rank(
        self, weight_decay: float, distributed: _fleet.Distributed, params: list[Any]
    ) -> Callable[[], None]:
        """One rank's step, past the first one, which the official optimizer loses."""
        optimizer = self.adam.OnebitAdam(
            params,
            deepspeed=types.SimpleNamespace(mpu=None, local_rank=0),
            lr=LEARNING_RATE,
            freeze_step=_WARMUP_STEPS + 1,
            betas=(_B1, _B2),
            eps=EPS,
            weight_decay=weight_decay,
            comm_backend_name="compressed",
        )
        for p in params:
            p.grad = p.detach().clone().zero_()
        optimizer.step()

        def step() -> None:
            if not optimizer.adam_freeze_key:  # the engine takes the mean in the dense stage
                for p in params:
                    distributed.all_reduce(p.grad)
                    p.grad.div_(WORKERS)
            optimizer.step()

        return step


def _module(**contents: Any) -> types.ModuleType:
    module = types.ModuleType("standing_in")
    vars(module).update(contents)
    return module


def _load(file: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"official_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(utils: Any) -> tuple[list[Case], list[Departure]]:
    official = _Official(utils)

    def fleet(params: dict[str, Any], weight_decay: float) -> _fleet.Fleet:
        rank = functools.partial(official.rank, weight_decay)
        return _fleet.Fleet(params, WORKERS, rank, around=official.running)

    case = Case(
        name=f"{WORKERS} workers, {_WARMUP_STEPS} dense steps",
        settings={
            "betas": (_B1, _B2),
            "eps": EPS,
            "warmup_steps": _WARMUP_STEPS,
            "bias_correction": False,
            "workers": WORKERS,
        },
        ours=_ours,
        official=fleet,
        transposed=False,  # so that both sides cut leaves into the same pieces
        weight_decay=0.1,
    )

    def changed(**settings: Any) -> float:
        return difference_of_updates(case, _ours(0.0, **settings)).value

    return [case], [
        Departure(
            "Both moments are bias-corrected by default, as in Adam; the official code takes the "
            "argument and does not use it (bias_correction=False).",
            lambda: changed(bias_correction=True),
        ),
        Departure(
            "Leaves of fewer than 1024 elements stay in the dense stage by default; the official "
            "code compresses every leaf (figure: the vector).",
            lambda: changed(dense=lambda path, leaf: leaf.size < 1024),
        ),
        Departure(
            "An entry that never had a gradient does not move in the compressed stage; in the "
            "official code it moves by the momentum over epsilon, unless it is masked by hand."
        ),
        Departure(
            "The official code pads a leaf to a multiple of 8 times the number of workers, or of "
            "its square, and padding takes part in scales and errors; here it does not. The leaves "
            "compared need none."
        ),
        Departure(
            "The official optimizer's first step changes nothing and is counted; the comparison "
            "begins after it."
        ),
        Departure(
            "Errors are part of the state and of a checkpoint; the official code sets them to zero "
            "when one is loaded."
        ),
    ]


METHOD = Method(
    name="onebit_adam",
    repository="deepspeedai/DeepSpeed",
    marks=("deepspeed/runtime/comm/compressed.py", "deepspeed/runtime/fp16/onebit/adam.py"),
    packages=("torch",),
    module="deepspeed/runtime/comm/utils.py",
    build=_build,
)
