"""``python -m benchmarks.claims``: measures claims and appends one row for each."""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import _results
from benchmarks.claims import error_feedback, grams, quadratic, state_bytes, subset_norm
from benchmarks.claims.claim import Claim
from jaxopt_suite.core.errors import UserError

CLAIMS = {
    claim.name: claim
    for module in (quadratic, grams, subset_norm, state_bytes, error_feedback)
    for claim in module.CLAIMS
}
RESULTS = _results.RESULTS / "claims.json"


def measure(claim: Claim, *, quick: bool) -> dict[str, Any]:
    """Measures one claim; the row says whether it was the quick form."""
    quick = quick and not claim.immediate
    start = time.perf_counter()
    outcome = claim.measure(quick)
    command = f"python -m benchmarks.claims {claim.name}{' --quick' if quick else ''}"
    return {
        "name": claim.name,
        "claim": claim.claim,
        "source": claim.source,
        "how": claim.how,
        "figure": outcome.figure,
        "verdict": outcome.verdict,
        "quick": quick,
        "seconds": round(time.perf_counter() - start, 1),
        "numbers": outcome.numbers,
        **_results.stamp(command),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 whatever the verdicts are, 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; rows are marked as such"
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="file to append to")
    options = parser.parse_args(arguments)
    try:
        for name in _choose(options.names):
            row = measure(CLAIMS[name], quick=options.quick)
            _results.append(options.results, row)
            print(f"{row['claim']}\n  {row['figure']}\n  {row['verdict']}, {row['seconds']} s\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _choose(names: Sequence[str]) -> Sequence[str]:
    _results.check_names("claim", names, CLAIMS)
    return names or list(CLAIMS)


if __name__ == "__main__":
    sys.exit(main())
