"""Progress of long work: a bar on a terminal, or a line every few seconds in a log."""

import sys
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm
from transformers.utils import logging

LINE_SECONDS = 10.0  # between two lines of a log
LINE = "{desc}: {percentage:3.0f} %, {n_fmt} of {total_fmt}{postfix}, {remaining} left\n"


def progress_bar(**options: Any) -> tqdm:
    """Return tqdm's bar; without a terminal (`nohup`, CI) it logs a line every ten seconds."""
    if not sys.stderr.isatty():
        options |= {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "bar_format": LINE}
    return tqdm(**options)


def quiet_libraries() -> None:
    """Silence messages of other libraries that need no action.

    Trainer reports in every stage that the special tokens are the tokenizer's. `datasets` warns
    that a resumed stream loses its buffer, where ours has none. In a log, a progress bar would add
    a line for each redraw.
    """
    for name in ("transformers.trainer_utils", "datasets.iterable_dataset"):
        logging.get_logger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        if "datasets" in sys.modules:  # only training imports it, and the import takes a second
            sys.modules["datasets"].disable_progress_bars()
        disable_progress_bars()


def clock(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
