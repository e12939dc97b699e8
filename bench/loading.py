"""Measure how fast a core reads audio out of Parquet, and how many cores each GPU needs.

    OMP_NUM_THREADS=1 python bench/loading.py

The quickstart's dev clips, joined to the 8.4 s that `+experiments=stage1` expects, are read as that
recipe reads them: decoded, made into features, and with their tokens. A GPU takes as much audio a
second as `tiny-audio plan` says. Writes the table to bench/results.
"""

import io
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import soundfile
from made_up import MEAN_SECONDS, Bench, make_bases
from pyarrow import parquet

from tiny_audio.asr.asr_audio import SAMPLE_RATE, load_audio
from tiny_audio.commands import assets
from tiny_audio.commands.plan import OWN, plan_stage, utilisation
from tiny_audio.training.build import build_processor
from tiny_audio.training.checks import Dropped
from tiny_audio.training.data import SpeechDataset
from tiny_audio.training.manifests import read_source
from tiny_audio.training.plan import GPUS

FORMATS = {"FLAC": ("FLAC", "PCM_16"), "MP3": ("MP3", "MPEG_LAYER_III"), "Opus": ("OGG", "OPUS")}
ROUNDS = 3  # the fastest counts


def joined_clips() -> list[tuple[np.ndarray, str]]:
    """Join the dev clips, one after the other, to samples of at least `MEAN_SECONDS`."""
    joined: list[tuple[np.ndarray, str]] = []
    samples, words = np.zeros(0, np.float32), ""
    for clip in read_source({"path": str(assets.prepare().dev)}):
        samples, words = np.append(samples, load_audio(clip.audio)), f"{words} {clip.text}"
        if len(samples) >= MEAN_SECONDS * SAMPLE_RATE:
            joined.append((samples, words))
            samples, words = np.zeros(0, np.float32), ""
    return joined


def write_table(clips: list[tuple[np.ndarray, str]], kind: tuple[str, str], path: Path) -> None:
    """Write clips, encoded as `kind`, as a Parquet table like those of the Hub."""
    rows: list[dict[str, Any]] = []
    for i, (samples, text) in enumerate(clips):
        soundfile.write(file := io.BytesIO(), samples, SAMPLE_RATE, kind[1], format=kind[0])
        rows.append({"id": str(i), "audio": {"bytes": file.getvalue()}, "text": text,
                     "duration": len(samples) / SAMPLE_RATE})  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def read_speed(data: SpeechDataset) -> float:
    """Seconds of audio that are read in a CPU second."""
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        items = [data[i] for i in range(len(data))]
        times.append(time.process_time() - started)
        assert all("features" in item for item in items), items
    return sum(example.duration for example in data.examples) / min(times)


def main() -> None:
    """Measure every format; print the table and write it."""
    clips, speeds = joined_clips(), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), tiny=False)
        make_bases(bench)
        cfg = bench.stage("lora")
        gflop, processor = plan_stage(cfg, OWN).gflop, build_processor(cfg)
        for name, kind in FORMATS.items():
            write_table(clips, kind, path := Path(folder) / f"{name}.parquet")
            speeds[name] = read_speed(SpeechDataset([{"path": str(path)}], processor, Dropped()))
    lines = [
        f"{len(clips)} clips, {date.today()}; `OMP_NUM_THREADS=1 python bench/loading.py`\n",
        "Seconds of audio read in a CPU second: "
        + ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items()),
        f"\n| GPU | its audio-s/s | {' | '.join(f'cores for {name}' for name in FORMATS)} |",
        "|---|---|---|---|---|",
    ]
    for gpu, facts in GPUS.items():
        share, source = utilisation(gpu, None)
        rate = 1e3 * facts["tflops"] * share / gflop
        cores = "".join(f" {rate / speed:.1f} |" for speed in speeds.values())
        lines.append(f"| {gpu}, {share:.0%} {source} | {rate:.0f} |{cores}")
    (Path(__file__).parent / f"results/loading_{date.today()}.md").write_text(
        "\n".join(lines) + "\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
