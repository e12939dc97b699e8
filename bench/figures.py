"""Draw the figures of docs/decoding.md: how the character head learns to spell.

    python bench/figures.py                            # draw them, as `make docs` does
    python bench/figures.py --measure outputs/figures  # first take their data from a run

The run is a quickstart with frequent evaluations and checkpoints. Only its first stage is used; it
may be stopped after that:

    python src/train.py +experiments=quickstart run.output_dir=outputs/figures model.tune=false \\
        stages.0.training.eval_steps=100 stages.0.training.save_steps=20 \\
        training.save_total_limit=null
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from tiny_audio.asr.asr_audio import load_audio
from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_processing import ASRProcessor
from tiny_audio.commands import cache_dir, parser_of
from tiny_audio.training.checks import read_log
from tiny_audio.training.manifests import read_source
from tiny_audio.training.run_log import LOG

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
DATA = "learning.json"
CLIP = "conf-waitforleader"  # of the evaluation clips
STEPS = (40, 60, 80, 100, 2000)  # checkpoints to show
BATCH_SECONDS = 64  # of the stage
# The same data gives the same bytes, so that a test can compare them.
matplotlib.rcParams |= {"svg.hashsalt": "tiny-audio", "svg.fonttype": "none", "font.size": 9}


def learning(log: Path) -> list[tuple[float, float]]:
    """Seconds of training, without evaluations, and WER in percent at each evaluation."""
    points: list[tuple[float, float]] = []
    seconds, step = 0.0, 0
    for row in read_log(log):
        if "eval_wer" in row:
            points.append((round(seconds, 1), round(row["eval_wer"], 2)))
        elif "loss" in row:
            audio = (row["step"] - step) * BATCH_SECONDS * (1 - row["padding"])
            seconds += audio / row["audio_seconds_per_second"]
            step = row["step"]
    return points


@torch.no_grad()
def heard(checkpoint: Path, audio: Any) -> list[tuple[str, float]]:
    """The most probable letter of each frame ("" for a blank) and its probability."""
    model = ASRModel.from_pretrained(checkpoint)
    processor = ASRProcessor.from_pretrained(checkpoint)
    batch = processor.collate([processor.features(load_audio(audio))])
    hidden, _ = model.encode(batch["input_features"], batch["input_features_mask"])
    sure, best = model.characters(hidden)[0].exp().max(-1)
    letters = ["", *map(chr, processor.alphabet)]
    return [(letters[c], round(p, 3)) for c, p in zip(best.tolist(), sure.tolist(), strict=True)]


def measure(run: Path) -> dict[str, Any]:
    """Take the data of both figures from a run."""
    dev = read_source({"path": str(cache_dir() / "speech" / "dev.jsonl")})
    clip = next(clip for clip in dev if clip.id == CLIP)
    stage = run / "characters"
    frames = {step: heard(stage / f"checkpoint-{step}", clip.audio) for step in STEPS}
    clips = next(int(row["eval_clips"]) for row in read_log(stage / LOG) if "eval_clips" in row)
    return {"text": clip.text, "seconds": clip.duration, "learning": learning(stage / LOG),
            "clips": clips, "heard": frames}  # fmt: skip


def draw(data: dict[str, Any], folder: Path) -> None:
    """Write alignment.svg and learning.svg."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(len(data["heard"]), 1, sharex=True)
    for axes, (step, frames) in zip(panels, data["heard"].items(), strict=True):
        width, before, text = data["seconds"] / len(frames), "", ""
        for i, (letter, sure) in enumerate(frames):
            if letter:
                axes.bar(i * width, sure, width, align="edge", color="tab:blue")
            if letter not in ("", before):
                text += letter
                axes.text(i * width, sure + 0.05, letter.replace(" ", "_"), family="monospace")
            before = letter
        axes.set(ylim=(0, 1.3), ylabel="probability", title=f"after {step} steps: {text}")
    panels[-1].set_xlabel(f"seconds; the speaker says: {data['text']}")
    save(figure, folder / "alignment.svg")
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*data["learning"], strict=True), "o-", markersize=3)
    label = f"WER % on {data['clips']} unseen clips"
    axes.set(xlabel="seconds of training", ylabel=label, ylim=(0, None))
    axes.grid(alpha=0.3)
    save(figure, folder / "learning.svg")


def save(figure: Figure, path: Path) -> None:
    """Write a figure without the date."""
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draw, and measure before it if asked."""
    parser = parser_of("python bench/figures.py", __doc__)
    parser.add_argument("--measure", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: docs/figures")
    args = parser.parse_args()
    if args.measure:
        (FOLDER / DATA).write_text(json.dumps(measure(args.measure)) + "\n")
    draw(json.loads((FOLDER / DATA).read_text()), args.out)


if __name__ == "__main__":
    main()
