"""Measure how fast one core reads clips: decoding alone, and decoding plus features.

    OMP_NUM_THREADS=1 python bench/data.py

Writes the table to bench/results.
"""

import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import soundfile

from tiny_audio.asr.asr_processing import SAMPLE_RATE, load_audio
from tiny_audio.commands import assets
from tiny_audio.commands.plan import recipe_stages
from tiny_audio.training.data import Clips, Dropped
from tiny_audio.training.manifests import read_source
from tiny_audio.training.train import build_processor

FORMATS = {"WAV": ("wav", "PCM_16"), "FLAC": ("flac", "PCM_16"),
           "MP3": ("mp3", "MPEG_LAYER_III"), "Opus": ("ogg", "OPUS")}  # fmt: skip


def loading(cached: assets.Assets, folder: Path) -> list[str]:
    """Measure clips per second on one core, for each audio format."""
    clips = [clip for clip in read_source({"path": str(cached.dev)}) if clip.duration < 29]
    reader = Clips(build_processor(recipe_stages(["+experiments=quickstart"])[0]), Dropped())
    lines = [f"{len(clips)} clips, mean {np.mean([c.duration for c in clips]):.1f} s, 16 kHz\n",
             "| format | decoded, clips/s | with features, clips/s |", "|---|---|---|"]  # fmt: skip
    samples = [load_audio(clip.audio) for clip in clips]
    for name, (suffix, kind) in FORMATS.items():
        for i, clip in enumerate(clips):
            clip.audio = str(folder / f"{i}.{suffix}")
            soundfile.write(clip.audio, samples[i], SAMPLE_RATE, subtype=kind)
        rates = []
        for read in (lambda clip: load_audio(clip.audio), reader.read):
            times = []
            for _ in range(3):  # take the best time
                started = time.process_time()
                for clip in clips:
                    assert not isinstance(out := read(clip), dict) or "features" in out, out
                times.append(time.process_time() - started)
            rates.append(len(clips) / min(times))
        lines.append(f"| {name} | {rates[0]:.0f} | {rates[1]:.0f} |")
    return lines


def main() -> None:
    """Measure; print the table and write it."""
    cached = assets.prepare()
    path = Path(__file__).parent / f"results/data_{date.today()}.md"
    with tempfile.TemporaryDirectory() as scratch, path.open("w") as file:
        file.write(f"Data, {date.today()}, CPU; `OMP_NUM_THREADS=1 python bench/data.py`\n\n")
        lines = loading(cached, Path(scratch))
        file.write("\n".join(lines) + "\n")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
