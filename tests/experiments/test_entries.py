"""Who takes part in a comparison: names, settings and learning rates read from the command line."""

import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.config import CompareConfig
from jaxopt_suite.experiments.entries import entries
from jaxopt_suite.optimizers.registry import registry


def make(optimizers: str, *settings: str) -> dict:
    chosen = entries(CompareConfig(optimizers=optimizers, set=settings))
    return {entry.recipe.name: entry for entry in chosen}


def test_order_is_the_one_given_and_rates_are_the_tuned_ones():
    chosen = make("muon, adamw")
    assert list(chosen) == ["muon", "adamw"]
    assert chosen["adamw"].rate.value == registry()["adamw"].learning_rate
    assert chosen["adamw"].rate.source == "tuned default"


def test_a_setting_goes_to_every_optimizer_that_has_it_and_to_no_other():
    chosen = make("adamw,sgd,lion", "b2=0.95")
    assert chosen["adamw"].settings == {"b2": 0.95}
    assert chosen["lion"].settings == {"b2": 0.95}
    assert chosen["sgd"].settings == {}


def test_a_setting_for_one_optimizer_outranks_the_one_for_all():
    chosen = make("adamw,lion", "lion.b2=0.9", "b2=0.95")
    assert chosen["adamw"].settings == {"b2": 0.95}
    assert chosen["lion"].settings == {"b2": 0.9}
    assert chosen["lion"].settings_as_text() == ("b2=0.9",)


def test_a_learning_rate_can_be_given_and_is_no_hyperparameter():
    chosen = make("adamw,lion", "adamw.learning_rate=0.5")
    assert chosen["adamw"].settings == {}
    assert (chosen["adamw"].rate.value, chosen["adamw"].rate.source) == (0.5, "given")
    assert chosen["lion"].rate.source == "tuned default"


@pytest.mark.parametrize(
    ("optimizers", "settings", "message"),
    [
        ("adamw,adamv", (), "'adamv' is not one of .*grams.*adamw"),
        ("adamw,adamw", (), "different names"),
        ("", (), "different names"),
        ("adamw,,grams", (), "different names"),
        ("adamw,sgd", ("rank=3",), "no optimizer compared has 'rank'.*adamw: .*b2.*sgd: .*mom"),
        ("adamw", ("lion.b2=0.9",), "'lion' is not one of the optimizers compared: adamw"),
        ("adamw,lion", ("lion.rank=1",), "no optimizer compared has 'rank'.*lion: "),
        ("adamw", ("learning_rate=fast",), "positive, finite number, got 'fast'"),
        ("adamw", ("learning_rate=-1",), "positive, finite number, got -1"),
        ("adam_snsm", ("rank=0",), "adam_snsm: rank must be .*got 0"),
    ],
)
def test_a_mistake_is_answered_with_what_would_be_legal(
    optimizers: str, settings: tuple[str, ...], message: str
):
    with pytest.raises(UserError, match=message):
        make(optimizers, *settings)
