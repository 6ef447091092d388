"""The five ways to have the package, and what a wheel holds.

Every environment here is made on the spot and sees the libraries of the one that runs the tests,
but not this project, however that one has it: so nothing is downloaded.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_PACKAGED = ("benchmarks", "tests")  # root folders of Python that stay out of a wheel
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]

USE = """
import json
import jaxopt_suite
import jaxopt_suite.optimizers
import jaxopt_suite.experiments.config
print(json.dumps([jaxopt_suite.__file__, jaxopt_suite.optimizers.__file__]))
"""


def _source_packages() -> dict[str, pathlib.Path]:
    """Every package of the tree by the dotted name it must have once installed."""
    roots = {"jaxopt_suite": ROOT / "jaxopt_suite"}
    for folder in ROOT.iterdir():
        if (folder / "__init__.py").is_file() and folder.name not in (
            "jaxopt_suite",
            *NOT_PACKAGED,
        ):
            roots[f"jaxopt_suite.{folder.name}"] = folder
    return {
        ".".join([name, *init.parent.relative_to(folder).parts]): init.parent
        for name, folder in roots.items()
        for init in folder.rglob("__init__.py")
    }


def _run(*command: object, cwd: pathlib.Path, **env: str) -> str:
    """Runs a command with none of the settings that would let it see this checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**kept, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Environment:
    """A throw-away virtual environment, a clone of its own, and an empty folder to stand in."""

    folder: pathlib.Path

    @property
    def clone(self) -> pathlib.Path:
        return self.folder / "clone"

    @property
    def elsewhere(self) -> pathlib.Path:
        return self.folder / "elsewhere"

    @property
    def site(self) -> pathlib.Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "venv" / "lib" / version / "site-packages"

    def pip(self, *arguments: object) -> None:
        """Runs the testing environment's pip on this environment, without network or isolation."""
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        build = ("--no-deps", "--no-index", "--no-build-isolation")
        command, *rest = arguments
        _run(*pip, "--python", self.python, command, *build, *rest, cwd=self.elsewhere)

    @property
    def python(self) -> pathlib.Path:
        return self.folder / "venv" / "bin" / "python"

    def use(self, cwd: pathlib.Path, **env: str) -> list[pathlib.Path]:
        """Imports the package from ``cwd``; returns the folders it and its optimizers came from."""
        files = json.loads(_run(self.python, "-c", USE, cwd=cwd, JAX_PLATFORMS="cpu", **env))
        return [pathlib.Path(file).parent for file in files]

    def command(self, cwd: pathlib.Path) -> str:
        """What ``jaxopt-suite --version`` prints."""
        return _run(self.python.parent / "jaxopt-suite", "--version", cwd=cwd, JAX_PLATFORMS="cpu")


def _link_libraries(target: pathlib.Path) -> None:
    """Fills ``target`` with links to the installed libraries, leaving this project out."""
    target.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in pathlib.Path(place).iterdir():
            if not entry.name.startswith(("jaxopt_suite", "__editable__", "__pycache__")):
                (target / entry.name).symlink_to(entry)


@pytest.fixture
def environment(tmp_path):
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or newer beside the tests: pip install -e '.[dev]'")
    env = Environment(tmp_path)
    env.elsewhere.mkdir()
    env.clone.mkdir()
    for entry in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / entry, env.clone)
    for folder in ROOT.iterdir():
        if (folder / "__init__.py").is_file() or folder.name in NOT_PACKAGED:
            ignore = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(folder, env.clone / folder.name, ignore=ignore)
    venv.create(tmp_path / "venv", symlinks=True)
    _link_libraries(tmp_path / "libraries")
    # A plain path, named to come last: the .pth files of the linked environment are not followed.
    (env.site / "zz_libraries.pth").write_text(str(tmp_path / "libraries"))
    return env


def test_the_list_of_packages_is_the_tree():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(_source_packages())


def test_every_root_folder_is_mapped_to_its_subpackage():
    roots = {n: p for n, p in _source_packages().items() if p.parent == ROOT}
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapping == {name: str(path.relative_to(ROOT)) for name, path in roots.items()}


def test_the_version_is_the_same_everywhere():
    import jaxopt_suite

    assert jaxopt_suite.__version__ == VERSION
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("options", [(), ("--config-settings", "editable_mode=strict")])
def test_editable_installs_use_the_clone(environment, options):
    environment.pip("install", *options, "--editable", environment.clone)
    package, optimizers = environment.use(environment.elsewhere)
    assert VERSION in environment.command(environment.elsewhere)
    # The strict mode imports links, kept in the clone's build folder, to the clone's files.
    assert environment.clone in package.parents
    assert environment.clone in optimizers.parents
    source = environment.clone / "optimizers" / "__init__.py"
    assert (optimizers / "__init__.py").samefile(source)


def test_a_plain_install_works_from_elsewhere_and_from_the_root_of_the_clone(environment):
    environment.pip("install", environment.clone)
    site = environment.site / "jaxopt_suite"
    assert environment.use(environment.elsewhere) == [site, site / "optimizers"]
    # From the clone's root the clone shadows the install, and must do so entirely, not by halves.
    clone = environment.clone
    assert environment.use(clone) == [clone / "jaxopt_suite", clone / "optimizers"]
    assert VERSION in environment.command(environment.elsewhere)
    assert VERSION in environment.command(clone)


def test_a_clone_on_the_path_needs_no_install(environment):
    clone = environment.clone
    found = environment.use(environment.elsewhere, PYTHONPATH=str(clone))
    assert found == [clone / "jaxopt_suite", clone / "optimizers"]


def test_a_wheel_is_complete_and_works_after_the_clone_is_deleted(environment):
    environment.pip("wheel", "--wheel-dir", environment.folder, environment.clone)
    (wheel,) = environment.folder.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in _source_packages().items()
        for path in folder.glob("*.py")
    }
    assert expected | {"jaxopt_suite/py.typed"} == {f for f in held if ".dist-info/" not in f}

    shutil.rmtree(environment.clone)
    environment.pip("install", wheel)
    environment.use(environment.elsewhere)
    assert VERSION in environment.command(environment.elsewhere)
