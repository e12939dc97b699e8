"""`tiny-audio cut RECORDING... --model MODEL`: make training clips from recordings with subtitles.

The subtitles of talk.mp3 are beside it: talk.srt, talk.vtt, talk.ass, talk.TextGrid (Praat), or
talk.txt (labels of Audacity: "start<TAB>end<TAB>text" lines). Their times may be off by a second,
because the model finds where each text is spoken. A text that it does not hear there becomes no
clip; refused.csv says why. clips.csv names the clips, for `tiny-audio adapt --data` and data.train.
"""

import csv
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pysubs2
import soundfile
import torch
from praatio import textgrid

from ..asr.asr_ctc import LAG, align, fits
from ..asr.asr_processing import SAMPLE_RATE, AudioError, load_audio
from ..loading import load_pipeline
from ..progress import progress_bar
from . import home_path, parser_of

SUFFIXES = (".srt", ".vtt", ".ass", ".TextGrid", ".txt")
MARGIN = 1.0  # seconds around a subtitle in which its text is searched
EDGE = 0.1  # seconds of a clip before and after its text
LEAST = 0.15  # confidence of a text; nearly all wrong texts have less, see docs/log.md
NOT_SPOKEN = re.compile(r"\[.*?\]|\(.*?\)|♪|^\s*-\s*", re.M)  # [music], (laughs), a dialogue's dash
COLUMNS = ("audio", "text", "recording", "start", "end", "confidence", "refused")


@dataclass
class Cue:
    """A subtitle: `start` and `end` in seconds, and its text in one line."""

    start: float
    end: float
    text: str


def subtitles_of(recording: Path) -> Path:
    """The file of subtitles beside a recording.

    Raises:
        FileNotFoundError: if there is none.
    """
    for suffix in SUFFIXES:
        if (path := recording.with_suffix(suffix)).is_file():
            return path
    raise FileNotFoundError(f"{recording}: no subtitles beside it ({', '.join(SUFFIXES)})")


def read_cues(path: Path) -> list[Cue]:
    """Read subtitles or labels, without those that hold no spoken text.

    Raises:
        ValueError: if the file is not what its suffix says, or holds no subtitles.
    """
    try:
        if path.suffix == ".TextGrid":
            tiers = textgrid.openTextgrid(str(path), includeEmptyIntervals=False).tiers
            found = [(*entry[:2], entry[-1]) for entry in tiers[0].entries]
        elif path.suffix == ".txt":  # a line that begins with \ is a label's range of frequencies
            rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
            found = [(float(row[0]), float(row[1]), row[2]) for row in rows if row[0] != "\\"]
        else:
            events = pysubs2.load(str(path))
            found = [(e.start / 1000, e.end / 1000, e.plaintext) for e in events if e.is_text]
    except Exception as error:  # each reader raises its own
        raise ValueError(f"{path}: not readable as subtitles ({error})") from error
    texts = (" ".join(NOT_SPOKEN.sub(" ", text).split()) for _, _, text in found)
    cues = [Cue(start, end, text) for (start, end, _), text in zip(found, texts, strict=True)]
    if not cues:
        raise ValueError(f"{path}: holds no subtitles")
    return [cue for cue in cues if cue.text]


def locate(pipe: Any, samples: np.ndarray, cue: Cue) -> tuple[float, float, float]:
    """Find a cue's text within `MARGIN` of its times, by forced alignment.

    Returns:
        Start and end in the recording (seconds), and the geometric mean of the letters'
        probabilities; 0.0 if the text does not fit.
    """
    model, processor = pipe.model, pipe.processor
    first = max(0, int((cue.start - MARGIN) * SAMPLE_RATE))
    heard = samples[first : int((cue.end + MARGIN) * SAMPLE_RATE)]
    batch = processor.collate([processor.features(heard)]).to(model.device)
    with torch.inference_mode():
        hidden, _ = model.encode(batch.input_features, batch.input_features_mask)
        log_probs = model.characters(hidden)[0].cpu().numpy()
    # A class that matches any sound, for what is spoken before and after the text.
    log_probs = np.concatenate([log_probs, log_probs.max(1, keepdims=True)], 1)
    anything = log_probs.shape[1] - 1
    targets = np.array([anything, *processor.spell(cue.text), anything])
    if not fits(len(log_probs), targets):
        return cue.start, cue.end, 0.0
    spans, scores = align(log_probs, targets)
    start, end = spans[1, 0], spans[-2, 1]
    at, step = first / SAMPLE_RATE, processor.frame_seconds
    return at + start * step, at + end * step + LAG, float(np.exp(scores[1:-1].mean()))


def unusable(pipe: Any, cue: Cue) -> str:
    """Why a cue cannot be searched for; empty if it can."""
    longest = pipe.processor.max_seconds - 2 * MARGIN
    if cue.end - cue.start > longest:
        return f"longer than {longest:g} s"
    unknown = {c for c in cue.text.lower() if c.isalpha() and not pipe.processor.spell(c)}
    return f"letters that the model does not know: {''.join(sorted(unknown))}" if unknown else ""


def cut(pipe: Any, recording: Path, out: Path) -> list[dict[str, Any]]:
    """Write the clips of a recording to `out`; return a row of `COLUMNS` for each subtitle.

    Raises:
        AudioError, FileNotFoundError, ValueError: if the recording or its subtitles are unreadable.
    """
    cues, samples, rows = read_cues(subtitles_of(recording)), load_audio(recording), []
    for i, cue in enumerate(progress_bar(iterable=cues, desc=recording.name, unit="subtitle")):
        start, end, sure, why = cue.start, cue.end, 0.0, unusable(pipe, cue)
        if not why:
            start, end, sure = locate(pipe, samples, cue)
            why = "not heard there" if sure < LEAST else ""
        row = {"text": cue.text, "recording": recording, "refused": why}
        row |= {"start": f"{start:.2f}", "end": f"{end:.2f}", "confidence": f"{sure:.2f}"}
        if not why:
            row["audio"] = f"{recording.stem}-{i:04d}.flac"
            first, last = (int(SAMPLE_RATE * t) for t in (max(0, start - EDGE), end + EDGE))
            soundfile.write(out / row["audio"], samples[first:last], SAMPLE_RATE)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Cut all recordings; the exit code is 1 if one of them cannot be read."""
    parser = parser_of("cut", __doc__)
    parser.add_argument("recordings", nargs="+", type=home_path, metavar="RECORDING")
    parser.add_argument("--model", default="outputs/quickstart", help="trained folder or Hub id")
    parser.add_argument("--out", type=home_path, default=Path("clips"), help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda or mps; default: the best one available")
    args = parser.parse_args(argv)
    if len({path.stem for path in args.recordings}) < len(args.recordings):
        parser.error("two recordings have the same name: use another --out for one of them")
    pipe = load_pipeline(args.model, args.device)
    if getattr(pipe.model, "characters", None) is None:
        parser.error(f"{args.model} has no character head, which finds the texts")
    args.out.mkdir(parents=True, exist_ok=True)
    rows, failed = list[dict[str, Any]](), False
    for recording in args.recordings:
        try:
            rows += cut(pipe, recording, args.out)
        except (AudioError, OSError, ValueError) as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
    tables = {"clips.csv": [row for row in rows if not row["refused"]]}
    tables["refused.csv"] = [row for row in rows if row["refused"]]
    for name, table in tables.items():
        with (args.out / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*COLUMNS])
            writer.writeheader()
            writer.writerows(table)
    clips, refused = map(len, tables.values())
    print(f"{clips} clips in {args.out / 'clips.csv'}, {refused} subtitles in refused.csv")
    if refused > clips:
        print(
            "most are refused: do recording, language and times belong together?", file=sys.stderr
        )
    return int(failed)
