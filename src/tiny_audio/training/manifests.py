"""Read examples from manifests, folders and Hub datasets, without checking them."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import av
import numpy as np
from datasets import Audio, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError

from ..asr.asr_audio import SAMPLE_RATE, AudioError, load_audio, open_audio
from ..asr.asr_config import check_keys
from ..errors import UserError

# The keys of a data source, with their defaults.
SOURCE: dict[str, Any] = {
    "path": None,  # .jsonl or .csv manifest, folder of audio, or Hub dataset id
    "name": None,  # configuration of a Hub dataset
    "split": "train",
    "revision": None,  # commit of a Hub dataset; default: the newest
    "id_column": "id",
    "audio_column": "audio",
    "text_column": "text",
    "duration_column": "duration",
    "speaker_column": "speaker_id",  # optional; `tiny-audio data check` counts the speakers
    "repeat": 1,  # how often an epoch contains each example
    "sample": None,  # use only N rows: a fixed random sample, or the first N of a stream
    "weight": 1.0,  # streams only: how often this source is drawn relative to the others
}
# The builder of `datasets` for each file suffix. JSON lines are read as text, because the JSON
# builder parses ids that look like dates and reformats them.
BUILDERS = {".jsonl": "text", ".json": "json", ".csv": "csv", ".tsv": "csv",
            ".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # fmt: skip
SEPARATORS = ",;\t|"  # of a table; the most frequent one in its first line is used
# Columns to try for audio and text if the default column is missing.
USUAL_COLUMNS = {
    "audio": ("path", "file", "file_name", "filename", "audio_path", "audio_filepath", "wav"),
    "text": ("sentence", "transcription", "transcript", "normalized_text", "raw_text"),
}
SHARDS_AT_ONCE = 8  # shards of a stream that are open at a time
AUDIO_FOLDERS = ("", "clips", "wavs", "audio")  # where a manifest's audio may be, relative to it


class DataError(UserError):
    """Data that cannot be used for training; the message names the source and the fix."""


@dataclass
class Example:
    """One clip: `audio` is an input of `load_audio`, `duration` is in seconds."""

    id: str
    audio: Any
    text: str
    duration: float
    target: list[int] = field(default_factory=list)
    speaker: str | None = None
    repeat: int = 1


def open_rows(source: dict[str, Any], streaming: bool = False) -> tuple[Any, Path]:
    """Open a source with `datasets`; return its rows and the folder that paths are relative to.

    Sets the audio and text columns of `source` to those found.

    Raises:
        DataError: if the source, its split or one of its columns does not exist.
    """
    path = Path(source["path"]).expanduser()
    columns: list[str] = []
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        arguments: dict[str, Any] = {"path": BUILDERS[path.suffix], "data_files": str(path)}
        arguments["split"] = "train"
        if path.suffix in (".csv", ".tsv", ".jsonl"):
            columns, options = read_header(path)
            arguments |= options
    elif path.is_file():
        raise DataError(f"{path}: unknown file type; known types: {', '.join(BUILDERS)}")
    else:
        arguments = {key: source[key] for key in ("path", "name", "revision", "split")}
    try:
        rows: Any = load_dataset(**arguments, streaming=streaming)
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


def audio_checksum(audio: Any) -> int | None:
    """The CRC-32 of a clip's file or bytes; None if they cannot be read."""
    source = audio if isinstance(audio, dict) else {"path": audio}
    try:
        return crc32(source.get("bytes") or Path(source["path"]).read_bytes())
    except (OSError, TypeError):
        return None


def read_header(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Read the column names of a table or JSON-lines file, and its options for `load_dataset`.

    Raises:
        DataError: if the file is not in UTF-8 or its first line cannot be parsed.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            first, second = (file.readline().rstrip("\n") for _ in range(2))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8: {error}") from error
    if path.suffix == ".jsonl":
        try:
            return list(json.loads(first)), {"encoding": "utf-8-sig"}
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}, line 1 is not a JSON object: {error}") from error
    separator = max(SEPARATORS, key=first.count)
    columns = next(csv.reader([first], delimiter=separator), [])
    fields = next(csv.reader([second], delimiter=separator), [])
    if len(fields) > len(columns):  # pandas would shift the columns
        hint = f"put texts that contain {separator!r} in double quotes"
        raise DataError(f"{path}, line 2 has more fields than the header: {hint}")
    # Read every value as text: "007" is not a number, and "None" is a word.
    options = {"converters": dict.fromkeys(columns, str), "sep": separator}
    if separator == "\t":  # Common Voice does not quote fields
        options["quoting"] = csv.QUOTE_NONE
    return columns, {**options, "keep_default_na": False, "na_values": [""]}


def choose_columns(source: dict[str, Any], columns: Sequence[str]) -> None:
    """Set missing audio and text columns of a source to a usual name that exists.

    Raises:
        DataError: if there is no such column; names the setting to use.
    """
    for key, usual in USUAL_COLUMNS.items():
        setting = f"{key}_column"
        if (wanted := source[setting]) in columns:
            continue
        found = next((name for name in usual if name in columns), None)
        if wanted != SOURCE[setting] or found is None:
            raise DataError(
                f"{source['path']}: no column {wanted!r}; has {list(columns)}. Name it "
                f"in this source: {setting}=..."
            )
        source[setting] = found
        print(f"{source['path']}: the {key} is read from column {found!r}")


def mix_shards(rows: Any, draw: tuple[int, int], rank: int = 0, world: int = 1) -> Any:
    """Shuffle the shards of a stream, and read several at a time.

    Corpora are often sorted by source; in file order, one source would follow the other.

    Args:
        rows: a streaming dataset.
        draw: (seed, epoch), which determines the order.
        rank, world: this process and the number of processes. If the shards divide evenly, each
            process reads its own; otherwise each reads every world-th row.
    """
    # A resumed stream loses the rows that are in the buffer: with one row, it loses none.
    mixed = rows.shuffle(
        generator=np.random.default_rng(draw), buffer_size=1, max_buffer_input_shards=SHARDS_AT_ONCE
    )
    return split_dataset_by_node(mixed, rank, world)


class Reader:
    """Reads the unchecked examples of one source.

    Args:
        source: see `SOURCE`.
        streaming: read the source as a stream.
        state: a result of `state` to continue from; streams only.
        rank, world, draw: see `mix_shards`; streams only.

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
        self.is_jsonl = self.source["path"].endswith(".jsonl")
        self.count, self.over = 0, False
        if state:
            if state["path"] != self.source["path"]:
                raise DataError(
                    f"the checkpoint was reading {state['path']}, but data.train names "
                    f"{self.source['path']}: restore it, or start over with run.fresh=true"
                )
            self.count, self.over = state["count"], state["over"]
        if streaming:
            self.rows = mix_shards(self.rows, draw, rank, world)
        if state:
            self.rows.load_state_dict(state["rows"])
        self.iterator: Iterator[Any] = iter(self.rows)

    def state(self) -> dict[str, Any]:
        """The current position in a stream, ready for JSON."""
        return {"rows": self.rows.state_dict(), "path": self.source["path"],
                "count": self.count, "over": self.over}  # fmt: skip

    def read(self) -> Example | None:
        """The next example, or None at the end; its duration is -1 if unreadable."""
        row, source = None, self.source
        while row is None:
            if (line := next(self.iterator, None)) is None:
                self.over = True
                return None
            row = self.parse(line)
        audio = row[source["audio_column"]]
        if isinstance(audio, str):
            places = [self.folder / folder / audio for folder in AUDIO_FOLDERS]
            audio = str(next((place for place in places if place.is_file()), places[0]))
        if float(row.get("offset") or 0):  # NeMo's manifests of long recordings
            raise DataError(
                f"{source['path']}, row {self.count + 1}: offset is not supported: cut the clips"
            )
        speaker, name = row.get(source["speaker_column"]), row.get(source["id_column"])
        if name in (None, ""):
            name = f"{Path(source['path']).stem}-{self.count}"
        self.count += 1
        return Example(
            id=str(name),
            audio=audio,
            text=str(row[source["text_column"]] or ""),
            duration=self.seconds(row, audio),
            speaker=None if speaker is None else str(speaker),
            repeat=int(source["repeat"]),
        )

    def seconds(self, row: dict[str, Any], audio: Any) -> float:
        """Duration of a clip, from its row if given there, else from its file (-1: unreadable).

        Raises:
            DataError: if the row's duration is not a finite number; names the row.
        """
        stated = row.get(self.source["duration_column"])
        if stated in (None, ""):
            return header_seconds(audio)
        try:
            seconds = float(stated)
        except (TypeError, ValueError):
            seconds = math.nan
        if not math.isfinite(seconds):
            where = f"{self.source['path']}, row {self.count}"
            raise DataError(f"{where}: duration {stated!r} is not a number of seconds")
        return seconds

    def texts(self, count: int) -> Iterator[str]:
        """Yield the texts of the first `count` rows of a stream; no audio is read."""
        column = self.source["text_column"]
        stored = "text" if self.is_jsonl else column  # the column that holds a line of JSON
        for line in self.rows.select_columns([stored]).take(count):
            if row := self.parse(line):
                self.count += 1
                yield str(row[column] or "")

    def parse(self, line: dict[str, Any]) -> dict[str, Any] | None:
        """Return a row of a table as it is; parse a line of a .jsonl, None if it is empty.

        Absent audio and text columns of a line are None.
        """
        if not self.is_jsonl:
            return line
        if not line["text"].strip():
            return None
        wanted = self.source["audio_column"], self.source["text_column"]
        try:
            row = json.loads(line["text"])
            return {**dict.fromkeys(wanted), **row}
        except (ValueError, TypeError) as error:
            where = f"{self.source['path']}, row {self.count + 1} (without empty lines)"
            raise DataError(f"{where} is not a JSON object: {error}") from error


def read_source(source: Any) -> Iterator[Example]:
    """Yield the unchecked examples of one source in file order; see `SOURCE` for its keys."""
    return iter(Reader(source).read, None)


def complete(source: Any) -> dict[str, Any]:
    """Return the source with defaults filled in and a folder replaced by its metadata table.

    Raises:
        DataError: if a folder has no metadata table.
        ValueError: for an unknown key.
    """
    source = {"path": source} if isinstance(source, str) else dict(source)
    check_keys(source, SOURCE, "a data source")
    if not source.get("path"):
        raise DataError(f"a data source needs a path: {source}")
    source = {**SOURCE, **source, "path": str(source["path"])}
    folder = Path(source["path"]).expanduser()
    if folder.is_dir():  # an AudioFolder of `datasets`
        tables = list(folder.glob("metadata.csv")) + list(folder.glob("metadata.jsonl"))
        if not tables and any(folder.rglob("*.parquet")):  # a Hub dataset that was downloaded
            return {**source, "path": str(folder)}
        if not tables:
            raise DataError(
                f"{folder}: no .parquet, and no metadata.csv or .jsonl with file_name and text"
            )
        if source["audio_column"] == "audio":
            source["audio_column"] = "file_name"
        source["path"] = str(tables[0])
    return source


def header_seconds(audio: Any) -> float:
    """Duration in seconds from the file's header; -1 if the file cannot be read.

    If the header gives no duration, the file is decoded.
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
