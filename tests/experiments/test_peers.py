"""What processes tell one another: every one hears the same, errors included."""

import json
import pathlib
from typing import Any

import pytest
from several_processes import run_all

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.peers import Peers
from jaxopt_suite.parallel.roll_call import free_port

CODE = """
import json, sys
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.logs import RunFolder
from jaxopt_suite.experiments.peers import Peers
from jaxopt_suite.parallel.processes import initialize
initialize(sys.argv[1], 2, int(sys.argv[2]), timeout=40, local_device_count=2)
peers, path = Peers.of_this_run(), sys.argv[3]

def caught(call):
    try:
        return call()
    except Exception as error:
        return [type(error).__name__, str(error)]

def fail(error):
    raise error
"""


def told(code: str, path: pathlib.Path) -> list[Any]:
    """What ``code`` makes of ``say``, the same on both processes."""
    address = f"localhost:{free_port()}"
    code = f"{CODE}{code}\nprint(json.dumps(say))"
    ended = run_all(*(["-c", code, address, str(index), str(path)] for index in range(2)))
    for process in ended:
        assert process.status == 0, process.err
    said = [json.loads(process.out.splitlines()[-1]) for process in ended]
    assert said[0] == said[1]
    return said[0]


def test_everyone_hears_what_everyone_says_in_order(tmp_path: pathlib.Path) -> None:
    code = """
say = [
    peers.gather(None), peers.gather({"i": peers.index}), peers.gather("é" * 1000 * peers.index),
    peers.any(False), peers.any(peers.index == 1),
]
"""
    assert told(code, tmp_path) == [
        [None, None],
        [{"i": 0}, {"i": 1}],
        ["", "é" * 1000],
        False,
        True,
    ]


def test_everyone_gets_what_the_first_one_made_or_its_error(tmp_path: pathlib.Path) -> None:
    code = """
say = [
    peers.from_first(lambda: ["of", peers.index]),
    *(caught(lambda: peers.from_first(lambda: fail(error))) for error in (
        UserError("a"), ValueError("b"), TypeError("c"), FileNotFoundError(2, "d"))),
]
if peers.index == 0:
    say[-1][0] = "OSError"  # the first one's own is the one that was raised
"""
    made, *errors = told(code, tmp_path)
    assert made == ["of", 0]
    assert [kind for kind, _ in errors] == ["UserError", "ValueError", "TypeError", "OSError"]


def test_a_run_folder_is_written_once_and_read_alike_by_all(tmp_path: pathlib.Path) -> None:
    code = """
run = RunFolder(path, peers)
say = [run.create_or_open({"seed": 1})]
for step in range(3):
    run.append({"step": step, "by": peers.index})
run.truncate_to(1)
say += [run.read(), run.create_or_open({"seed": 1})]
say += [caught(lambda: run.create_or_open({"seed": 2}))[0]]
"""
    records = [{"step": step, "by": 0} for step in range(2)]
    assert told(code, tmp_path) == ["new", records, "existing", "UserError"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_one_process_alone_talks_to_itself() -> None:
    alone = Peers()
    assert alone.gather({1, 2}) == [{1, 2}]  # not even through JSON
    assert alone.from_first(lambda: 3) == 3
    assert alone.any([0])
    with pytest.raises(UserError, match="mine"):
        alone.from_first(lambda: (_ for _ in ()).throw(UserError("mine")))
    assert Peers.of_this_run() == alone
