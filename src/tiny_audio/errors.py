"""Expected errors, and how commands print them."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import HFValidationError


class UserError(RuntimeError):
    """An expected failure; its message says what is wrong and what to do about it."""


class Preempted(RuntimeError):
    """A signal stopped the run, which has saved a checkpoint and can be continued."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: saved; the same command continues")
        self.code = {signal.SIGTERM: 75, signal.SIGINT: 130}[signal.Signals(number)]


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class name if there is none."""
    if isinstance(error.__cause__, HFValidationError):  # the path does not exist
        return "no such folder; `make quickstart` fetches the models of its recipe"
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def clean_exit() -> Iterator[None]:
    """Print an expected error as one line; exit with 75 after SIGTERM and 130 after Ctrl-C."""
    try:
        yield
    except (ValueError, OSError, UserError) as error:
        if os.environ.get("TINY_AUDIO_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"error: out of memory ({one_line(error)}): lower batch_seconds (of `training`, or of "
            "the stage that sets it), or set training.gradient_checkpointing=true"
        )
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print("stopped; the same command continues from its last checkpoint", file=sys.stderr)
        sys.exit(130)
