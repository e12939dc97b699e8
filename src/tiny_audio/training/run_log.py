"""Progress of a run: step lines, log.jsonl, curves.png and experiment trackers."""

import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from ..progress import clock
from .checks import read_log

LOG = "log.jsonl"
DRAW_SECONDS = 60.0  # the curves are drawn at most this often; drawing takes up to a second


class StepLine(TrainerCallback):
    """Prints a line for each log, appends it to `log.jsonl`, and draws the curves now and then.

    Args:
        folder: the stage's folder.
        stages: names of all stages; `curves.png` beside their folders shows them all.
        price: price of an hour in any currency; None omits the cost.
    """

    def __init__(self, folder: Path, stages: Sequence[str], price: float | None) -> None:
        self.path, self.stages, self.price = folder / LOG, stages, price

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; remove log lines of steps that a resumed run will repeat.

        A checkpoint also restores how often to log, evaluate and save; the recipe decides here.
        """
        state.compute_steps(args, state.max_steps)
        self.started = self.drawn = time.monotonic()
        self.first_step = state.global_step
        if not state.is_world_process_zero:
            return
        rows = [row for row in read_log(self.path) if row["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.before = rows[-1]["seconds"] if rows else 0.0  # seconds of training before resuming

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        """Print and log loss, learning rate, speed, padding, dropped examples, ETA and cost."""
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs or ()):
            return
        spent = time.monotonic() - self.started
        row = {"step": state.global_step, "seconds": self.before + spent}
        row |= {key: float(value) for key, value in logs.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if "eval_loss" in logs:
            print(
                f"step {state.global_step:>5}: evaluation loss {logs['eval_loss']:.3f}, "
                f"WER {logs['eval_wer']:.1f} % on {logs['eval_clips']} clips",
                flush=True,
            )
            return
        done = max(1, state.global_step - self.first_step)
        left = spent / done * (state.max_steps - state.global_step)
        parts = [
            f"step {state.global_step:>5}/{state.max_steps} "
            f"{100 * state.global_step / state.max_steps:3.0f} %",
            f"loss {row['loss']:.3f}",
            f"lr {row['learning_rate']:.1e}",
            f"{row['audio_seconds_per_second']:.0f} s audio/s",
            f"padding {100 * row['padding']:.1f} %",
            f"waiting {100 * row['waiting']:.0f} %",
            f"dropped {row['dropped']:.0f}",
            *([f"MFU {100 * row['mfu']:.0f} %"] if "mfu" in row else []),
            f"ETA {clock(left)}",
        ]
        if self.price is not None:
            spent_now, in_all = ((self.before + spent + x) / 3600 * self.price for x in (0, left))
            parts.append(f"cost {spent_now:.2f} of {in_all:.2f}")
        print(" | ".join(parts), flush=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the curves if they are old."""
        if state.is_world_process_zero and time.monotonic() - self.drawn > DRAW_SECONDS:
            draw_curves(self.path.parents[1], self.stages)
            self.drawn = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the curves; warn if a GPU waited for data."""
        if not state.is_world_process_zero:
            return
        draw_curves(self.path.parents[1], self.stages)
        waiting = [row["waiting"] for row in read_log(self.path) if "waiting" in row]
        late = sum(share > 0.05 for share in waiting)
        if late and args.device.type != "cpu":  # a CPU reads and computes on the same cores
            print(f"warning: in {late} of {len(waiting)} log lines the GPU waited for data more "
                  "than 5 % of the time: raise training.dataloader_num_workers")  # fmt: skip


def draw_curves(output: Path, stages: Sequence[str]) -> None:
    """Write `curves.png`: loss, WER and learning rate of the stages under `output`."""
    from matplotlib.figure import Figure  # not pyplot, which keeps global state

    logs = {stage: read_log(output / stage / LOG) for stage in stages}
    figure = Figure(figsize=(11, 3.2))
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.17, top=0.9, wspace=0.25)
    panels = (("loss", ("loss", "eval_loss")), ("WER %", ("eval_wer",)),
              ("learning rate", ("learning_rate",)))  # fmt: skip
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels, strict=True):
        start = 0
        for stage, rows in logs.items():
            for key in keys:
                points = [(start + row["step"], row[key]) for row in rows if key in row]
                if points:
                    style = "o-" if key.startswith("eval_") else "-"
                    axes.plot(*zip(*points, strict=True), style, ms=3, lw=1, label=f"{stage} {key}")
            start += max((row["step"] for row in rows), default=0)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(output / "curves.png", dpi=110)


def start_trackers(wanted: Any, folder: Path, config: dict[str, Any]) -> list[str]:
    """Start the trackers of a stage and return their names.

    If `wanted` is None or "wandb", wandb is started if it is installed and has a key (or
    WANDB_MODE=offline). Otherwise, a line says why it was not started.

    Raises:
        ValueError: if a tracker other than wandb is named and not installed.
    """
    if wanted not in (None, "wandb", ["wandb"]):
        trackers = [] if wanted == "none" else [wanted] if isinstance(wanted, str) else list(wanted)
        if missing := {*trackers} - {*get_available_reporting_integrations()}:
            raise ValueError(f"training.report_to: {sorted(missing)} not installed")
        return trackers
    local = f"the log is in {folder / LOG}"
    if find_spec("wandb") is None:
        print(f"wandb is not installed (pip install 'tiny-audio[wandb]'): {local}")
        return []
    import wandb

    try:
        wandb.finish()  # the run of the stage before
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            print(f"wandb has no key (WANDB_API_KEY, or `wandb login`): {local}")
            return []
        mark = folder / "wandb_id"  # a resumed run continues the same curve
        if not mark.exists():
            mark.write_text(secrets.token_hex(4))
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tiny-audio"),
            name=f"{folder.parent.name}/{folder.name}",
            id=mark.read_text(),
            resume="allow",
            dir=str(folder.parent),
            config=config,
            settings=wandb.Settings(init_timeout=30),
        )
    except (wandb.Error, OSError, TypeError) as error:  # TypeError: wandb is older than 0.30
        print(f"wandb cannot be reached ({type(error).__name__}): {local}")
        return []
    return ["wandb"]


def finish_trackers() -> None:
    """Wait until wandb, if it was started, has written the run of the last stage."""
    if wandb := sys.modules.get("wandb"):
        wandb.finish()
