"""Render transcripts as plain text, SubRip, WebVTT or JSON."""

import json
from html import escape
from typing import Any

FORMATS = ("txt", "srt", "vtt", "json")


def timestamp(seconds: float, point: str = ".") -> str:
    """Format seconds as hh:mm:ss.mmm."""
    ms = round(1000 * seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"


def render(result: dict[str, Any], kind: str) -> str:
    """Render a result of the pipeline in one of `FORMATS`; srt and vtt need its `chunks`."""
    if kind == "txt":
        return result["text"] + "\n"
    if kind == "json":
        return json.dumps(result, ensure_ascii=False, indent=1) + "\n"
    if kind not in ("srt", "vtt"):
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {kind!r}")
    point = "," if kind == "srt" else "."
    cues = []
    for i, chunk in enumerate(result["chunks"], 1):
        times = " --> ".join(timestamp(t, point) for t in chunk["timestamp"])
        text = " ".join(chunk["text"].split()).replace("-->", "->")  # an empty line ends the cue
        cues.append(f"{i}\n{times}\n{escape(text, quote=False) if kind == 'vtt' else text}\n")
    return ("WEBVTT\n\n" if kind == "vtt" else "") + "\n".join(cues)
