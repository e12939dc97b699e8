"""The verbs of `tiny-audio`, one file each; `cli.py` lists them."""

import csv
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from inspect import cleandoc
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """The cache folder: $TINY_AUDIO_CACHE or ~/.cache/tiny-audio."""
    return Path(os.environ.get("TINY_AUDIO_CACHE", "~/.cache/tiny-audio")).expanduser()


def home_path(text: str) -> Path:
    """Argparse type for a path: expands ~, which a shell does not do in `--option=~/x`."""
    return Path(text).expanduser()


def parser_of(program: str, doc: str | None) -> ArgumentParser:
    """Create the argument parser of a program, with `doc` as its unformatted description."""
    form = RawDescriptionHelpFormatter
    return ArgumentParser(program, description=cleandoc(doc or ""), formatter_class=form)


def append_row(table: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file, which gets a header when it is new."""
    with table.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*row])
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
