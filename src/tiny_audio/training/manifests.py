"""Manifests, folders and Hub datasets -> examples, as they are written and unchecked."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from datasets import Audio, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError

from ..asr.asr_config import check_keys
from ..asr.asr_processing import SAMPLE_RATE, AudioError, load_audio, open_audio

# Defaults of a source: where its rows come from and how they are named there.
SOURCE: dict[str, Any] = {
    "path": None,  # .jsonl or .csv manifest, folder of audio, or Hub dataset id
    "name": None,  # configuration of a Hub dataset
    "split": "train",
    "revision": None,  # commit of a Hub dataset; the newest by default
    "id_column": "id",
    "audio_column": "audio",
    "text_column": "text",
    "duration_column": "duration",
    "speaker_column": "speaker_id",  # counted by `tiny-audio data check`, if there is one
    "repeat": 1,  # times that each example is seen in an epoch
    "sample": None,  # so many rows of it, drawn once and for all (of a stream: the first)
    "silence": False,  # its clips hold no speech: an empty transcript is meant
    "weight": 1.0,  # of a stream: how often it is drawn from, beside the others
}
# What reads a file, by its ending. JSON lines are read as text: `datasets` would take an id that
# looks like a date for one, and write it in another way.
BUILDERS = {".jsonl": "text", ".json": "json", ".csv": "csv", ".tsv": "csv",
            ".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # fmt: skip
SEPARATORS = ",;\t|"  # of a table: the one that its first line has most of
# Columns that are taken for the audio and the text where there is none of the usual name.
USUAL_COLUMNS = {
    "audio": ("path", "file", "file_name", "filename", "audio_path", "audio_filepath", "wav"),
    "text": ("sentence", "transcription", "transcript", "normalized_text", "raw_text"),
}
SHARDS_AT_ONCE = 8  # of a stream
AUDIO_FOLDERS = ("", "clips", "wavs", "audio")  # beside a manifest, where its files may lie


class DataError(RuntimeError):
    """Data that cannot be trained on; the message names the source and the fix."""


@dataclass
class Example:
    """One clip: `audio` is what `load_audio` takes, `duration` is in seconds, `source` a name."""

    id: str
    audio: Any
    text: str
    duration: float
    target: list[int] = field(default_factory=list)
    silence: bool = False
    speaker: str | None = None
    repeat: int = 1
    source: str = ""


def open_rows(source: dict[str, Any], streaming: bool = False) -> tuple[Any, Path]:
    """Rows of one source as `datasets` reads them, and the folder that paths are relative to.

    The audio and text columns of `source` are set to those that were found.

    Raises:
        DataError: when the source, its split or one of its columns does not exist.
    """
    path = Path(source["path"]).expanduser()
    columns: list[str] = []
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        what: dict[str, Any] = {"path": BUILDERS[path.suffix], "data_files": str(path)}
        what["split"] = "train"
        if path.suffix in (".csv", ".tsv", ".jsonl"):
            columns, options = read_header(path)
            what |= options
    elif path.is_file():
        raise DataError(f"{path}: not read; the endings that are: {', '.join(BUILDERS)}")
    else:
        what = {key: source[key] for key in ("path", "name", "revision", "split")}
    try:
        rows: Any = load_dataset(**what, streaming=streaming)
    except (DatasetsError, UnicodeDecodeError) as error:
        raise DataError(f"{source['path']}: {error.__cause__ or error}") from error
    except ValueError as error:
        empty = "corresponds to no data" in str(error)
        raise DataError(f"{source['path']}: {'no rows' if empty else error}") from error
    columns = columns or rows.column_names or list(next(iter(rows), {}))
    choose_columns(source, columns)
    features = rows.features or {}
    if isinstance(features.get(source["audio_column"]), Audio):
        rows = rows.cast_column(source["audio_column"], Audio(decode=False))
    if n := source["sample"]:
        if streaming:
            rows = rows.take(n)
        elif n < len(rows):
            rows = rows.shuffle(seed=0).select(range(n))
    return rows, path.parent


def read_header(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Names of the columns of a table or of JSON lines, and how `load_dataset` is to read it.

    Raises:
        DataError: when the first line is none of either.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline().rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8: {error}") from error
    if path.suffix == ".jsonl":
        try:
            return list(json.loads(first)), {"encoding": "utf-8-sig"}
        except ValueError as error:
            raise DataError(f"{path}, line 1 is no JSON object: {error}") from error
    separator = max(SEPARATORS, key=first.count)
    columns = next(csv.reader([first], delimiter=separator), [])
    # Every value as it is written: "007" is no number, and "None" is a word.
    options = {"converters": dict.fromkeys(columns, str), "sep": separator}
    if separator == "\t":  # nothing is quoted in tables of Common Voice
        options["quoting"] = csv.QUOTE_NONE
    return columns, {**options, "keep_default_na": False, "na_values": [""]}


def choose_columns(source: dict[str, Any], columns: Sequence[str]) -> None:
    """Set the audio and text columns of a source to usual names where the given ones are missing.

    Raises:
        DataError: naming the setting that says which column it is.
    """
    for key, usual in USUAL_COLUMNS.items():
        setting = f"{key}_column"
        if (wanted := source[setting]) in columns:
            continue
        found = next((name for name in usual if name in columns), None)
        if wanted != SOURCE[setting] or found is None:
            raise DataError(
                f"{source['path']}: no column {wanted!r}; has {list(columns)}. Name it with "
                f"{setting}=..."
            )
        source[setting] = found
        print(f"{source['path']}: the {key} is read from column {found!r}")


class Shards:
    """The rows of a stream whose shards are read in a drawn order, several at a time.

    A corpus is often sorted by its sources: in file order one source would be seen after the other.

    Args:
        rows: a streaming dataset.
        draw: seed and epoch, which fix the order.
        rank, world: of this process. Each reads shards of its own where they can be shared evenly,
            else every world-th row, in file order.
        state: to go on from, see `state`.
    """

    def __init__(
        self, rows: Any, draw: tuple[int, int], rank: int = 0, world: int = 1, state: Any = None
    ) -> None:
        self.rows, self.count = rows, rows.num_shards
        if self.count % world:
            self.rows, self.count = split_dataset_by_node(rows, rank, world), 1
            rank, world = 0, 1
        order = np.random.default_rng(draw).permutation(self.count)
        self.order: list[int] = order[rank::world].tolist()
        self.opened, self.turn = 0, 0
        self.parts: list[tuple[int, Any, Iterator[Any]]] = []  # its number, its rows, its iterator
        if state:
            self.opened, self.turn = state["opened"], state["turn"]
            self.parts = [self.part(number, at) for number, at in state["parts"]]

    def part(self, number: int, state: Any = None) -> tuple[int, Any, Iterator[Any]]:
        """A shard from a state on."""
        rows = self.rows if self.count == 1 else self.rows.shard(self.count, number)
        if state:
            rows.load_state_dict(state)
        return number, rows, iter(rows)

    def state(self) -> dict[str, Any]:
        """What to go on from, in JSON's types."""
        parts = [[number, rows.state_dict()] for number, rows, _ in self.parts]
        return {"opened": self.opened, "turn": self.turn, "parts": parts}

    def __iter__(self) -> "Shards":
        return self

    def __next__(self) -> Any:
        while self.parts or self.opened < len(self.order):
            while len(self.parts) < SHARDS_AT_ONCE and self.opened < len(self.order):
                self.parts.append(self.part(self.order[self.opened]))
                self.opened += 1
            slot = self.turn % len(self.parts)
            row = next(self.parts[slot][2], None)
            if row is not None:
                self.turn += 1
                return row
            del self.parts[slot]
        raise StopIteration


class Reader:
    """One source, read from a `state` on: examples as they are, unchecked.

    Args:
        source: see `SOURCE`.
        streaming: read as it comes, by `world` processes that share it, of which this is `rank`.
        draw: of a stream, see `Shards`.

    Raises:
        DataError: see `open_rows`.
    """

    def __init__(
        self,
        source: Any,
        streaming: bool = False,
        state: Any = None,
        rank: int = 0,
        world: int = 1,
        draw: tuple[int, int] = (0, 0),
    ) -> None:
        self.source = complete(source)
        self.rows, self.folder = open_rows(self.source, streaming)
        self.count, self.over = 0, False
        if state:
            if state["path"] != self.source["path"]:
                raise DataError(
                    f"the checkpoint stands in {state['path']}, not in {self.source['path']}"
                )
            self.count, self.over = state["count"], state["over"]
        at = state and state["rows"]
        self.shards = Shards(self.rows, draw, rank, world, at) if streaming else None
        self.iterator: Iterator[Any] = self.shards or iter(self.rows)

    def state(self) -> dict[str, Any]:
        """What to go on from, in JSON's types; of a stream."""
        assert self.shards
        return {"rows": self.shards.state(), "path": self.source["path"], "count": self.count,
                "over": self.over}  # fmt: skip

    def read(self) -> Example | None:
        """The next example, None at the end; its duration is -1 where no header says it."""
        row, source = next(self.iterator, None), self.source
        if source["path"].endswith(".jsonl"):
            while row is not None and not row["text"].strip():  # an empty line
                row = next(self.iterator, None)
            row = row and self.parse(row["text"])
        if row is None:
            self.over = True
            return None
        audio = row[source["audio_column"]]
        if isinstance(audio, str):
            places = [self.folder / folder / audio for folder in AUDIO_FOLDERS]
            audio = str(next((place for place in places if place.is_file()), places[0]))
        speaker = row.get(source["speaker_column"])
        self.count += 1
        return Example(
            id=str(row.get(source["id_column"]) or f"{Path(source['path']).stem}-{self.count - 1}"),
            audio=audio,
            text=str(row[source["text_column"]] or ""),
            duration=self.seconds(row, audio),
            silence=source["silence"],
            speaker=None if speaker is None else str(speaker),
            repeat=int(source["repeat"]),
            source="-".join(filter(None, (Path(source["path"]).stem, source["name"]))),
        )

    def seconds(self, row: dict[str, Any], audio: Any) -> float:
        """How long a row says that its clip is, or else the clip's own header.

        Raises:
            DataError: naming the row, where that is no number of seconds.
        """
        said = row.get(self.source["duration_column"])
        if said in (None, ""):
            return header_seconds(audio)
        try:
            seconds = float(said)
        except (TypeError, ValueError):
            seconds = math.nan
        if not math.isfinite(seconds):
            where = f"{self.source['path']}, row {self.count}"
            raise DataError(f"{where}: duration {said!r} is no number of seconds")
        return seconds

    def parse(self, line: str) -> dict[str, Any]:
        """A row from a line of JSON."""
        wanted = self.source["audio_column"], self.source["text_column"]
        try:
            row = json.loads(line)
            return {**dict.fromkeys(wanted), **row}
        except (ValueError, TypeError) as error:
            where = f"{self.source['path']}, row {self.count + 1}"
            raise DataError(f"{where} is no JSON object: {error}") from error


def read_source(source: Any) -> Iterator[Example]:
    """Examples of one source as they are, unchecked, in file order. See `SOURCE` for its keys."""
    return iter(Reader(source).read, None)


def complete(source: Any) -> dict[str, Any]:
    """A source with its defaults; unknown keys are refused."""
    check_keys(dict(source), SOURCE, "a data source")
    source = {**SOURCE, **dict(source), "path": str(dict(source).get("path"))}
    folder = Path(source["path"]).expanduser()
    if folder.is_dir():  # of audio, with the table that `datasets` calls metadata
        tables = list(folder.glob("metadata.csv")) + list(folder.glob("metadata.jsonl"))
        if not tables:
            raise DataError(f"{folder}: no metadata.csv or .jsonl with file_name and text in it")
        if source["audio_column"] == "audio":
            source["audio_column"] = "file_name"
        source["path"] = str(tables[0])
    return source


def header_seconds(audio: Any) -> float:
    """Duration in seconds from the file's header, decoding nothing; -1 where it cannot be read.

    A file whose header does not say (0) is decoded.
    """
    source = audio
    if isinstance(audio, dict):
        source = io.BytesIO(audio["bytes"]) if audio.get("bytes") else audio.get("path")
    try:
        if isinstance(source, str | io.BytesIO):
            with open_audio(source) as container:
                if container.duration:
                    return container.duration / av.time_base
        return len(load_audio(audio)) / SAMPLE_RATE
    except (av.FFmpegError, OSError, AudioError):
        return -1.0
