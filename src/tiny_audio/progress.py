"""How far long work is: a bar on a terminal, a line now and then in a log."""

import sys
from typing import Any

import datasets
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm
from transformers.utils import logging

LINE_SECONDS = 10.0  # between two lines where nobody watches
LINE = "{desc}: {percentage:3.0f} %, {n_fmt} of {total_fmt}{postfix}, {remaining} left\n"


def progress_bar(**options: Any) -> tqdm:
    """tqdm's bar on a terminal; elsewhere (`nohup`, a CI log) a line every ten seconds."""
    if not sys.stderr.isatty():
        options |= {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "bar_format": LINE}
    return tqdm(**options)


def quiet_libraries() -> None:
    """Without a terminal no bars of other libraries: each redraw would be a line of the log."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
        disable_progress_bars()


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
