"""Counting rules, by hand; and that two of them never share a table."""

import numpy as np
import pytest

from jaxopt_suite.scaling_laws import load_runs
from jaxopt_suite.scaling_laws.conventions import FLOP_RULES, N_RULES, Shape

# GPT-2 small: d 768, 12 layers, f 4 d, V 50257, context 1024.
GPT2 = Shape(width=768, depth=12, vocab=50257, seq_len=1024, heads=12, ff_width=3072, ff_matrices=2)
BODY = 84_934_656  # 12 * 12 * 768**2
TABLE = 38_597_376  # 50257 * 768


def test_parameters_are_counted_as_by_hand():
    counts = {name: rule.of(GPT2) for name, rule in N_RULES.items()}
    assert counts == {"body": BODY, "body_head": BODY + TABLE, "total": BODY + 2 * TABLE}


def test_flops_are_counted_as_by_hand():
    assert FLOP_RULES["body"].of(GPT2) == 6 * BODY
    assert FLOP_RULES["total"].of(GPT2) == 6 * (BODY + 2 * TABLE)
    assert FLOP_RULES["6ND"].of(Shape(), n=1e9) == 6e9
    attention = 12 * 1024 * 768
    assert FLOP_RULES["body_head_attention"].of(GPT2) == 6 * (BODY + TABLE) + 6 * attention
    # 4 d + 2 f per layer is what one of DeepSeek's 72 l d^2 is made of where f is 4 d.
    assert FLOP_RULES["deepseek_m"].of(GPT2) == 6 * BODY + 12 * attention
    gated = Shape(width=64, depth=2, ff_width=160, seq_len=32)
    assert FLOP_RULES["steplaw_m"].of(gated) == 6 * 2 * 64 * (4 * 64 + 3 * 160 + 2 * 32)


def test_the_full_sum_is_every_matrix_product_and_the_softmax():
    """A multiply-add of every matrix entry, the embedding's as a product; forward times three."""
    products = 2 * (BODY + 2 * TABLE)
    scores = 12 * (2 * 2 * 1024 * 768 + 3 * 12 * 1024)
    assert FLOP_RULES["full_sum"].of(GPT2) == 3 * (products + scores)


def test_head_sizes_need_not_fill_the_width():
    narrow = Shape(width=8, depth=1, vocab=0, heads=2, head_size=3, ff_width=1, ff_matrices=2)
    assert N_RULES["body"].of(narrow) == 4 * 8 * 6 + 2 * 8


def test_rules_take_columns_and_name_what_they_lack():
    shape = Shape(
        width=np.array([8.0, 16.0]), depth=np.array([1.0, 2.0]), seq_len=np.array([4.0, 4.0])
    )
    np.testing.assert_array_equal(
        FLOP_RULES["deepseek_m"].of(shape), [72 * 64 + 12 * 32, 72 * 2 * 256 + 12 * 2 * 64]
    )
    with pytest.raises(ValueError, match="'body' needs ff_width, ff_matrices, which the runs"):
        N_RULES["body"].of(shape)
    with pytest.raises(ValueError, match="'6ND' needs N"):
        FLOP_RULES["6ND"].of(shape)


TABLE_OF_RUNS = {"N": [1e6, 2e6], "D": [1e8, 1e8], "loss": [3.0, 2.5]}


def test_flops_are_computed_only_by_a_rule_that_is_named():
    assert "C" not in load_runs(TABLE_OF_RUNS).columns
    runs = load_runs(TABLE_OF_RUNS, flops="6ND")
    np.testing.assert_array_equal(runs["C"], [6e14, 1.2e15])
    assert dict(runs.conventions.derived) == {"C": "6 N D"}
    with pytest.raises(ValueError, match=r"flops must be one of 6ND, body,.* got '6nd'"):
        load_runs(TABLE_OF_RUNS, flops="6nd")
    with pytest.raises(ValueError, match="'deepseek_m' needs width"):
        load_runs(TABLE_OF_RUNS, flops="deepseek_m")


def test_tokens_follow_from_flops_only_by_the_rule_that_says_so():
    table = {"N": [1e6], "C": [6e14], "loss": [3.0]}
    assert "D" not in load_runs(table).columns
    assert load_runs(table, flops="6ND")["D"][0] == 1e8
    assert "D" not in load_runs(table, flops="body").columns
    with pytest.raises(ValueError, match="C by the rule '6ND' needs D"):
        load_runs({"N": [1e6], "loss": [3.0]}, flops="6ND")


def test_n_follows_from_sizes_by_rule():
    sizes = {"width": [8.0], "depth": [1.0], "ff_width": [32.0], "ff_matrices": [2.0]}
    runs = load_runs({"D": [1.0], "loss": [3.0], **sizes}, n_rule="body")
    assert runs["N"][0] == 12 * 64
    with pytest.raises(ValueError, match="n_rule must be one of body, body_head, total where"):
        load_runs({"D": [1.0], "loss": [3.0]}, n_rule="mine")


@pytest.mark.parametrize("column", ["N_rule", "flop_rule", "loss_kind"])
def test_mixed_rules_are_refused(column):
    with pytest.raises(ValueError, match=r"must be the same.*a at frame:0; b at frame:1"):
        load_runs(TABLE_OF_RUNS | {column: ["a", "b"]})
    with pytest.raises(ValueError, match=r"a at frame:0; not stated at frame:1"):
        load_runs(TABLE_OF_RUNS | {column: ["a", ""]})
    argument = {"N_rule": "n_rule", "flop_rule": "flops", "loss_kind": "loss_kind"}[column]
    table = TABLE_OF_RUNS | {column: ["a", "a"], "C": [1.0, 1.0]}
    with pytest.raises(ValueError, match="b at the argument"):
        load_runs(table, **{argument: "b"})
    assert column not in load_runs(table).columns
