"""Plans of pods: what the command is given, and what counts as a promise kept."""

import jax
import pytest

from benchmarks import plan
from jaxopt_suite.experiments import model

TARGET = plan.Target("nano", "adamw", "v5e:2x2", "data=4")


def test_the_command_gets_every_word_and_settings_only_if_there_are_some():
    words = ["plan", "--preset", "nano", "--optimizer", "adamw"]
    words += ["--topology", "v5e:2x2", "--mesh", "data=4"]
    assert TARGET.words == words
    assert TARGET._replace(set="b2=0.9").words == [*words, "--set", "b2=0.9"]


def test_the_whole_state_is_that_of_one_device_with_the_settings():
    params = jax.tree.leaves(model.abstract_params(model.PRESETS["nano"]))
    assert TARGET.whole_state == 8 * sum(x.size for x in params) + 4  # two moments and the count
    blocks = [TARGET._replace(optimizer="soap", set=f"block_size={b}") for b in (16, 64)]
    assert blocks[0].whole_state != blocks[1].whole_state


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"seconds": 241.0}, False),
        ({"of_the_compilers_peak": 1.11}, False),
        ({"state_of_its_share": 1.06}, False),
        ({"state_of_its_share": 64.0, "optimizer": "adamw"}, True),
    ],
)
def test_a_promise_is_kept_in_time_near_the_compiler_and_with_state_spread(changes, kept):
    row = {"seconds": 240.0, "of_the_compilers_peak": 0.91, "state_of_its_share": 1.05}
    assert plan.kept(row | {"optimizer": "soap"} | changes) == kept
