"""``python -m benchmarks.parity METHOD --reference PATH``: measures, prints and appends one row."""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import _results
from benchmarks.parity import (
    adam_snsm,
    adamw_8bit,
    compare,
    demo,
    diloco,
    grams,
    onebit_adam,
    powersgd,
    reference,
    roots,
    shampoo,
    soap,
    subset_norm,
    subspace_momentum,
)
from benchmarks.parity.compare import Case, Departure, Method
from jaxopt_suite.core.errors import UserError

METHODS = {
    module.METHOD.name: module.METHOD
    for module in (
        grams,
        subset_norm,
        subspace_momentum,
        adam_snsm,
        demo,
        onebit_adam,
        powersgd,
        roots,
        shampoo,
        soap,
        adamw_8bit,
        diloco,
    )
}
RESULTS = _results.RESULTS / "parity.json"


def measure(method: Method, path: pathlib.Path, given_repository: str | None) -> dict[str, Any]:
    """Runs every case and every departure of a method.

    Raises:
      UserError: if ``path`` is not the reference, or what it needs is not installed.
    """
    commit = reference.check(method, path)
    repository = reference.repository(method, path, given_repository)
    official = reference.load(method, path)
    with reference.quiet():  # the official code prints while it steps, too
        cases, departures = method.build(official)
        measured = [_measure_case(case) for case in cases]
        named = [_measure_departure(departure) for departure in departures]
    first, *_ = cases[0].gradients()
    return {
        "method": method.name,
        "repository": repository,
        "commit": commit,
        "steps": len(cases[0].gradients()),
        "shapes": {name: list(g.shape) for name, g in first.items()},
        "dtype": str(next(iter(first.values())).dtype),
        "largest_relative_difference": max(
            max(case["updates"], case["parameters"]) for case in measured
        ),
        "limit": max(case["limit"] for case in measured),
        "cases": measured,
        "departures": named,
        **_results.stamp(
            f"python -m benchmarks.parity {method.name} --reference PATH",
            packages=("jax", "optax", "torch"),
        ),
    }


def _measure_case(case: Case) -> dict[str, Any]:
    updates = compare.difference_of_updates(case)
    parameters = compare.difference_of_parameters(case, weight_decay=case.weight_decay)
    return {
        "case": case.name,
        "settings": dict(case.settings),
        "weight_decay": case.weight_decay,
        "limit": case.limit,
        "updates": updates.value,
        "worst_update": f"{updates.leaf}, step {updates.step}",
        "parameters": parameters.value,
        "worst_parameter": parameters.leaf,
    }


def _measure_departure(departure: Departure) -> dict[str, Any]:
    value = None if departure.measure is None else departure.measure()
    return {"departure": departure.sentence, "difference": value}


def _show(row: dict[str, Any]) -> None:
    print(f"{row['method']} against {row['repository']} at {row['commit'][:12]}")
    for case in row["cases"]:
        print(
            f"  {case['case']:40s} updates {case['updates']:.1e} ({case['worst_update']}), "
            f"parameters {case['parameters']:.1e} ({case['worst_parameter']})"
        )
    for named in row["departures"]:
        figure = "not run" if named["difference"] is None else f"{named['difference']:.1e}"
        print(f"  departure, {figure}: {named['departure']}")
    largest = row["largest_relative_difference"]
    print(f"largest relative difference {largest:.1e}, limit {row['limit']:g}")


def _within_limits(row: dict[str, Any]) -> bool:
    return all(max(case["updates"], case["parameters"]) < case["limit"] for case in row["cases"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if both sides agree to the limit, 1 if not, 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument(
        "--reference", type=pathlib.Path, required=True, help="a clone of the official repository"
    )
    parser.add_argument("--repository", help="owner/name, if the clone's remote does not say")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="file to append to")
    options = parser.parse_args(arguments)
    try:
        row = measure(METHODS[options.method], options.reference, options.repository)
        _show(row)
        _results.append(options.results, row)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if _within_limits(row) else 1


if __name__ == "__main__":
    sys.exit(main())
