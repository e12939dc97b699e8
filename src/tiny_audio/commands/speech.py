"""The quickstart's speech: recorded clips with transcripts, and sentences read by a synthesiser."""

import functools
import gzip
import json
import os
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rapidfuzz.distance import Levenshtein

from ..asr.asr_audio import SAMPLE_RATE, load_audio
from ..progress import progress_bar
from .packages import FORTUNES, HIBARI, LIBRIVOX, SOUNDS, TRANSCRIPTS, building

SYNTHETIC_HOURS = 3.2  # about 4,000 sentences
CONFIGS = Path(__file__).parents[1] / "configs"
SPLIT_FILE, SENTENCES_FILE = CONFIGS / "quickstart_split.json", CONFIGS / "quickstart_sentences.txt"
HELD_OUT = ("dev", "test", "librivox")
REAL_SPLITS = ("train", *HELD_OUT)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@functools.cache  # `synthesize` compares each text with many others
def clean(text: str) -> str:
    """Convert a transcript to its spoken form: a-z, 0-9, apostrophes in words, single spaces."""
    text = text.lower().replace("http://", "").replace("www.", "w w w dot ")
    text = text.replace("asterisk.org", "asterisk dot org").replace("3d", "three d")
    text = re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", text)  # stage directions
    text = re.sub(r"\b\d+\b", lambda m: NUMBERS[int(m[0])] if int(m[0]) <= 10 else m[0], text)
    text = text.replace("&", " and ").replace(".m.", " m")  # a.m., p.m.
    text = re.sub(r"[^a-z0-9' ]", " ", text)
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text)
    return " ".join(text.split())


def near_duplicate(a: str, b: str) -> bool:
    """Whether two cleaned texts share half of their words in order, or six words in a row.

    Half means 1 - (word edits) / (words of the longer text) >= 0.5.
    """
    x, y = a.split(), b.split()
    runs = [f" {' '.join(x[i : i + 6])} " for i in range(len(x) - 5)]
    alike = Levenshtein.normalized_similarity(x, y, score_cutoff=0.5) >= 0.5
    return alike or any(run in f" {b} " for run in runs)


def read_transcripts(root: Path) -> dict[str, tuple[Path, str]]:
    """Map ids to (audio file, raw text) for the unpacked Debian packages under `root`.

    Lines of Asterisk's list are "id: text"; ids without a recording and sounds that are not speech
    are skipped. Lines of Pocketsphinx's list are "<s> text </s> (id)".
    """
    found = {}
    sounds = root / "usr/share/asterisk/sounds/en_US_f_Allison"
    listing = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    for line in gzip.decompress(listing.read_bytes()).decode().splitlines():
        name, colon, raw = (part.strip() for part in line.partition(":"))
        audio = sounds / f"{name}.g722"
        if colon and not line.startswith(";") and clean(raw) and audio.is_file():
            found[name] = audio, raw
    librivox = root / "usr/share/pocketsphinx/test/data/librivox"
    for line in (librivox / "transcription").read_text().splitlines():
        if match := re.match(r"<s> (.*) </s> \((.*)\)", line):
            found[match[2]] = librivox / f"{match[2]}.wav", match[1]
    return found


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a manifest (see `Assets`)."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out_texts(cache: Path) -> list[str]:
    """Return the transcripts that nothing may be trained on."""
    manifests = [cache / "speech" / f"{name}.jsonl" for name in HELD_OUT]
    return [row["text"] for path in manifests for row in read_manifest(path)]


def _write_manifest(cache: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    with building(cache, cache / "speech" / f"{name}.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_clip(folder: Path, name: str, samples: np.ndarray, raw: str) -> dict[str, Any]:
    """Write `folder`/`name`.flac; return its row for the manifest next to the folder."""
    path = folder / f"{name}.flac"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, SAMPLE_RATE)
    row = {"id": name, "audio": f"{folder.name}/{name}.flac", "text": clean(raw), "raw_text": raw}
    return row | {"duration": len(samples) / SAMPLE_RATE}


def unpack_speech(cache: Path) -> None:
    """Decode the recorded speech into `cache/speech/real`, and write a manifest for each split."""
    split = json.loads(SPLIT_FILE.read_text())
    manifests: dict[str, list[dict[str, Any]]] = {}
    target = cache / "speech" / "real"
    with building(cache, target, SOUNDS, TRANSCRIPTS, LIBRIVOX) as folder:
        clips = read_transcripts(folder.parent)
        for name in REAL_SPLITS:
            manifests[name] = [
                _write_clip(folder, clip, load_audio(clips[clip][0]), clips[clip][1])
                for clip in split[name]
            ]
    for name, rows in manifests.items():
        _write_manifest(cache, name, rows)


# -- synthetic speech ------------------------------------------------------------------------------

# Files of `fortunes` with inoffensive plain prose, without code and verse.
FORTUNE_FILES = "art cookie disclaimer education food humorists kids law medicine miscellaneous "
FORTUNE_FILES += "people pets platitudes science sports startrek wisdom work"


# Ranges of each clip's pitch and speed. A pitch of 0.85 plays the samples 15 % slower, like a
# larger speaker, and the tempo is corrected for it. A speed of 1 is the synthesiser's own tempo.
PITCH, SPEED = (0.82, 1.12), (0.85, 1.2)
# The wheel has one voice, an American one. Its lexicon also has British pronunciations. Four of
# their symbols, on which the voice was not trained, are replaced by the nearest American ones.
BRITISH = str.maketrans({"Q": "O", "a": "æ", "ɒ": "ɑ", "ː": None})


def read_sentences(folder: Path) -> list[str]:
    """Return the distinct ordinary sentences of 1 to 14 words in a folder of fortunes.

    An ordinary sentence begins with a capital, ends with . ! or ?, and contains only words,
    apostrophes, commas and semicolons. It has no digits and no words in capitals (except I). It
    does not end with a short capitalised word, which is often half of a sentence: "He met Mr."
    """
    word = r"(?:[A-Z]?[a-z]+(?:'[a-z]+)?|I(?:'[a-z]+)?|A|O)"
    sentence = re.compile(
        rf"(?=[A-Z])(?!.*\b[A-Z][a-z]{{0,3}}\.$){word}(?:[,;]? {word}){{0,13}}[.!?]"
    )
    found: dict[str, None] = {}  # a set that keeps the order
    for name in FORTUNE_FILES.split():
        for entry in (folder / name).read_text(encoding="utf-8").split("\n%\n"):
            prose = [line for line in entry.splitlines() if not line.strip().startswith("--")]
            text = " ".join(" ".join(prose).split()).replace("\u2019", "'")
            parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
            found.update(dict.fromkeys(part for part in parts if sentence.fullmatch(part)))
    return list(found)


def synthesize(
    cache: Path, texts: Sequence[str] | None = None, hours: float = SYNTHETIC_HOURS
) -> None:
    """Synthesize `hours` of speech into `cache/speech/synthetic_speech`, with a manifest.

    By default, `texts` are those of `SENTENCES_FILE`, which SmolLM2 wrote in the style of the
    training prompts, then shuffled sentences of the fortunes package.
    Texts close to a held-out transcript are dropped, so the recorded speech must exist. Texts are
    read in two alternating accents; when they run out, each is read again in the other accent.
    Clip i depends only on i, so asking for more hours gives the same first clips.
    """
    held_out = held_out_texts(cache)
    rows: list[dict[str, Any]] = []
    seconds = 0.0
    with building(cache, cache / "speech" / "synthetic_speech", FORTUNES, HIBARI) as folder:
        if texts is None:
            fortunes = read_sentences(folder.parent / "usr/share/games/fortunes")
            order = np.random.default_rng(0).permutation(len(fortunes))
            texts = [*SENTENCES_FILE.read_text().splitlines(), *(fortunes[i] for i in order)]
        texts = [t for t in texts if not any(near_duplicate(clean(t), h) for h in held_out)]
        sys.path.append(str(folder.parent))  # searched last, so it shadows nothing
        from hibari import Hibari  # pyright: ignore[reportMissingImports]
        from hibari.g2p import G2P  # pyright: ignore[reportMissingImports]

        accents = [Hibari(threads=1, g2p=G2P(british=british)) for british in (False, True)]
        text_analysis = threading.Lock()  # `phonemize` is stateful

        def read_aloud(i: int) -> tuple[str, bool, np.ndarray]:
            lap, at = divmod(i, len(texts))
            british = (at + lap) % 2 == 1
            with text_analysis:
                phonemes = " ".join(accents[british].phonemize(texts[at]))
            if british:
                phonemes = phonemes.translate(BRITISH)
            rng = np.random.default_rng([0, i])
            pitch, speed = rng.uniform(*PITCH), rng.uniform(*SPEED)
            model, seed = accents[british], int(rng.integers(2**31))
            samples = model.from_phonemes(phonemes, speed / pitch, seed=seed)
            return texts[at], british, load_audio(samples, round(model.sample_rate * pitch))

        bar = progress_bar(total=hours * 3600, desc="synthetic speech", unit="s", unit_scale=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            while seconds < hours * 3600:
                ahead = range(len(rows), len(rows) + 64)
                for text, british, samples in pool.map(read_aloud, ahead):
                    if seconds < hours * 3600:
                        row = _write_clip(folder, f"{len(rows):06d}", samples, text)
                        rows.append(row | {"accent": "british" if british else "american"})
                        seconds += row["duration"]
                        bar.update(row["duration"])
    _write_manifest(cache, "synthetic_speech", rows)
