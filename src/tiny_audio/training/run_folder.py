"""The folder of a run: its lock, its checkpoints, its recipe, and what to do on a full disk."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from transformers.utils import flatten_dict

NO_SPACE = 2**20  # bytes; a disk with less free space counts as full


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Lock a run's folder, because two runs there would overwrite each other's checkpoints.

    Raises:
        ValueError: if another run holds the lock. A killed run releases it.
    """
    output.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":  # the main process holds the lock for all
        yield
        return
    try:
        with FileLock(output / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise ValueError(f"another run is using {output}: wait for it, or stop it") from error


@contextmanager
def explain_full_disk(output: Path) -> Iterator[None]:
    """Turn the errors of a full disk into one line, and remove partly written files.

    Raises:
        OSError: names the folder, the size of a checkpoint, and the checkpoints that are safe.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(output).free
        if "No space left" not in str(error) and free > NO_SPACE:
            raise
        saved = output.glob("*/checkpoint-*")
        sizes = [sum(file.stat().st_size for file in folder.rglob("*")) for folder in saved]
        safe = [last_checkpoint(stage) for stage in output.iterdir() if stage.is_dir()]
        for path in output.rglob("*.tmp*"):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        needed = f", a checkpoint takes {max(sizes) / 1e6:.0f} MB or more" if sizes else ""
        kept = ", ".join(path for path in safe if path) or "nothing yet"
        raise OSError(
            f"the disk of {output} is full ({free / 1e6:.0f} MB free{needed}). Safe: {kept}. Free "
            "some space; then the same command continues"
        ) from error


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint, or None; removes incomplete ones.

    The trainer writes `trainer_state.json` last, so a checkpoint that has it is complete.
    """
    for path in sorted(folder.glob("checkpoint-[0-9]*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (FileNotFoundError, ValueError):
            print(f"{path}: incomplete, removed")
            shutil.rmtree(path, ignore_errors=True)  # several processes may remove it
    return None


def keep_recipe(cfg: DictConfig, folder: Path) -> None:
    """Save a stage's config in its folder; warn if a resumed run has different settings."""
    path = folder / "training_config.yaml"
    if not (path.exists() and [*folder.glob("checkpoint-*"), *folder.glob("final")]):
        return OmegaConf.save(cfg, path, resolve=True)
    if changed := changed_settings(cfg, path, r"run\.(?!seed)|stages|training\.resume"):
        print(f"warning: {folder} was begun with other settings ({changed}); its learning rates "
              "and optimizer options do not change. run.fresh=true starts over")  # fmt: skip


def changed_settings(cfg: DictConfig, path: Path, ignored: str) -> str:
    """List the settings that differ from a saved config, except keys that match `ignored`."""
    configs: Any = [OmegaConf.to_container(c, resolve=True) for c in (OmegaConf.load(path), cfg)]
    before, now = map(flatten_dict, configs)
    keys = [key for key in before | now if not re.match(ignored, key)]
    return ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys
                     if before.get(key) != now.get(key))  # fmt: skip
