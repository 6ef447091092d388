"""Meshes from text: what is read, what is refused, and in which order devices are laid out."""

import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxopt_suite.parallel.meshes import AXES, format_mesh, make_mesh, parse_mesh


@hypothesis.given(
    st.lists(st.sampled_from(list(AXES)), min_size=1, unique=True),
    st.lists(st.integers(1, 10**6), min_size=len(AXES), max_size=len(AXES)),
)
def test_what_is_written_is_read_back_in_the_same_order(names, numbers):
    sizes = dict(zip(names, numbers, strict=False))
    assert list(parse_mesh(format_mesh(sizes)).items()) == list(sizes.items())


def test_spaces_around_names_and_sizes_do_not_matter():
    assert parse_mesh(" data = 4 , model=2 ") == {"data": 4, "model": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor=2", "axes worker, data, fsdp, model, got 'tensor' in 'tensor=2'"),
        ("", "axes worker, data, fsdp, model, got ''"),
        ("data=2,", "axes worker, data, fsdp, model, got ''"),
        ("data=2,data=4", "axis 'data' comes twice in 'data=2,data=4'"),
        ("data", "axis 'data' needs a positive size, got ''"),
        ("data=0", "positive size, got '0'"),
        ("data=-1", "positive size, got '-1'"),
        ("data=2.0", "positive size, got '2.0'"),
        ("data=²", "positive size, got '²'"),
        ("data=2=3", "positive size, got '2=3'"),
        ("data:8", "got 'data:8'"),
    ],
)
def test_other_text_is_refused_with_what_is_legal(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit])
def test_the_last_axis_changes_fastest_over_the_first_devices(axis_types):
    mesh = make_mesh({"data": 3, "model": 2}, axis_types=axis_types)
    assert mesh.axis_names == ("data", "model")
    assert mesh.axis_types == (axis_types, axis_types)
    assert mesh.devices.tolist() == np.array(jax.devices()[:6]).reshape(3, 2).tolist()


def test_the_devices_may_be_given():
    chosen = jax.devices()[4:]
    assert make_mesh({"data": 4}, devices=chosen).devices.tolist() == chosen


def test_a_mesh_larger_than_the_devices_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"mesh data=4,model=4 needs 16 devices, and there are 8"):
        make_mesh({"data": 4, "model": 4})


def fake_devices(platform, count, **attributes):
    """Devices that are only described; four to a process unless said otherwise."""
    return [
        types.SimpleNamespace(
            platform=platform,
            id=i,
            process_index=i // 4,
            **{name: of(i) for name, of in attributes.items()},
        )
        for i in range(count)
    ]


def test_a_mesh_that_leaves_a_process_without_a_device_is_refused():
    with pytest.raises(ValueError, match=r"mesh data=4 leaves process 1 without .* 4 of 8"):
        make_mesh({"data": 4}, devices=fake_devices("cpu", 8))


def test_the_first_axis_must_divide_among_slices_of_a_tpu():
    devices = fake_devices("tpu", 8, slice_index=lambda i: i // 4)
    with pytest.raises(ValueError, match=r"over 2 slices must be a multiple of 2, got shape \(1, "):
        make_mesh({"data": 1, "model": 8}, devices=devices)
