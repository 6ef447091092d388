"""Pods by name: what is legal, what is missing, and what their links can carry."""

import importlib.util
import types

import numpy as np
import pytest

from jaxopt_suite.parallel import topologies
from jaxopt_suite.parallel.chips import CHIPS
from jaxopt_suite.parallel.topologies import Topology, describe

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu-aot (libtpu)"
)


@pytest.fixture
def settings(monkeypatch):
    for name, value in topologies.SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "name",
    [
        "v5e", "v5e:", "v5e:2", "v5e:2x2x2", "v5e:32x32", "v5e:0x2", "v5p:2x2", "v9:2x2", "2x2",
        "v5litepod:4x4", "h200:8", "h200:4x8", "h300:1x1x8", "v5e:2x2 ", "V5E:2x2", "",
    ],
)  # fmt: skip
def test_a_topology_that_does_not_exist_is_refused_with_the_legal_forms(name):
    with pytest.raises(ValueError, match="does not exist") as error:
        describe(name)
    assert repr(name) in str(error.value)
    assert topologies.LEGAL in str(error.value)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu-aot"), ("h200:1x1x8", "gpu-aot")])
def test_without_the_compiler_one_line_says_which_extra_to_install(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError) as error:
        describe(name)
    assert f"pip install 'jaxopt-suite[{extra}]'" in str(error.value)
    assert "\n" not in str(error.value)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("v5e:1x1", 1),
        ("v5e:2x2", 4),
        ("v5e:16x16", 256),
        ("v4:2x2x2", 8),
        ("v5p:16x16x24", 6144),
        ("v6e:4x4", 16),
        ("tpu7x:2x2x1", 8),  # two devices a chip
    ],
)
def test_a_described_pod_has_the_devices_its_name_says(name, devices, settings):
    pod = describe(name)
    assert len(pod.devices) == devices
    assert len(pod.devices) == np.prod(pod.sizes) * pod.chip.devices


@pytest.mark.parametrize(
    ("chip", "sizes", "rings"),
    [
        ("v5e", (16, 16), (True, True)),
        ("v5e", (8, 16), (False, True)),
        ("v5e", (4, 4), (False, False)),
        ("v5p", (8, 8, 8), (True, True, True)),
        ("v5p", (4, 4, 2), (False, False, False)),
    ],
)
def test_a_torus_is_closed_where_the_slice_reaches_round(chip, sizes, rings):
    assert Topology("", CHIPS[chip], sizes, ()).rings() == rings


def _torus(chip, sizes, mesh_shape, axis_names):
    """A pod with devices that know their coordinates, and a mesh in that order."""
    coordinates = list(np.ndindex(*sizes))
    devices = np.empty(len(coordinates), object)
    devices[:] = [types.SimpleNamespace(coords=(*c, 0)[:3]) for c in coordinates]
    mesh = types.SimpleNamespace(devices=devices.reshape(mesh_shape), axis_names=axis_names)
    return Topology("", CHIPS[chip], sizes, tuple(devices)), mesh


@pytest.mark.parametrize(
    ("mesh_shape", "axes", "links"),
    [
        ((16, 16), ("data",), 2),  # one closed dimension: round both ways
        ((16, 16), ("data", "model"), 4),
        ((64, 4), ("model",), 1),  # a quarter of a ring is a line
        ((64, 4), ("data",), 3),  # a whole ring, and every fourth chip of the other
    ],
)
def test_the_links_that_a_mesh_axis_may_use_are_those_of_the_dimensions_it_lies_along(
    mesh_shape, axes, links
):
    pod, mesh = _torus("v5e", (16, 16), mesh_shape, ("data", "model"))
    bandwidth, path = pod.bandwidth(mesh, axes)
    assert bandwidth == links * CHIPS["v5e"].link_bandwidth
    assert path.startswith(f"{links} torus link")


def test_gpus_of_one_host_use_its_switch_and_others_the_network():
    devices = np.empty(16, object)
    devices[:] = [types.SimpleNamespace(process_index=i // 8) for i in range(16)]
    pod = Topology("h200:1x2x8", CHIPS["h200"], (1, 2, 8), tuple(devices))
    mesh = types.SimpleNamespace(devices=devices.reshape(2, 8), axis_names=("data", "model"))
    assert pod.bandwidth(mesh, ("model",)) == (CHIPS["h200"].link_bandwidth, "NVLink")
    assert pod.bandwidth(mesh, ("data",))[0] == CHIPS["h200"].network_bandwidth
    assert pod.bandwidth(mesh, ("data", "model"))[0] == CHIPS["h200"].network_bandwidth
