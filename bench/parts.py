"""Run measurements as parts, each in its own process with a time limit.

A part is a function that yields rows (dicts of numbers and strings). Rows are saved as they come:
if a part fails or hangs, the rows before that are kept.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from tiny_audio.hub import git_hash
from tiny_audio.training.checks import read_log

Row = dict[str, Any]


@dataclass
class Part:
    """A measurement.

    Attributes:
        measure: yields the rows; gets the arguments of `run_here`.
        limit: time limit in seconds.
        note: a sentence for the report.
    """

    measure: Callable[..., Iterator[Row]]
    limit: float
    note: str = ""


def machine() -> Row:
    """Date, device, driver and versions."""
    found: Row = {"date": str(date.today()), "git": git_hash(), "python": sys.version.split()[0]}
    names = "torch transformers peft accelerate".split()
    found |= {d.name: d.version for d in distributions() if d.name.replace("_", "-") in names}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def run_part(command: Sequence[str], rows: Path, log: Path, limit: float) -> Row:
    """Run a command that appends the rows of a part to the file `rows`.

    Returns `status` ("ok" or the kind of failure), `seconds` and `rows`.
    """
    rows.unlink(missing_ok=True)
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(rows.parent / "hf"), "PYTHONUNBUFFERED": "1"}
    quiet |= {"TOKENIZERS_PARALLELISM": "false", "TINY_AUDIO_TRACEBACK": "1"}
    started, status = time.monotonic(), "ok"
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True,
                                   env={**os.environ, **quiet})  # fmt: skip
        try:
            if code := process.wait(limit):
                status = f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after its limit of {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # also kill processes that the part started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"status": status, "seconds": time.monotonic() - started, "rows": read_log(rows)}


def run_all(
    parts: dict[str, Part], names: Sequence[str], out: Path, work: Path, options: Row
) -> int:
    """Run parts one after another; write `gpu.json` and `gpu.md` after each.

    Args:
        parts: all parts by name.
        names: names of the parts to run; those that are done are skipped.
        out: folder of the report and the log.
        work: scratch folder of the parts.
        options: options of the parts, passed to their processes in a JSON file.

    Returns:
        The exit code: 1 if a part failed, otherwise 0.
    """
    file, settings = out / "gpu.json", work / "options.json"
    out.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(options))
    done = json.loads(file.read_text())["parts"] if file.exists() else {}
    results = {"machine": machine(), "options": options, "parts": done}
    for name in names:
        if done.get(name, {}).get("status") == "ok":
            print(f"{name}: already done, skipped", flush=True)
            continue
        print(f"{name} ...", flush=True)
        with (out / "gpu.log").open("a") as log:
            log.write(f"\n== {name}\n")
        command = [sys.executable, str(Path(sys.argv[0]).resolve()), "--run", name, str(settings)]
        limit = options["limit"] or parts[name].limit
        done[name] = run_part(command, work / f"{name}.jsonl", out / "gpu.log", limit)
        file.write_text(json.dumps(results, indent=1) + "\n")
        (out / "gpu.md").write_text(markdown(results, parts))
    print(markdown(results, parts))
    return int(any(part["status"] != "ok" for part in done.values()))


def run_here(part: Part, rows: Path, *arguments: Any) -> int:
    """Run a part in this process and append each row to the file `rows`."""
    for row in part.measure(*arguments):
        print(row, flush=True)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


def markdown(results: Row, parts: dict[str, Part]) -> str:
    """Render the report in Markdown, with a table for each part."""
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = [f"# {results['machine']['device']}", "", about]
    for name, part in results["parts"].items():
        lines += ["", f"## {name}: {part['status']}, {part['seconds']:.0f} s"]
        lines += ["", parts[name].note, ""]
        columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
        cells = [[cell(row.get(key, "")) for key in columns] for row in part["rows"]]
        table = [columns, ["---"] * len(columns), *cells] if columns else []
        lines += [f"| {' | '.join(row)} |" for row in table]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """Format a value for a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
