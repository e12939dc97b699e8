"""Which examples are refused, the log of these, and the rules for transcripts."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

from ..asr.asr_audio import AudioError, load_audio
from ..asr.asr_ctc import frames_needed
from ..asr.asr_processing import INNER_APOSTROPHE, without_marks
from .manifests import DataError, Example

# Plausible transcripts: slower than anybody reads to faster than anybody speaks.
CHARACTERS_PER_SECOND = (0.3, 40.0)
# Annotation marks and their replacements in training text, applied in this order.
MARKS = {
    r"\s*<comma>": ",",  # GigaSpeech
    r"\s*<period>": ".",
    r"\s*<questionmark>": "?",
    r"\s*<exclamationpoint>": "!",
    r"ignore_time_segment_in_scoring": "",  # TED-LIUM: speech without a transcript
    r"<[^<>]*>|\[[^\[\]]*\]|\([^()]*\)": " ",  # <unk>, <sil>, [noise], (laughter)
}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL log, without lines cut short by a kill; empty if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class Dropped:
    """Counts skipped examples by reason and appends their ids to a JSONL file.

    Args:
        path: the file, deleted first if it exists. Each checkpoint keeps a copy for resuming.
        allowed: the share of examples that may be dropped.
    """

    def __init__(self, path: Path | None = None, allowed: float = 1.0) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.seen: set[str] = set()
        self.path, self.allowed = path, allowed
        if path is not None:
            path.unlink(missing_ok=True)

    def add(self, id: str, reason: str, detail: str = "") -> None:
        """Record a skipped example; each id is counted once."""
        if id in self.seen:
            return
        self.seen.add(id)
        self.counts[reason] += 1
        self.first.setdefault(reason, id)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"id": id, "reason": reason, "detail": detail}) + "\n")

    def __str__(self) -> str:
        parts = [f"{n} {reason} (first: {self.first[reason]})" for reason, n in self.counts.items()]
        return ", ".join(parts) or "none"

    def check(self, total: int) -> None:
        """Raise DataError if more than the allowed share of `total` examples was dropped."""
        count = self.counts.total()
        if count > self.allowed * total:
            raise DataError(
                f"{count} of {total} examples were dropped, more than data.max_dropped_fraction="
                f"{self.allowed}: {self}. Fix the data, or raise the limit"
            )


def prepare_text(text: str, lowercase: bool = False) -> str:
    """Replace annotation marks (see `MARKS`), and join words by single spaces.

    A text written entirely in capitals is lower-cased.

    Case, digits and punctuation are kept for the model to learn. `lowercase`, for small recipes,
    removes case and all punctuation except the apostrophe.
    """
    text = re.sub(INNER_APOSTROPHE, "'", normalize("NFC", text))
    for mark, meaning in MARKS.items():
        text = re.sub(mark, meaning, text, flags=re.IGNORECASE)
    text = " ".join(text.split())
    if lowercase:
        spoken = text.lower().replace("’", "'")
        # letters, combining marks, digits, the apostrophe, zero-width joiner and non-joiner
        kept = (c if c in "'\u200c\u200d" or category(c)[0] in "LMN" else " " for c in spoken)
        text = " ".join("".join(kept).split())
    return text.lower() if text.isupper() and len(text) > 3 else text


def spelled(text: str) -> bytes:
    """The bytes that the character head learns: no capitals, of marks only the apostrophe."""
    return " ".join(without_marks(text).split()).encode()


def why_refused(
    example: Example, frames: float, letter_frames: float, limits: tuple[float, float]
) -> dict[str, str] | None:
    """Return `reason` and `detail` if an example cannot be used, else None.

    Args:
        example: with its prepared text and its tokens.
        frames: number of projected frames; infinity without a CTC head over tokens.
        letter_frames: number of encoder frames; infinity without a character head.
        limits: shortest and longest length in seconds.
    """
    shortest, longest = limits
    seconds, size = example.duration, len(example.text)
    slow, fast = (rate * seconds for rate in CHARACTERS_PER_SECOND)
    wrong = {
        "empty text": not size,
        "unreadable audio": seconds < 0,
        "shorter than min_seconds": seconds < shortest,
        "over max_seconds": seconds > longest,
        "more tokens than frames": frames_needed(example.target) > frames,
        "more letters than frames": frames_needed([*spelled(example.text)]) > letter_frames,
        "implausible characters per second": not slow <= size <= fast,
    }
    reasons = [reason for reason, holds in wrong.items() if holds]
    if not reasons:
        return None
    detail = f"{seconds:.2f} s" if seconds >= 0 else why_unreadable(example.audio)
    return {"reason": reasons[0], "detail": detail}


def why_unreadable(audio: Any) -> str:
    """Explain why audio has no duration, by decoding it."""
    try:
        load_audio(audio)
    except (AudioError, TypeError) as error:
        return str(error)
    return "unknown length"
