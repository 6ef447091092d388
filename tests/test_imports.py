"""Who may import whom, and what an import must not do: start a backend, read settings, wait."""

import ast
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "jaxopt_suite"
NOT_PACKAGED = ("benchmarks", "tests")

# docs/design.md draws the same arrows. A new part adds one line here and one there.
MAY_IMPORT = {
    "": set(),
    "core": {"core"},
    "testing": {"core", "testing"},
    "kernels": {"core", "kernels"},
    "optimizers": {"core", "kernels", "optimizers"},
    "parallel": {"core", "parallel"},
    "scaling_laws": {"core", "scaling_laws"},
    "experiments": {"core", "testing", "optimizers", "parallel", "scaling_laws", "experiments"},
    "cli": {"core", "testing", "optimizers", "parallel", "scaling_laws", "experiments", "cli"},
}
# Slow to import, and of no use to somebody who chains transformations.
HEAVY = {"matplotlib", "tyro", "rich", "grain", "orbax", "pandas", "pyarrow", "scipy"}
HEAVY_PARTS = {"experiments", "cli"}
LATE = {"scaling_laws": {"matplotlib", "pandas", "pyarrow"}}  # inside the functions that need them

NETWORK = {"socket", "urllib", "http", "requests", "ftplib", "smtplib"}
USES_THE_NETWORK = {"jaxopt_suite.parallel.roll_call"}  # how the processes of a run find each other
STARTS_A_BACKEND = (
    "jax.devices",
    "jax.local_devices",
    "jax.device_count",
    "jax.local_device_count",
    "jax.process_index",
    "jax.process_count",
    "jax.default_backend",
    "jax.device_put",
    "jax.random.",
    "jax.make_mesh",
    "jnp.array",
    "jnp.asarray",
    "jnp.zeros",
    "jnp.ones",
    "jnp.full",
    "jnp.arange",
    "jnp.eye",
)
READS_THE_ENVIRONMENT = ("os.environ", "os.getenv")


def _sources() -> dict[str, pathlib.Path]:
    """Every source file of the distribution by dotted module name."""
    roots = {PACKAGE: ROOT / PACKAGE}
    for folder in ROOT.iterdir():
        if (folder / "__init__.py").is_file() and folder.name not in (
            PACKAGE,
            "benchmarks",
            "tests",
        ):
            roots[f"{PACKAGE}.{folder.name}"] = folder
    found = {}
    for prefix, folder in roots.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return found


SOURCES = _sources()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in SOURCES.items()}


def _part(module: str) -> str:
    """``jaxopt_suite.core.trees`` -> ``core``; the root package itself is the empty string."""
    return module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]


def _imported(module: str) -> Iterator[str]:
    """Dotted names of everything a module imports, at its top or inside a function."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively: name the package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that are executed when the module is imported: not the bodies of functions."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.Lambda):
            waiting += [d for d in (*node.args.defaults, *node.args.kw_defaults) if d]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [d for d in (*node.args.defaults, *node.args.kw_defaults) if d]
            waiting += node.decorator_list
        else:
            waiting += ast.iter_child_nodes(node)


def _python(code: str, **env: str) -> str:
    """What a fresh interpreter prints for ``code``, with none of the settings of the test suite."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_part_has_its_line_in_the_table_of_import_directions():
    assert {_part(module) for module in SOURCES} == set(MAY_IMPORT)


def _target(name: str) -> str:
    """The part that an imported name of ours lies in; empty for a name of the root package."""
    part = _part(name)
    return part if f"{PACKAGE}.{part}" in SOURCES else ""


def test_imports_point_in_the_allowed_direction():
    wrong = [
        f"{module} imports {name}"
        for module in SOURCES
        for name in _imported(module)
        if name.partition(".")[0] in NOT_PACKAGED
        or (name.startswith(PACKAGE) and _target(name) not in MAY_IMPORT[_part(module)] | {""})
    ]
    assert wrong == []


def test_heavy_libraries_are_imported_by_experiments_and_commands_only():
    wrong = [
        f"{module} imports {name}"
        for module in SOURCES
        for name in _imported(module)
        if _part(module) not in HEAVY_PARTS
        and name.partition(".")[0] in HEAVY - LATE.get(_part(module), set())
    ]
    assert wrong == []


def test_no_module_imports_a_network_library():
    wrong = [
        f"{module} imports {name}"
        for module in SOURCES.keys() - USES_THE_NETWORK
        for name in _imported(module)
        if name.partition(".")[0] in NETWORK
    ]
    assert wrong == []


def _forbidden_at_import(tree: ast.Module) -> list[str]:
    """What a module does while it is imported and must not: reads of the environment, devices."""
    found = []
    for node in _run_at_import(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(STARTS_A_BACKEND):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.expr) and ast.unparse(node) in READS_THE_ENVIRONMENT:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_no_module_reads_the_environment_or_asks_for_devices_while_it_is_imported():
    wrong = {module: _forbidden_at_import(tree) for module, tree in TREES.items()}
    assert {module: found for module, found in wrong.items() if found} == {}


def test_what_only_runs_when_called_is_no_work_at_import():
    tree = ast.parse(
        "import os, jax\n"
        "def f(x=os.environ['HOME']): return jax.devices()\n"
        "y = jax.devices()\n"
        "g = lambda: os.getenv('HOME')\n"
    )
    found = sorted(_forbidden_at_import(tree))
    assert found == ["line 2: os.environ", "line 3: jax.devices()"]


def test_importing_every_module_starts_no_backend_and_opens_no_connection():
    """With a platform that does not exist, whatever starts a backend raises."""
    _python(
        f"""
import importlib, sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"{{event}} {{args}}")

sys.addaudithook(refuse)
for name in {sorted(SOURCES)!r}:
    if not name.endswith("__main__"):
        importlib.import_module(name)
import jax
try:
    jax.devices()
except RuntimeError:
    sys.exit(0)
sys.exit("the platform was expected not to exist")
""",
        JAX_PLATFORMS="nonexistent",
    )


def test_the_light_parts_leave_the_heavy_libraries_alone():
    light = sorted(m for m in SOURCES if _part(m) not in HEAVY_PARTS)
    loaded = json.loads(
        _python(
            "import importlib, json, sys\n"
            f"for name in {light!r}: importlib.import_module(name)\n"
            f"print(json.dumps(sorted(set(sys.modules) & {HEAVY!r})))"
        )
    )
    assert loaded == []


def test_optimizers_leave_pallas_alone_until_a_kernel_is_asked_for():
    """A tenth of what importing them would cost; by default nothing uses a kernel."""
    loaded = _python(
        "import sys, jaxopt_suite.optimizers as o; assert o.shampoo and o.compressors\n"
        "print([name for name in sys.modules if name.startswith('jax.experimental.pallas')])"
    )
    assert loaded.strip() == "[]"


def test_importing_the_package_costs_no_more_than_its_libraries():
    """Processor time, by turns. Other work on the machine can only add to it, and at times adds a
    half: of many runs the least counts, and more are made until both have had a quiet one."""
    ours, libraries = "jaxopt_suite, jaxopt_suite.optimizers", "jax, optax, flax.nnx"
    timed = "import time\nimport {}\nprint(time.process_time())"
    seconds: dict[str, list[float]] = {ours: [], libraries: []}
    # 10 % is the promise; optimizers do not need flax, so in practice ours is the cheaper one.
    kept = lambda: min(seconds[ours]) <= 1.1 * min(seconds[libraries])
    for runs in range(10):
        if runs >= 3 and kept():
            break
        for modules, spent in seconds.items():
            spent.append(float(_python(timed.format(modules))))
    assert kept(), seconds
