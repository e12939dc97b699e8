"""One file for each verb of `tiny-audio`; `cli.py` lists them."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from inspect import cleandoc
from pathlib import Path


def home_path(text: str) -> Path:
    """A path given as `--option=~/x`, where no shell knows that ~ is a home; for argparse."""
    return Path(text).expanduser()


def parser_of(verb: str, doc: str | None) -> ArgumentParser:
    """The parser of a verb's arguments, whose help is `doc` as it is written."""
    form = RawDescriptionHelpFormatter
    return ArgumentParser(
        f"tiny-audio {verb}", description=cleandoc(doc or ""), formatter_class=form
    )
