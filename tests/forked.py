"""Runs of the recipe out of a server process that has imported everything and forks for each."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "tiny_audio.training.train",
        "transformers.models.whisper.modeling_whisper",
        "transformers.models.whisper.feature_extraction_whisper",
        "transformers.models.smollm3.modeling_smollm3",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
    ]
)


def train(overrides: Sequence[str], said: Path) -> None:
    """In a process of its own: `python src/train.py` with its output in a file."""
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    from tiny_audio.training.train import main

    torch.set_num_threads(1)
    # As in a run by hand: a server of this run's own for its workers would outlive a kill.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["train.py", *overrides]
    main()


def start(overrides: Sequence[str], said: Path) -> BaseProcess:
    """Start a run; its process has kill(), terminate(), join() and exitcode."""
    process = SERVER.Process(target=train, args=(list(overrides), said))
    process.start()
    return process
