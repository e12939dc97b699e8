"""How a model reads ordinary recordings: silence, hum, noise, music, rooms, telephones.

Every kind is made from the held-out clips of the quickstart with fixed seeds; the sounds are other
ones than `augment.py` draws. One thread:

    python tests/ordinary.py outputs/quickstart --music FOLDER_OF_MUSIC --json outputs/ordinary.json

Prints for each kind its WER, how much longer than its reference a text is at most, how many texts
say one thing over and over, what share of the clips is flagged, and the speed.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiny_audio.asr.asr_audio import SAMPLE_RATE, load_audio
from tiny_audio.asr.asr_pipeline import LOOP
from tiny_audio.commands import assets
from tiny_audio.commands.speech import read_manifest
from tiny_audio.evaluation.scoring import normalizer, score
from tiny_audio.loading import load_pipeline

Samples = np.ndarray
BESIDE = 10.0  # seconds of silence or hum on either side


def level(samples: Samples) -> float:
    """Root mean square."""
    return float(np.sqrt(np.square(samples).mean()))


def with_noise(samples: Samples, noise: Samples, snr: float) -> Samples:
    """Noise under the samples, `snr` dB below them."""
    return samples + noise * level(samples) / level(noise) * 10 ** (-snr / 20)


def white(n: int, rng: np.random.Generator) -> Samples:
    """n samples of noise with an even spectrum."""
    return rng.standard_normal(n)


def pink(n: int, rng: np.random.Generator) -> Samples:
    """n samples of noise that falls by 3 dB an octave: white noise of many rates, added up."""
    total = np.zeros(n)
    for octave in range(12):
        held = 2**octave
        total += np.repeat(rng.standard_normal(n // held + 1), held)[:n]
    return total


def hum(n: int) -> Samples:
    """n samples of 50 Hz hum at -34 dBFS."""
    return 10 ** (-34 / 20) * np.sqrt(2) * np.sin(2 * np.pi * 50 * np.arange(n) / SAMPLE_RATE)


def telephone(samples: Samples) -> Samples:
    """300 to 3,400 Hz, 8 bits, µ-law, as a landline carries it."""
    spectrum = np.fft.rfft(samples)
    frequency = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    spectrum[(frequency < 300) | (frequency > 3400)] = 0
    narrow = np.fft.irfft(spectrum, len(samples)).clip(-1, 1)
    code = np.round(127 * np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / np.log(256))
    return np.sign(code) * np.expm1(np.abs(code) / 127 * np.log(256)) / 255


def room(samples: Samples, rng: np.random.Generator) -> Samples:
    """In a room of 0.4 s: a dozen early reflections and a diffuse tail."""
    n = int(0.4 * SAMPLE_RATE)
    echo = 0.02 * rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    early = rng.integers(int(0.003 * SAMPLE_RATE), int(0.04 * SAMPLE_RATE), 12)
    echo[early] += rng.uniform(-0.4, 0.4, 12)
    echo[0] = 1.0
    return np.convolve(samples, echo)[: len(samples)]


def kinds(music: list[Samples]) -> dict[str, Callable[[Samples, np.random.Generator], Samples]]:
    """What is done to a clip, by name; `music` is drawn from where there is any."""
    beside = int(BESIDE * SAMPLE_RATE)
    made: dict[str, Callable[[Samples, np.random.Generator], Samples]] = {
        "clean": lambda x, rng: x,
        "silence around": lambda x, rng: np.pad(x, beside),
        "hum around": lambda x, rng: np.pad(x, beside) + hum(len(x) + 2 * beside),
        "telephone": lambda x, rng: telephone(x),
        "room": room,
        "-50 dBFS": lambda x, rng: x * 10 ** (-50 / 20) / level(x),
        "clipped x8": lambda x, rng: (8 * x / np.abs(x).max()).clip(-1, 1),
        "one channel silent": lambda x, rng: np.stack([x, np.zeros_like(x)]),
    }
    for snr in (20, 10, 5):
        made[f"white {snr} dB"] = lambda x, rng, snr=snr: with_noise(x, white(len(x), rng), snr)
        made[f"pink {snr} dB"] = lambda x, rng, snr=snr: with_noise(x, pink(len(x), rng), snr)
    if music:

        def play(x: Samples, rng: np.random.Generator) -> Samples:
            tune = music[rng.integers(len(music))]
            return with_noise(x, np.roll(tune, -int(rng.integers(len(tune))))[: len(x)], 10)

        made["music 10 dB"] = play
    return made


def clips_of(manifest: Path) -> list[tuple[str, Samples]]:
    """Text and samples of each clip of a manifest."""
    rows = read_manifest(manifest)
    return [(row["text"], load_audio(manifest.parent / row["audio"])) for row in rows]


def in_turn(clips: list[tuple[str, Samples]], others: list[tuple[str, Samples]]) -> Iterator[Any]:
    """Two voices by turns, with pauses of 0.4 to 1.5 s: text and samples of each recording."""
    for i in range(0, len(clips) - 2, 3):
        rng = np.random.default_rng(i)
        parts = [clips[i], others[i % len(others)], clips[i + 1], clips[i + 2]]
        heard: list[Samples] = []
        for _, samples in parts:
            heard += [0.1 * samples / level(samples), np.zeros(int(rng.uniform(6400, 24_000)))]
        yield " ".join(text for text, _ in parts), np.concatenate(heard)


def measure(pipe: Any, clips: list[tuple[str, Samples]], **options: Any) -> dict[str, Any]:
    """Transcribe clips in batches; see the module's docstring for what comes back."""
    started = time.process_time()
    found = pipe([samples.astype(np.float32) for _, samples in clips], **options)
    spent = time.process_time() - started
    normal = normalizer("en")
    said = [normal(text) for text, _ in clips]
    heard = [normal(result["text"]) for result in found]
    ratios = [len(b) / max(1, len(a)) for a, b in zip(said, heard, strict=True)]
    flagged = [any(result.get(f) for f in ("truncated", "repetition", "no_speech"))
               for result in found]  # fmt: skip
    seconds = sum(samples.shape[-1] for _, samples in clips) / SAMPLE_RATE
    return {
        "wer": score(said, heard)["wer"],
        "longest": max(ratios),
        "too_long": [(a, b) for a, b, r in zip(said, heard, ratios, strict=True) if r > 1.3],
        "loops": [b for b in heard if LOOP.search(b)],
        "empty": sum(not b for b in heard),
        "flagged": 100 * sum(flagged) / len(flagged),
        "speed": seconds / spent,
    }


def measure_all(model: str, music: Path | None, only: list[str], **options: Any) -> dict[str, Any]:
    """Every kind, by name, each printed as it is done."""
    torch.set_num_threads(1)
    speech = assets.cache_dir() / "speech"
    clips, others = clips_of(speech / "test.jsonl"), clips_of(speech / "librivox.jsonl")
    files = sorted(path for path in music.rglob("*") if path.is_file()) if music else []
    made = kinds([load_audio(path) for path in files])
    pipe = load_pipeline(model)
    found = {}
    print(f"{'kind':<20}{'WER %':>8}{'longest':>9}{'> 1.3':>7}{'loops':>7}{'empty':>7}"
          f"{'flagged %':>11}{'audio-s/CPU-s':>15}")  # fmt: skip
    for number, name in enumerate([*made, "two voices"]):
        if only and name not in only:
            continue
        changed = list(in_turn(clips, others))
        if name != "two voices":
            drawn = [np.random.default_rng([number, i]) for i in range(len(clips))]
            changed = [(text, made[name](x, rng))
                       for (text, x), rng in zip(clips, drawn, strict=True)]  # fmt: skip
        row = found[name] = measure(pipe, changed, **options)
        print(f"{name:<20}{row['wer']:8.1f}{row['longest']:9.2f}{len(row['too_long']):7}"
              f"{len(row['loops']):7}{row['empty']:7}{row['flagged']:11.1f}{row['speed']:15.1f}",
              flush=True)  # fmt: skip
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("--music", type=Path, help="folder of recorded music")
    parser.add_argument("--only", nargs="*", default=[], help="kinds to measure")
    parser.add_argument("--decode", help="see tiny-audio transcribe --help")
    parser.add_argument("--json", type=Path, help="write the figures and what was too long")
    args = parser.parse_args()
    options = {"decode": args.decode} if args.decode else {}
    found = measure_all(args.model, args.music, args.only, **options)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
