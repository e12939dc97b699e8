"""`tiny-audio compare A B`: test which of two evaluations is better.

A and B are folders written by `tiny-audio eval` on the same data. Prints the difference of their
WER with a 95 % interval and a p-value (paired bootstrap over utterances), the number of wins and
losses, and the utterances that differ most.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.scoring import difference
from . import parser_of


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the scored rows of an evaluation, by id.

    Raises:
        UserError: if the folder holds no finished evaluation.
    """
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder} holds no finished evaluation; create one with tiny-audio eval")
    rows = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return {row["id"]: row for row in rows if "error" not in row}


def paired(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pair the rows of utterances that both evaluations scored.

    Raises:
        UserError: if the evaluations are not of the same data.
    """
    both = [(a[key], b[key]) for key in a if key in b]
    if not both or any(x["normalized"][0] != y["normalized"][0] for x, y in both):
        raise UserError("not evaluations of the same data: their ids or references differ")
    if unpaired := len(a) + len(b) - 2 * len(both):
        print(f"warning: ignoring {unpaired} utterances that only one of the two scored")
    return both


def compared(
    both: list[tuple[dict[str, Any], dict[str, Any]]],
) -> tuple[list[list[int]], list[float], tuple[float, float, float]]:
    """Word errors and WER in percent of each side, and `scoring.difference` of the two."""
    words = [x["words"] for x, _ in both]
    errors = [[pair[i]["word_errors"] for pair in both] for i in (0, 1)]
    wer = [100 * sum(wrong) / max(1, sum(words)) for wrong in errors]
    return errors, wer, difference(errors[0], errors[1], words)


def main(argv: list[str] | None = None) -> int:
    """Print the comparison."""
    parser = parser_of("tiny-audio compare", __doc__)
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="utterances; default: 10")
    args = parser.parse_args(argv)
    a, b = map(read_rows, args.folders)
    both = paired(a, b)
    errors, wer, (low, high, p) = compared(both)
    gaps = [theirs - ours for ours, theirs in zip(*errors, strict=True)]
    print(
        f"A      {wer[0]:6.2f} % WER  {args.folders[0]}\n"
        f"B      {wer[1]:6.2f} % WER  {args.folders[1]}\n"
        f"B - A  {wer[1] - wer[0]:+6.2f} [{low:+.2f}, {high:+.2f}], p {p:.4f}\n"
        f"{len(both)} utterances: B is better on {sum(gap < 0 for gap in gaps)}, worse on "
        f"{sum(gap > 0 for gap in gaps)}\n"
    )
    for i in sorted(range(len(both)), key=lambda i: -abs(gaps[i]))[: args.show]:
        x, y = both[i]
        print(f"{x['id']}  {gaps[i]:+d}\n  ref: {x['reference']}")
        print(f"  A:   {x['prediction']}\n  B:   {y['prediction']}\n")
    return 0
