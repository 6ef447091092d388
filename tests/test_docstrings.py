"""Every example in a docstring runs, and prints what is printed below it."""

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = {"jaxopt_suite": "", "optimizers": "optimizers", "parallel": "parallel"}
FOLDERS["scaling_laws"] = "scaling_laws"


def modules():
    """Names of the modules with examples in them; all others need not be imported."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                yield ".".join(("jaxopt_suite", *([package] if package else []), *parts))


@pytest.mark.parametrize("name", list(modules()))
def test_examples_print_what_stands_below_them(name):
    module = importlib.import_module(name)
    found = [test for test in doctest.DocTestFinder().find(module, name) if test.examples]
    assert found, f"{name} has '>>> ' somewhere, and no docstring with an example"
    runner = doctest.DocTestRunner()
    shown = []
    for test in found:
        runner.run(test, out=shown.append)
    assert runner.failures == 0, "".join(shown)
