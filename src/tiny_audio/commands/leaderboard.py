"""`tiny-audio leaderboard add outputs/eval_...`: add an evaluation to the leaderboard.

docs/leaderboard.json holds the entries; the table in docs/evaluate.md is generated from it. See
CONTRIBUTING.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

from . import parser_of

DATASET, SPLIT, MIN_SAMPLES = "speechbrain/LoquaciousSet", "test", 500
BEGIN, END = "<!-- leaderboard:begin -->\n", "<!-- leaderboard:end -->"
COLUMNS = ("contributor", "model", "utterances", "git_hash", "date")


def entry(folder: Path, contributor: str) -> dict[str, Any]:
    """Make the leaderboard entry of one evaluation.

    Raises:
        SystemExit: if the evaluation is not comparable to the others; says why.
    """
    if not (folder / "summary.json").is_file():
        sys.exit(f"error: {folder} holds no finished evaluation; create one with tiny-audio eval")
    s = json.loads((folder / "summary.json").read_text())
    committed = s["git_hash"].isalnum() and s["git_hash"] != "unknown"
    wanted = {
        f"it is not on {DATASET} {SPLIT}": (s["dataset"], s["source"]["split"]) == (DATASET, SPLIT),
        f"{s['errors']} clips failed": not s["errors"],
        f"{s['utterances']} samples, {MIN_SAMPLES} are needed": s["utterances"] >= MIN_SAMPLES,
        f"its code {s['git_hash']} is not committed: commit, then evaluate": committed,
    }
    if reasons := [reason for reason, holds in wanted.items() if not holds]:
        sys.exit(f"error: {folder} is refused: {'; '.join(reasons)}")
    keys = ("wer", "wer_low", "wer_high", *COLUMNS[1:])
    return {"contributor": contributor, **{key: s[key] for key in keys}}


def table(entries: list[dict[str, Any]]) -> str:
    """Render entries as a Markdown table, best first; quoted figures have no interval."""
    lines = [["rank", "WER %", *COLUMNS], ["---"] * (len(COLUMNS) + 2)]
    for rank, e in enumerate(sorted(entries, key=lambda e: e["wer"]), 1):
        span = f"[{e['wer_low']:.2f}, {e['wer_high']:.2f}]" if "wer_low" in e else "(quoted)"
        lines.append([str(rank), f"{e['wer']:.2f} {span}", *(str(e[key]) for key in COLUMNS)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(argv: list[str] | None = None) -> int:
    """Add an entry to docs/leaderboard.json and regenerate the table."""
    parser = parser_of("leaderboard", __doc__)
    parser.add_argument("action", choices=["add"])
    parser.add_argument("folder", type=Path, help="written by tiny-audio eval")
    parser.add_argument("--contributor", required=True, metavar="NAME")
    args = parser.parse_args(argv)
    file, page = Path("docs/leaderboard.json"), Path("docs/evaluate.md")
    if not file.is_file():
        sys.exit(f"error: there is no {file}: run this in a clone of tiny-audio")
    entries = [*json.loads(file.read_text()), entry(args.folder, args.contributor)]
    before, rest = page.read_text().split(BEGIN)
    file.write_text(json.dumps(entries, indent=2) + "\n")
    page.write_text(before + BEGIN + table(entries) + END + rest.split(END)[1])
    print(table(entries))
    return 0
