"""The table of chips, and what XLA is told of a GPU."""

import dataclasses
import re

import pytest

from jaxopt_suite.parallel.chips import CHIPS
from jaxopt_suite.parallel.gpu_targets import TARGETS


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_is_found_under_its_name_and_says_where_its_figures_are_from(name):
    chip = CHIPS[name]
    assert chip.name == name
    assert len(chip.sources) >= 2  # the vendor's, and one to compare it with
    assert all(len(source) > 15 for source in chip.sources)


@pytest.mark.parametrize("name", CHIPS)
def test_the_figures_have_the_order_of_magnitude_of_their_units(name):
    """A factor of 8 or 1000 between bits and bytes, GB and TB, would show here."""
    chip = CHIPS[name]
    assert 16 * 2**30 <= chip.hbm_bytes <= 192 * 2**30
    # FLOPs per byte of memory traffic at which compute takes over: the chips were built alike.
    assert 150 <= chip.bf16_flops / chip.hbm_bandwidth <= 600
    assert 5 <= chip.hbm_bandwidth / chip.link_bandwidth <= 100
    assert 5 <= chip.link_bandwidth / chip.network_bandwidth <= 20


def test_tpus_form_tori_and_gpus_do_not():
    assert {n for n, c in CHIPS.items() if c.torus == 2} == {"v5e", "v6e"}
    assert {n for n, c in CHIPS.items() if c.torus == 3} == {"v4", "v5p", "tpu7x"}
    assert all(chip.torus == 0 for chip in CHIPS.values() if chip.platform == "cuda")


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        CHIPS["v5e"] = CHIPS["v5p"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHIPS["v5e"].hbm_bytes = 1.0


def test_every_gpu_has_a_description_for_its_compiler_with_the_table_s_memory():
    assert set(TARGETS) == {name for name, chip in CHIPS.items() if chip.platform == "cuda"}
    for name, target in TARGETS.items():
        text = target.text()
        fields = dict(re.findall(r"(\w+): (\S+)", text))
        assert int(fields["device_memory_size"]) == CHIPS[name].hbm_bytes
        assert int(fields["memory_bandwidth"]) == CHIPS[name].hbm_bandwidth
        assert int(fields["core_count"]) == target.cores
        assert text.count("{") == text.count("}")
