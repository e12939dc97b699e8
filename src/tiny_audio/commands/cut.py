"""`tiny-audio cut RECORDING... --model MODEL`: make training clips from recordings with subtitles.

The subtitles of talk.mp3 must be beside it: talk.srt, talk.vtt, talk.ass, talk.TextGrid (Praat; its
first tier), or talk.txt (labels of Audacity: "start<TAB>end<TAB>text" lines). Their times may be
off by up to a second, because the model finds where each text is spoken. A text that it does not
hear there is refused; refused.csv says why. clips.csv is a manifest for `tiny-audio adapt`.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pysubs2
import soundfile
import torch
from praatio import textgrid

from ..asr.asr_audio import SAMPLE_RATE, AudioError, load_audio
from ..asr.asr_ctc import LAG, align, frames_needed
from ..loading import load_pipeline
from ..progress import progress_bar
from . import append_row, home_path, parser_of

SUFFIXES = (".srt", ".vtt", ".ass", ".TextGrid", ".txt")
MARGIN = 1.0  # seconds around a subtitle in which its text is searched
EDGE = 0.1  # seconds of a clip before and after its text
MIN_CONFIDENCE = 0.1  # nearly all wrong texts have less, see docs/log.md
# Marks of subtitles: [music], (laughs), <c>, notes, a dialogue's dash, a speaker's NAME:
NOT_SPOKEN = re.compile(r"\[[^]]*]|\([^)]*\)|<[^>]*>|♪|^[\s>-]*(?:[A-Z][A-Z .']+:)?", re.M)


class Cue(NamedTuple):
    """A subtitle: `start` and `end` in seconds, and its text in one line."""

    start: float
    end: float
    text: str


def subtitles_of(recording: Path) -> Path:
    """The subtitle file beside a recording.

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
            tier = textgrid.openTextgrid(str(path), includeEmptyIntervals=False).tiers[0]
            found = [(float(entry[0]), float(entry[1]), entry[-1]) for entry in tier.entries]
        elif path.suffix == ".txt":  # a line that begins with \ is a label's range of frequencies
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            rows = [line.split("\t") for line in lines if line.strip() and line[0] != "\\"]
            found = [(float(row[0]), float(row[1]), row[2]) for row in rows]
        else:
            events = pysubs2.load(str(path))
            found = [(e.start / 1000, e.end / 1000, e.plaintext) for e in events if e.is_text]
    except Exception as error:  # each reader raises its own
        raise ValueError(f"{path}: not readable as subtitles ({error})") from error
    spoken = [(start, end, unescape(NOT_SPOKEN.sub(" ", text))) for start, end, text in found]
    cues = [Cue(start, end, " ".join(text.split())) for start, end, text in spoken]
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
    if len(targets) < 3 or frames_needed(targets) > len(log_probs):
        return cue.start, cue.end, 0.0
    spans, scores = align(log_probs, targets)
    start, end = spans[1, 0], spans[-2, 1]
    at, step = first / SAMPLE_RATE, processor.frame_seconds
    return at + start * step, at + end * step + LAG, float(np.exp(scores[1:-1].mean()))


def why_unusable(pipe: Any, cue: Cue, seconds: float) -> str:
    """Explain why a cue cannot be located in a recording of `seconds`; "" if it can."""
    longest = pipe.processor.max_seconds - 2 * MARGIN
    if not 0 <= cue.start <= cue.end or cue.start >= seconds:
        return "outside the recording"
    if cue.end - cue.start > longest:
        return f"longer than {longest:g} s"
    unknown = {c for c in cue.text.lower() if c.isalnum() and not pipe.processor.spell(c)}
    return f"letters that the model does not know: {''.join(sorted(unknown))}" if unknown else ""


def cut(pipe: Any, recording: Path, out: Path, number: int) -> Iterator[dict[str, Any]]:
    """Write the clips of a recording to `out`; yield a row for each subtitle.

    The clips are numbered from `number` on.

    Raises:
        AudioError, FileNotFoundError, ValueError: if the recording or its subtitles are unreadable.
    """
    cues, samples = read_cues(subtitles_of(recording)), load_audio(recording)
    bar = progress_bar(iterable=cues, desc=recording.name, unit="subtitle")
    for i, cue in enumerate(bar, number):
        start, end, sure = cue.start, cue.end, 0.0
        if not (why := why_unusable(pipe, cue, len(samples) / SAMPLE_RATE)):
            start, end, sure = locate(pipe, samples, cue)
            why = "" if sure >= MIN_CONFIDENCE else "not heard there"
        row = {"audio": "", "text": cue.text, "recording": recording, "refused": why}
        row |= {"start": f"{start:.2f}", "end": f"{end:.2f}", "confidence": f"{sure:.2f}"}
        if not why:
            row["audio"] = f"{recording.stem}-{i:04d}.flac"
            first, last = (int(SAMPLE_RATE * t) for t in (max(0, start - EDGE), end + EDGE))
            soundfile.write(out / row["audio"], samples[first:last], SAMPLE_RATE)
        yield row


def main(argv: list[str] | None = None) -> int:
    """Cut all recordings; the exit code is 1 if one of them cannot be read."""
    parser = parser_of("tiny-audio cut", __doc__)
    parser.add_argument("recordings", nargs="+", type=home_path, metavar="RECORDING")
    parser.add_argument("--model", default="outputs/quickstart", help="trained folder or Hub id")
    parser.add_argument("--out", type=home_path, default=Path("clips"), help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda or mps; default: the best one available")
    args = parser.parse_args(argv)
    if any((args.out / name).exists() for name in ("clips.csv", "refused.csv")):
        parser.error(f"{args.out} holds clips already: name another folder with --out")
    pipe = load_pipeline(args.model, args.device)
    if getattr(pipe.model, "characters", None) is None:
        parser.error(f"{args.model} has no character head, which cut needs: use another one")
    args.out.mkdir(parents=True, exist_ok=True)
    done, failed = Counter[str](), False
    for recording in args.recordings:
        try:
            for row in cut(pipe, recording, args.out, done.total()):
                name = "refused.csv" if row["refused"] else "clips.csv"
                append_row(args.out / name, row)
                done[name] += 1
        except (AudioError, OSError, ValueError, soundfile.LibsndfileError) as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
    clips, refused = done["clips.csv"], done["refused.csv"]
    found = f"{clips} clips in {args.out / 'clips.csv'}" if clips else "no clips"
    print(f"{found}, {refused} subtitles in refused.csv")
    if refused > clips:
        print("most are refused: are these the subtitles of this recording?", file=sys.stderr)
    return int(failed)
