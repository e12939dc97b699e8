"""Write report.html: one page that shows and plays the errors of an evaluation."""

import base64
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from jinja2 import Template

from ..asr.asr_audio import SAMPLE_RATE, load_audio
from .scoring import align, interval

CLIPS, MAX_SECONDS = 50, 60  # number of worst clips shown; longest clip with a player
GROUPS = 8  # points in a plot


def mp3(audio: Any) -> str:
    """Encode audio as MP3 of 48 kbit/s, in base64."""
    frame = av.AudioFrame.from_ndarray(load_audio(audio)[None], format="fltp", layout="mono")
    frame.sample_rate = SAMPLE_RATE
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3") as out:
        stream = out.add_stream("libmp3lame", SAMPLE_RATE, bit_rate=48_000, layout="mono")
        out.mux([*stream.encode(frame), *stream.encode(None)])
    return base64.b64encode(buffer.getvalue()).decode()


def points(rows: list[dict[str, Any]], key: Callable[[dict], float]) -> list[tuple[float, ...]]:
    """Sort rows by `key` into groups of equal size; summarise each as a point.

    Returns (median of `key`, WER, lower and upper end of its interval, clips) for each group.
    """
    found, groups = [], min(GROUPS, len(rows)) or 1
    for part in np.array_split(np.array(sorted(rows, key=key), object), groups) if rows else ():
        errors, words = [row["word_errors"] for row in part], [row["words"] for row in part]
        x, wer = float(np.median([key(row) for row in part])), 100 * sum(errors) / sum(words)
        found.append((x, wer, *interval(errors, words), len(part)))
    return found


def write_report(
    out: Path, summary: dict[str, Any], rows: list[dict[str, Any]], audio: dict[str, Any]
) -> None:
    """Write `out`/report.html, a self-contained page.

    Args:
        out: folder of the evaluation.
        summary: see `eval.evaluate`.
        rows: rows of results.jsonl, worst first.
        audio: an input of `load_audio` for each id.
    """
    scored = [row for row in rows if "error" not in row]
    pairs = {row["id"]: align(*row["normalized"]) for row in scored}
    wrong = Counter(pair for words in pairs.values() for pair in words if pair[0] != pair[1])
    worst = [row for row in scored if row["word_errors"]][:CLIPS]
    spoken = [row for row in scored if row["words"]]
    template = Template(Path(__file__).with_suffix(".html").read_text(), autoescape=True)
    page = template.render(
        s=summary,
        failed=[row for row in rows if "error" in row],
        worst=worst,
        pairs=pairs,
        sound={r["id"]: mp3(audio[r["id"]]) for r in worst if r["duration"] <= MAX_SECONDS},
        confused=wrong.most_common(40),
        plots={
            "length of the clip, s": points(spoken, lambda row: row["duration"]),
            "words per second": points(spoken, lambda row: row["words"] / row["duration"]),
        },
    )
    (out / "report.html").write_text(page)
