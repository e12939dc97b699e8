"""`tiny-audio leaderboard add outputs/eval_...`: an evaluation's line in the README's table.

The lines are in docs/leaderboard.json, the table is made from it. See CONTRIBUTING.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..scoring import score
from .compare import read_rows

DATASET, SPLIT, MIN_SAMPLES = "speechbrain/LoquaciousSet", "test", 500
BEGIN, END = "<!-- leaderboard:begin -->\n", "<!-- leaderboard:end -->"
COLUMNS = ("contributor", "model", "samples", "commit", "date")


def entry(folder: Path, contributor: str) -> dict[str, Any]:
    """The line of one evaluation.

    Raises:
        ValueError: for an evaluation that cannot stand beside the others; says why.
    """
    rows = read_rows(folder).values()
    s = json.loads((folder / "summary.json").read_text())
    again = score([row["reference"] for row in rows], [row["prediction"] for row in rows])
    known = s["git_hash"].isalnum() and s["git_hash"] != "unknown"
    accepted = {
        f"it is not of {DATASET} {SPLIT}": (s["dataset"], s["source"]["split"]) == (DATASET, SPLIT),
        f"{s['errors']} clips failed": not s["errors"],
        f"{len(rows)} samples, {MIN_SAMPLES} are needed": len(rows) >= MIN_SAMPLES,
        f"its code, {s['git_hash']}, is no commit: commit, then evaluate": known,
        "its summary does not follow from its results": again["wer"] == s["wer"],
    }
    if reasons := [reason for reason, holds in accepted.items() if not holds]:
        raise ValueError(f"{folder} is refused: {'; '.join(reasons)}")
    values = (contributor, s["model"], len(rows), s["git_hash"], s["date"])
    figures = {key: round(s[key], 2) for key in ("wer", "wer_low", "wer_high")}
    return {**figures, **dict(zip(COLUMNS, values, strict=True))}


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown, best first; a quoted figure has no interval."""
    lines = [["rank", "WER %", *COLUMNS], ["---"] * (len(COLUMNS) + 2)]
    for rank, e in enumerate(sorted(entries, key=lambda e: e["wer"]), 1):
        span = f"[{e['wer_low']:.2f}, {e['wer_high']:.2f}]" if "wer_low" in e else "(quoted)"
        lines.append([str(rank), f"{e['wer']:.2f} {span}", *(str(e[key]) for key in COLUMNS)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(argv: list[str] | None = None) -> int:
    """Add a line and write the table anew; 2 is returned when the evaluation is refused."""
    parser = argparse.ArgumentParser(prog="tiny-audio leaderboard", description=__doc__)
    parser.add_argument("action", choices=["add"])
    parser.add_argument("folder", type=Path, help="what tiny-audio eval wrote")
    parser.add_argument("--contributor", help="default: git's user.name")
    args = parser.parse_args(argv)
    git = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True)
    file, readme = Path("docs/leaderboard.json"), Path("README.md")  # of the clone one stands in
    try:
        entries = json.loads(file.read_text())
        entries.append(entry(args.folder, args.contributor or git.stdout.strip() or "unknown"))
        before, rest = readme.read_text().split(BEGIN)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file.write_text(json.dumps(entries, indent=2) + "\n")
    readme.write_text(before + BEGIN + table(entries) + END + rest.split(END)[1])
    print(table(entries))
    return 0
