"""`tiny-audio leaderboard add FOLDER`: add a line to one of the two leaderboards.

FOLDER is an evaluation on LoquaciousSet (outputs/eval_...), or the folder of a speedrun
(outputs/speedrun, from `make speedrun`). The lines are in docs/leaderboard.json and
docs/speedrun.json; the tables in docs/evaluate.md are generated from them. See CONTRIBUTING.md.
"""

import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

from ..errors import UserError
from . import parser_of

DATASET, SPLIT, MIN_SAMPLES = "speechbrain/LoquaciousSet", "test", 500
SPEEDRUN_WER = 10.0  # percent; the models of a speedrun must reach it on average
# The columns of each leaderboard; the first one ranks its lines.
COLUMNS = {
    "leaderboard": ("wer", "interval", "contributor", "model", "utterances", "git_hash", "date"),
    "speedrun": ("cpu_seconds", "wer", "contributor", "machine", "git_hash", "date"),
}


def refuse_if(folder: Path, reasons: dict[str, bool]) -> None:
    """Raise UserError if any reason holds; the error names those that do."""
    if holding := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(f"{folder} is refused: {'; '.join(holding)}")


def is_committed(git_hash: str) -> bool:
    """Whether a result of `hub.git_hash` names a commit without changes."""
    return git_hash.isalnum() and git_hash != "unknown"


def evaluation_entry(folder: Path) -> dict[str, Any]:
    """Make the entry of an evaluation; refuse it if it is not comparable to the others."""
    path = folder / "summary.json"
    s = json.loads(path.read_text()) if path.is_file() else {}
    if "dataset" not in s:
        raise UserError(f"{folder} holds no finished evaluation; create one with tiny-audio eval")
    split = s.get("source", {}).get("split")
    reasons = {
        f"it is not on {DATASET} {SPLIT}": (s["dataset"], split) != (DATASET, SPLIT),
        f"{s['errors']} clips failed": s["errors"] > 0,
        f"its WER is not of Whisper's English normaliser ({s['language']})": s["language"] != "en",
        f"{s['utterances']} samples, {MIN_SAMPLES} are needed": s["utterances"] < MIN_SAMPLES,
        f"its code {s['git_hash']} is not a commit": not is_committed(s["git_hash"]),
    }
    refuse_if(folder, reasons)
    interval = f"[{s['wer_low']:.2f}, {s['wer_high']:.2f}]"
    about = {key: s[key] for key in ("model", "utterances", "git_hash", "date")}
    return {"wer": round(s["wer"], 2), "interval": interval, **about}


def speedrun_entry(folder: Path, machine: str) -> dict[str, Any]:
    """Make the entry of a speedrun, a quickstart for each seed; refuse it if it does not count."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("seed*/summary.json"))]
    wer, codes = mean(run["wer"] for run in runs), {run["git_hash"] for run in runs}
    fresh = all("run.fresh=true" in run["command"] for run in runs)
    reasons = {
        "it needs three seeds": len({run["seed"] for run in runs}) < 3,
        f"its mean WER is {wer:.1f} %, above {SPEEDRUN_WER} %": wer > SPEEDRUN_WER,
        "clips failed": any(run["errors"] for run in runs),
        "a run may have been continued: start each with run.fresh=true": not fresh,
        "its code is not one commit": len(codes) > 1 or not all(map(is_committed, codes)),
    }
    refuse_if(folder, reasons)
    seconds = round(mean(run["train_cpu_seconds"] for run in runs))
    about = {"machine": machine, "git_hash": codes.pop(), "date": time.strftime("%Y-%m-%d")}
    return {"cpu_seconds": seconds, "wer": round(wer, 2), **about}


def table(board: str, entries: list[dict[str, Any]]) -> str:
    """Render the entries of a leaderboard as a Markdown table, best first."""
    columns = COLUMNS[board]
    lines = [["rank", *(c.replace("_", " ") for c in columns)], ["---"] * (len(columns) + 1)]
    for rank, entry in enumerate(sorted(entries, key=lambda e: e[columns[0]]), 1):
        lines.append([str(rank), *(str(entry[column]).replace("|", "\\|") for column in columns)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(argv: list[str] | None = None) -> int:
    """Add a line to a leaderboard and regenerate its table."""
    parser = parser_of("tiny-audio leaderboard", __doc__)
    parser.add_argument("action", choices=["add"])
    parser.add_argument("folder", type=Path, help="of tiny-audio eval, or of make speedrun")
    parser.add_argument("--contributor", required=True, metavar="NAME")
    parser.add_argument("--machine", default="not named", help="processor of a speedrun")
    args = parser.parse_args(argv)
    speedrun = any(args.folder.glob("seed*/summary.json"))
    board = "speedrun" if speedrun else "leaderboard"
    file, page = Path(f"docs/{board}.json"), Path("docs/evaluate.md")
    if not file.is_file():
        raise UserError(f"there is no {file}: run this in a clone of tiny-audio")
    new = speedrun_entry(args.folder, args.machine) if speedrun else evaluation_entry(args.folder)
    entries = [*json.loads(file.read_text()), {"contributor": args.contributor, **new}]
    begin, end = f"<!-- {board}:begin -->\n", f"<!-- {board}:end -->"
    before, rest = page.read_text().split(begin)
    file.write_text(json.dumps(entries, indent=2) + "\n")
    page.write_text(before + begin + table(board, entries) + end + rest.split(end)[1])
    print(table(board, entries))
    return 0
