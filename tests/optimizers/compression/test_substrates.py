"""One program, two substrates: a simulated fleet and a mesh take the same steps."""

import jax
import numpy as np
import pytest
from fleets import WORKERS, copies, normal, relative_difference, run_fleet

from jaxopt_suite import parallel
from jaxopt_suite.optimizers.compression import compressors, feedback
from jaxopt_suite.optimizers.compression.mean import compressed_mean

STEPS = 30
SHAPES = {"matrix": (12, 20), "vector": (7,)}

# The same operations in the same order; only sums inside one operation (an all-reduce, a norm, a
# product of matrices) may be split differently by XLA, which rounds differently.
ORDER_OF_SUMS = 1e-6
LARGER = {
    # A message on the edge between two codes goes to the other one: 1/16 of one entry of 7200.
    "fp8": 2e-3,
    # Power steps on noise separate what differs by a rounding: 4e-4 after 30 steps here.
    "low rank": 5e-3,
}

CASES = {
    "identity": (compressors.identity(), feedback.none(), "mean"),
    "identity, two phases": (compressors.identity(), feedback.ef(), "two_phase"),
    "top-k": (compressors.top_k(fraction=0.1), feedback.ef(), "gather"),
    "top-k of chunks": (
        compressors.top_k(fraction=0.2, chunk=10),
        feedback.econtrol(0.1),
        "two_phase",
    ),
    "top-k, EF21-SGDM": (compressors.top_k(20), feedback.momentum(0.3), "gather"),
    "random-k": (compressors.random_k(fraction=0.2), feedback.ef(), "mean"),
    "sign": (compressors.sign(), feedback.ef(), "two_phase"),
    "sign, EF21": (compressors.sign(), feedback.ef21(), "gather"),
    "ternary": (compressors.ternary(), feedback.none(), "two_phase"),
    "int8": (compressors.int8(16), feedback.ef(), "two_phase"),
    "int4, stochastic": (compressors.int4(16, stochastic=True), feedback.none(), "gather"),
    "fp8": (compressors.fp8(), feedback.ef(), "auto"),
    "low rank": (compressors.low_rank(2), feedback.ef(), "auto"),
    "low rank, gathered": (compressors.low_rank(2), feedback.ef21(), "gather"),
    "DCT": (compressors.dct_top_k(4, side=8), feedback.ef(), "gather"),
}
QUICK = ["top-k, EF21-SGDM", "sign", "low rank"]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_a_mesh_and_a_simulated_fleet_take_the_same_steps_and_replicas_are_equal_bits(case):
    compressor, rule, exchange = CASES[case]
    tx = compressed_mean(
        compressor,
        axis_name="worker",
        feedback=rule,
        exchange=exchange,
        dense=lambda path, leaf: leaf.size < 100,
    )
    inputs = normal(SHAPES, steps=STEPS)
    simulated = run_fleet(tx, inputs)
    real = run_fleet(tx, inputs, mesh=parallel.make_mesh({"worker": WORKERS}))

    assert relative_difference(real, simulated) <= LARGER.get(case, ORDER_OF_SUMS)
    for leaf in jax.tree.leaves(real[0]):
        assert leaf.shape[0] == STEPS  # typed as equal: no axis of workers
        held = copies(leaf)
        assert len(held) == WORKERS
        for other in held[1:]:
            np.testing.assert_array_equal(held[0].view(np.int32), other.view(np.int32))
