"""``jaxopt-suite plan``: what it prints and writes, and what it says when it cannot."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from jaxopt_suite.cli import plan
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import plans
from jaxopt_suite.experiments.plan_config import PlanConfig
from jaxopt_suite.parallel import topologies
from jaxopt_suite.parallel.chips import CHIPS
from jaxopt_suite.parallel.topologies import Topology


@pytest.fixture
def on_cpu(monkeypatch):
    """Plans are made for the tests' CPU devices, and this process keeps its settings."""
    pod = Topology("cpu:1x1x8", CHIPS["h100"], (1, 1, 8), tuple(jax.devices()))
    make = plans.make_plans
    monkeypatch.setattr(plans, "make_plans", lambda config: make(config, topology=pod))
    monkeypatch.setattr(plan, "prepare_process", lambda: None)


def test_the_tables_the_figures_and_the_constraint_are_printed_and_the_files_written(
    on_cpu, tmp_path, capsys
):
    config = PlanConfig(
        topology="cpu:1x1x8",
        mesh="data=8",
        preset="nano",
        seq_len=16,
        compare="adamw,lion",
        json=str(tmp_path / "plan.json"),
        html=str(tmp_path / "plan.html"),
    )
    assert plan.run(config) == 0
    printed = capsys.readouterr().out
    for text in ("nano on cpu:1x1x8, mesh data=8", "optimizer state", "adamw: Bound by", "lion: "):
        assert text in printed
    assert all(source in printed for source in CHIPS["h100"].sources)
    content = json.loads((tmp_path / "plan.json").read_text())
    assert list(content["plans"]) == ["adamw", "lion"]
    assert content["command"].startswith("jaxopt-suite plan --mesh data=8 --topology cpu:1x1x8")
    assert (tmp_path / "plan.html").read_text().startswith("<!DOCTYPE html>")


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_compiled(tmp_path):
    config = PlanConfig(topology="v5e:2x2", mesh="data=4", json=str(tmp_path / "no" / "plan.json"))
    with pytest.raises(UserError, match="there is no folder"):
        plan.run(config)


def test_the_process_is_set_up_without_overruling_the_user(monkeypatch):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    for name in topologies.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_WORKER_ID", "3")
    plan.prepare_process()
    assert updates == {"jax_platforms": "cpu"}
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    assert os.environ["TPU_WORKER_ID"] == "3"
    for name in topologies.SETTINGS:
        monkeypatch.delenv(name)  # undone at the end: nothing of this outlives the test


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_one_line_says_which_extra_to_install():
    code = (
        "from jaxopt_suite.cli import plan\n"
        "from jaxopt_suite.core.errors import UserError\n"
        "from jaxopt_suite.experiments.plan_config import PlanConfig\n"
        "try: plan.run(PlanConfig(topology='v5e:2x2', mesh='data=4'))\n"
        "except UserError as error: print(f'error: {error}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stdout.strip().splitlines()
    assert line.startswith("error: ")
    assert line.endswith("pip install 'jaxopt-suite[tpu-aot]'")
