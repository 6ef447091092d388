"""Facts about subset-norm: the recursion by hand, its limits, its subsets and their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradient_trees import assert_histories_close, gradients, run

from jaxopt_suite.optimizers import adagrad_sn, adam_sn, rmsprop_sn, scale_by_subset_norm

# float32 against float64 over 25 steps: sums of up to 21 squares, one mean, one division.
ROUNDING = {"rtol": 3e-6, "atol": 1e-7}


def spread_sums(g, subset):
    """For each coordinate of ``g``, the sum of squares over its subset, written out naively."""
    if g.ndim < 2:
        return g**2
    if subset == "heuristic":
        m, n = g.shape
        axis = 1 if m > n else 0
        return np.broadcast_to(np.sum(g**2, axis=axis, keepdims=True), g.shape)
    k = subset if subset > 0 else max(1, int(np.sqrt(g.size) / -subset))
    flat = g.ravel()
    out = np.empty_like(flat)
    for start in range(0, flat.size, k):
        out[start : start + k] = np.sum(flat[start : start + k] ** 2)
    return out.reshape(g.shape)


def by_hand(grads, *, accumulator, subset, b1=None, b2=0.999, eps=1e-8, eps_mode="corrected"):
    history = []
    v = {k: np.zeros_like(g) for k, g in grads[0].items()}
    mean = {k: np.zeros_like(g) for k, g in grads[0].items()}
    for t, tree in enumerate(grads, start=1):
        step = {}
        for k, g in tree.items():
            s = spread_sums(g, subset)
            v[k] = v[k] + s if accumulator == "adagrad" else b2 * v[k] + (1 - b2) * s
            numerator = g
            if b1 is not None:
                mean[k] = b1 * mean[k] + (1 - b1) * g
                numerator = mean[k] / (1 - b1**t) if accumulator == "adam" else mean[k]
            c2 = 1 - b2**t if accumulator == "adam" else 1.0
            if eps_mode == "corrected":
                step[k] = numerator / (np.sqrt(v[k] / c2) + eps)
            else:
                step[k] = numerator * np.sqrt(c2) / (np.sqrt(v[k]) + eps)
        history.append(step)
    return history


@pytest.mark.parametrize("subset", ["heuristic", 3, 5, 100, -1, -2])
def test_adam_form_equals_the_recursion_by_hand(subset):
    grads = gradients(25)
    tx = adam_sn(1.0, b1=0.8, b2=0.99, eps=1e-3, subset=subset)
    theirs = by_hand(grads, accumulator="adam", subset=subset, b1=0.8, b2=0.99, eps=1e-3)
    ours, _ = run(optax.chain(tx, optax.scale(-1.0)), grads)
    assert_histories_close(ours, theirs, **ROUNDING)


@pytest.mark.parametrize("accumulator", ["rmsprop", "adagrad", "adam"])
@pytest.mark.parametrize("subset", ["heuristic", 4])
def test_every_accumulator_equals_the_recursion_by_hand(accumulator, subset):
    grads = gradients(25)
    b2 = None if accumulator == "adagrad" else 0.95
    ours, _ = run(scale_by_subset_norm(b2, 1e-4, accumulator=accumulator, subset=subset), grads)
    theirs = by_hand(grads, accumulator=accumulator, subset=subset, b2=b2 or 0.0, eps=1e-4)
    assert_histories_close(ours, theirs, **ROUNDING)


def test_uncorrected_epsilon_is_added_before_bias_correction():
    grads = gradients(6)
    ours, _ = run(scale_by_subset_norm(eps=0.1, eps_mode="uncorrected"), grads)
    theirs = by_hand(grads, accumulator="adam", subset="heuristic", eps=0.1, eps_mode="uncorrected")
    assert_histories_close(ours, theirs, **ROUNDING)


def test_subsets_of_one_coordinate_are_adam_adagrad_and_rmsprop():
    grads = gradients(10)
    # optax's float32 power in the bias correction is off by up to 1.3e-5
    ours, _ = run(adam_sn(0.1, subset=1), grads)
    theirs, _ = run(optax.adam(0.1), grads)
    assert_histories_close(ours, theirs, rtol=3e-5, atol=1e-7)
    ours, _ = run(adagrad_sn(0.1, subset=1, eps=0.0), grads)
    theirs, _ = run(optax.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0), grads)
    assert_histories_close(ours, theirs, **ROUNDING)
    ours, _ = run(rmsprop_sn(0.1, b2=0.9, subset=1), grads)
    theirs, _ = run(optax.rmsprop(0.1, decay=0.9, eps=1e-8, eps_in_sqrt=False), grads)
    assert_histories_close(ours, theirs, **ROUNDING)


def test_one_subset_for_all_is_adagrad_norm():
    grads = gradients(8, shapes={"w": (3, 5)})
    ours, state = run(scale_by_subset_norm(accumulator="adagrad", subset=10**6), grads)
    total = 0.0
    for g, step in zip(grads, ours, strict=True):
        total += np.sum(g["w"] ** 2)
        np.testing.assert_allclose(step["w"], g["w"] / np.sqrt(total), rtol=2e-6)  # float32
    assert state.nu["w"].shape == (1, 1)


def test_adagrad_with_a_mean_as_numerator_equals_the_recursion_by_hand():
    grads = gradients(10)
    ours, _ = run(optax.chain(adagrad_sn(1.0, b1=0.9), optax.scale(-1.0)), grads)
    theirs = by_hand(grads, accumulator="adagrad", subset="heuristic", b1=0.9, b2=0.0)
    assert_histories_close(ours, theirs, **ROUNDING)


@pytest.mark.parametrize(
    ("shape", "subset", "expected"),
    [
        ((7, 3), "heuristic", (7, 1)),
        ((3, 7), "heuristic", (1, 7)),
        ((4, 4), "heuristic", (1, 4)),
        ((2, 7, 3), "heuristic", (2, 7, 1)),
        ((5, 2, 3, 7), "heuristic", (5, 2, 1, 7)),
        ((7, 3), 5, (5, 1)),
        ((7, 3), 50, (1, 1)),
        ((16, 16), "sqrt", (32, 1)),
        ((16, 16), -4, (64, 1)),
        ((9,), "heuristic", (9,)),
        ((), 3, ()),
    ],
)
def test_one_number_is_stored_for_each_subset(shape, subset, expected):
    state = scale_by_subset_norm(subset=subset).init({"w": jnp.zeros(shape)})
    assert state.nu["w"].shape == expected
    assert state.nu["w"].dtype == jnp.float32


def test_sums_do_not_depend_on_the_scale_of_the_run_remainder():
    # 7 coordinates in runs of 3: the last run has one coordinate, and padding must not dilute it.
    tx = scale_by_subset_norm(accumulator="adagrad", subset=3, matrix_mask=lambda p: {"w": True})
    g = {"w": jnp.arange(1.0, 8.0).reshape(7, 1)}
    step, _ = tx.update(g, tx.init(g))
    assert float(step["w"][-1, 0]) == pytest.approx(1.0, rel=1e-6)  # 7 / sqrt(49), float32
    assert float(step["w"][0, 0]) == pytest.approx(1 / np.sqrt(14), rel=1e-6)


def test_a_stack_of_matrices_is_treated_as_its_matrices():
    grads = gradients(5, shapes={"stack": (3, 4, 6)})
    apart = [{str(i): g["stack"][i] for i in range(3)} for g in grads]
    ours, _ = run(adam_sn(0.1), grads)
    theirs, _ = run(adam_sn(0.1), apart)
    joined = [{"stack": np.stack([t[str(i)] for i in range(3)])} for t in theirs]
    assert_histories_close(ours, joined, rtol=1e-6, atol=0)  # same arithmetic, other fusions


def test_mask_leaves_the_other_matrices_with_a_step_size_for_each_coordinate():
    grads = gradients(5)
    only_tall = lambda tree: {k: k == "tall" for k in tree}
    ours, state = run(adam_sn(0.1, matrix_mask=only_tall), grads)
    adam, _ = run(optax.adam(0.1), grads)
    assert state[0].nu["wide"].shape == (3, 5)
    assert state[0].nu["tall"].shape == (7, 1)
    keep = lambda history: [{"wide": h["wide"], "square": h["square"]} for h in history]
    assert_histories_close(keep(ours), keep(adam), rtol=3e-5, atol=1e-7)  # as above
    with pytest.raises(ValueError, match=r"marks \['scalar'\] of shape \(\)"):
        adam_sn(0.1, matrix_mask=lambda tree: dict.fromkeys(tree, True)).init(grads[0])
    with pytest.raises(ValueError, match="structure of the parameters"):
        adam_sn(0.1, matrix_mask=lambda tree: [True]).init(grads[0])


def test_zero_gradients_give_zero_steps():
    zeros = [{k: np.zeros_like(v) for k, v in gradients(1)[0].items()}] * 3
    for tx in (adam_sn(0.1), rmsprop_sn(0.1), adagrad_sn(0.1), adam_sn(0.1, subset=4)):
        ours, _ = run(tx, zeros)
        assert_histories_close(ours, zeros, rtol=0, atol=0)


def test_bfloat16_gradients_follow_the_float64_recursion():
    grads = gradients(10, dtype=jnp.bfloat16)
    ours, state = run(optax.chain(adam_sn(1.0), optax.scale(-1.0)), grads, dtype=jnp.bfloat16)
    wide = [{k: v.astype(np.float64) for k, v in g.items()} for g in grads]
    theirs = by_hand(wide, accumulator="adam", subset="heuristic", b1=0.9)
    assert_histories_close(ours, theirs, rtol=2**-7, atol=1e-5)  # rounded to bfloat16 twice
    assert {x.dtype for x in jax.tree.leaves(state[0][0].nu)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_subset_norm(subset=0), "subset must be .* not 0, got 0"),
        (lambda: scale_by_subset_norm(subset="rows"), "subset must be one of .* got 'rows'"),
        (lambda: scale_by_subset_norm(accumulator="lion"), "accumulator must be one of"),
        (lambda: scale_by_subset_norm(0.9, accumulator="adagrad"), "takes no b2, got b2=0.9"),
        (
            lambda: scale_by_subset_norm(accumulator="rmsprop", eps_mode="uncorrected"),
            "eps_mode='uncorrected' is about bias correction",
        ),
        (lambda: adam_sn(0.1, b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
        (lambda: adagrad_sn(0.1, mu_dtype=jnp.bfloat16), "needs b1"),
        (lambda: rmsprop_sn(-1.0), r"learning_rate must be in \[0, inf\), got -1.0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match=r"subset must be an int, got 2\.5"):
        scale_by_subset_norm(subset=2.5)
