"""From a configuration to a mesh: which devices there are, and what cannot be made of them."""

import subprocess
import sys

import jax
import pytest
from several_processes import clean_env

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import assembly
from jaxopt_suite.experiments.config import LayoutConfig, TrainConfig


def count_devices(mesh: str, *, started: bool = False, **env: str) -> int:
    """CPU devices of a new Python that was told to provide those of ``mesh``."""
    program = (
        "import jax\n"
        f"{'jax.devices()' if started else ''}\n"
        "from jaxopt_suite.experiments import assembly, config\n"
        f"assembly.provide_cpu_devices(config.LayoutConfig(mesh={mesh!r}))\n"
        "print(jax.device_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean_env(**env), capture_output=True, check=True
    )
    return int(done.stdout)


def test_the_cpu_becomes_as_many_devices_as_the_mesh_has():
    assert count_devices("data=3,model=2") == 6


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"JAX_NUM_CPU_DEVICES": "2"}, 2),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3),
    ],
)
def test_a_number_that_the_user_has_set_stays(env, expected):
    assert count_devices("data=6", **env) == expected


def test_once_jax_has_started_the_devices_are_what_they_are():
    assert count_devices("data=6", started=True) == 1


def test_the_mesh_is_the_one_of_the_option_and_none_without():
    mesh = assembly.build_mesh(LayoutConfig(mesh=" model=2, data=4"))
    assert dict(mesh.shape) == {"model": 2, "data": 4}
    assert assembly.build_mesh(LayoutConfig()) is None


def test_several_processes_share_the_batch_if_nothing_else_is_said(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert dict(assembly.build_mesh(LayoutConfig()).shape) == {"data": 8}


def test_what_cannot_be_is_refused_by_option():
    with pytest.raises(UserError, match="--mesh: mesh data=16 needs 16 devices"):
        assembly.build_mesh(LayoutConfig(mesh="data=16"))
    with pytest.raises(UserError, match="--mesh data=2,data=4: axis 'data' comes twice"):
        assembly.mesh_sizes(LayoutConfig(mesh="data=2,data=4"))
    with pytest.raises(UserError, match=r"--preset must be one of nano, .*got 'giant'"):
        assembly.find_preset("giant")


def test_the_abstract_model_is_computed_as_the_config_says():
    sizes = assembly.find_preset("nano")
    options = {"dtype": "bfloat16", "scan_layers": True, "remat": True}
    module_options = assembly.model_options(TrainConfig(**options))
    assert module_options == options
    plain, _ = assembly.abstract_model(sizes, TrainConfig())
    assert assembly.abstract_model(sizes, TrainConfig(**options))[0] != plain
