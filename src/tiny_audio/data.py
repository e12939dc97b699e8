"""Datasets -> checked examples -> batches by a budget of padded audio seconds.

Every example that cannot be used is skipped with a reason, counted and named; nothing is cut to
fit. The order of batches depends on (seed, epoch) alone, so that a resumed run repeats it.
"""

import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from datasets import Audio, load_dataset
from torch.utils.data import Dataset, Sampler
from transformers import BatchFeature

from .asr_config import check_keys
from .asr_processing import SAMPLE_RATE, ASRProcessor, AudioError, load_audio

logger = logging.getLogger(__name__)
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
    "repeat": 1,  # times that each example is seen in an epoch
}
ANNOTATION = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\([^()]*\)")


class DataError(RuntimeError):
    """Data that cannot be trained on; the message names the source and the fix."""


@dataclass
class Example:
    """One clip: `audio` is what `load_audio` takes, `duration` is in seconds."""

    id: str
    audio: Any
    text: str
    duration: float
    target: list[int] = field(default_factory=list)


class Dropped:
    """Counts of the examples that were skipped, by reason, with the ids, also in a JSONL file."""

    def __init__(self, path: Path | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.seen: set[str] = set()
        self.path = path

    def add(self, example_id: str, reason: str, detail: str = "") -> None:
        """Note a skipped example; one that was noted before is not counted again."""
        if example_id in self.seen:
            return
        self.seen.add(example_id)
        self.counts[reason] += 1
        self.first.setdefault(reason, example_id)
        if self.path is not None:
            with self.path.open("a") as file:
                row = {"id": example_id, "reason": reason, "detail": detail}
                file.write(json.dumps(row) + "\n")

    def __str__(self) -> str:
        parts = [f"{n} {reason} (first: {self.first[reason]})" for reason, n in self.counts.items()]
        return ", ".join(parts) or "none"

    def check(self, total: int, allowed: float) -> None:
        """Raise DataError when more than the share `allowed` of `total` examples was dropped."""
        count = sum(self.counts.values())
        if count > allowed * total:
            raise DataError(
                f"{count} of {total} examples were dropped, more than data.max_dropped_fraction="
                f"{allowed}: {self}. Mend the data, or raise the limit"
            )


def prepare_text(text: str, lowercase: bool = False) -> str:
    """Training text: annotation marks removed, white space folded, ALL-CAPS text lowered.

    Case, digits and punctuation are kept, so that a model can learn them; `lowercase` drops case
    and all punctuation but the apostrophe, for small recipes.
    """
    text = " ".join(ANNOTATION.sub(" ", text).split())
    if lowercase:
        text = " ".join(re.sub(r"[^\w' ]+", " ", text.lower()).split())
    return text.lower() if text.isupper() and len(text) > 3 else text


def read_source(source: dict[str, Any]) -> Iterator[Example]:
    """Rows of one source as they are, unchecked, in file order. See `SOURCE` for its keys.

    Raises:
        DataError: when the source, its split or one of its columns does not exist.
    """
    check_keys(source, SOURCE, "a data source")
    source = {**SOURCE, **source}
    path = Path(str(source["path"])).expanduser()
    if path.suffix in (".jsonl", ".json", ".csv", ".tsv"):
        if not path.is_file():
            raise DataError(f"manifest {path}: no such file")
        kind = "json" if path.suffix.startswith(".json") else "csv"
        rows = load_dataset(kind, data_files=str(path), split="train")
    elif path.is_dir():
        rows = load_dataset("audiofolder", data_dir=str(path), split=source["split"])
    else:
        at = {"split": source["split"], "revision": source["revision"]}
        rows = load_dataset(str(source["path"]), source["name"], **at)
    for key in ("audio_column", "text_column"):
        if source[key] not in rows.column_names:
            raise DataError(f"{source['path']}: no column {source[key]!r}; has {rows.column_names}")
    if isinstance(rows.features[source["audio_column"]], Audio):
        rows = rows.cast_column(source["audio_column"], Audio(decode=False))
    row: Any
    for i, row in enumerate(rows):
        audio = row[source["audio_column"]]
        if isinstance(audio, str):
            audio = str(path.parent / audio)
        duration = row.get(source["duration_column"])
        yield Example(
            id=str(row.get(source["id_column"], f"{path.stem}-{i}")),
            audio=audio,
            text=row[source["text_column"]] or "",
            duration=header_seconds(audio) if duration is None else float(duration),
        )


def header_seconds(audio: Any) -> float:
    """Duration in seconds from the file's header, decoding nothing; 0 where it cannot be read."""
    source = audio
    if isinstance(audio, dict):
        source = audio.get("path") if audio.get("bytes") is None else None
    if source is None:
        return len(load_audio(audio)) / SAMPLE_RATE
    try:
        container: Any
        with av.open(source) as container:
            return (container.duration or 0) / av.time_base
    except (av.FFmpegError, OSError):
        return 0.0


class FrameWriter:
    """Writes encoder frames (t, d) of clips into one flat fp16 file, as they come.

    `path` (.json) is the index, written last: while it is missing the file is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.index, self.width = path, dict[str, tuple[int, int]](), 0
        self.at = 0

    def __enter__(self) -> "FrameWriter":
        self.file = self.path.with_suffix(".f16").open("wb")
        return self

    def add(self, clip: str, frames: np.ndarray) -> None:
        """Append the frames of one clip."""
        self.index[clip] = (self.at, len(frames))
        self.at, self.width = self.at + len(frames), frames.shape[1]
        self.file.write(frames.tobytes())

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.file.close()
        if kind is None:
            index = {"width": self.width, "clips": self.index}
            self.path.with_suffix(".tmp").write_text(json.dumps(index))
            self.path.with_suffix(".tmp").replace(self.path)


class Frames(dict[str, torch.Tensor]):
    """What a `FrameWriter` wrote: frames (t, d) in fp16 by clip, read from disk when used."""

    def __init__(self, path: Path) -> None:
        index = json.loads(path.read_text())
        flat: Any = np.memmap(path.with_suffix(".f16"), np.float16, mode="c")
        rows = torch.from_numpy(flat).view(-1, index["width"])
        super().__init__({clip: rows[at : at + n] for clip, (at, n) in index["clips"].items()})


class SpeechDataset(Dataset):
    """Checked examples, read and turned into features when asked for.

    Args:
        sources: see `SOURCE`.
        processor: makes features and targets.
        dropped: where skipped examples are noted.
        min_seconds, max_seconds: clips outside are skipped.
        lowercase: see `prepare_text`.
        max_train_samples: keep the first so many of each epoch; None keeps all.
        feature_noise: standard deviation of noise on cached encoder frames.
        channel_drop: share of channels of cached encoder frames that are dropped.
        time_mask: longest run of cached encoder frames that is dropped.
        seed: of the augmentation, with the epoch and the example's id.

    `item[i]` is a dict with `id`, `seconds`, `features` (time first) and `target` (token ids), or
    with `id`, `reason` and `detail` for an example that cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[dict[str, Any]],
        processor: ASRProcessor,
        dropped: Dropped,
        min_seconds: float = 0.1,
        max_seconds: float = 30.0,
        lowercase: bool = False,
        max_train_samples: int | None = None,
        feature_noise: float = 0.0,
        channel_drop: float = 0.0,
        time_mask: int = 0,
        seed: int = 0,
    ) -> None:
        self.processor, self.dropped = processor, dropped
        self.feature_noise, self.channel_drop = feature_noise, channel_drop
        self.time_mask, self.seed, self.epoch = time_mask, seed, 0
        self.encoded: Any = None  # encoder frames by id, once there is a cache of them
        self.examples: list[Example] = []
        self.total = 0
        known: set[str] = set()  # ids: reports and cached frames go by them
        for source in sources:
            for example in read_source(dict(source)):
                self.total += 1
                if example.id in known:
                    example.id = f"{example.id}@{self.total}"
                known.add(example.id)
                example.text = prepare_text(example.text, lowercase)
                example.target = processor.tokenize(example.text)
                if reason := self._unfit(example, min_seconds, max_seconds):
                    dropped.add(example.id, reason, f"{example.duration:.2f} s")
                    continue
                repeat = int(source.get("repeat", 1))
                self.examples += [example] * repeat
        self.examples = self.examples[:max_train_samples]
        if not self.examples:
            raise DataError(f"no usable example in {[s.get('path') for s in sources]}: {dropped}")

    def _unfit(self, example: Example, low: float, high: float) -> str | None:
        if not example.text:
            return "empty text"
        if not low <= example.duration <= high:
            return "shorter than min_seconds" if example.duration < low else "over max_seconds"
        frames = self.processor.frames_for_seconds(example.duration)
        target = example.target
        repeats = sum(a == b for a, b in pairwise(target))
        if len(target) + repeats > frames:  # each token needs a frame, a repeat a blank too
            return "more tokens than frames"
        return None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        item = {"id": example.id, "seconds": example.duration, "target": example.target}
        if self.encoded is not None:
            frames = self.encoded[example.id]
            return {**item, "features": self.augment(frames, example.id)}
        try:
            samples = load_audio(example.audio)
        except AudioError as error:
            return {"id": example.id, "reason": "unreadable audio", "detail": str(error)}
        if not samples.any():
            return {"id": example.id, "reason": "silent", "detail": "every sample is zero"}
        return {**item, "features": self.processor.features(samples)}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that `augment` draws for; the trainer calls it."""
        self.epoch = epoch

    def serve_encoded(self, encoded: dict[str, torch.Tensor]) -> None:
        """Serve cached encoder frames: `encoded` holds (t, d_encoder) by the examples' ids.

        Examples that are not in it could not be read when it was made; they are left out.
        """
        self.encoded = encoded
        for example in self.examples:
            if example.id not in encoded:
                self.dropped.add(example.id, "no cached frames")
        self.examples = [example for example in self.examples if example.id in encoded]

    def augment(self, frames: torch.Tensor, example_id: str) -> torch.Tensor:
        """Noise, dropped channels and a dropped run of frames on encoder frames (t, d).

        Drawn from (seed, epoch, id), so that a resumed run repeats it.
        """
        rng = torch.Generator().manual_seed(
            zlib.crc32(f"{self.seed}/{self.epoch}/{example_id}".encode())
        )
        x = frames.float()
        if self.channel_drop:
            kept = torch.rand(x.shape[1], generator=rng) >= self.channel_drop
            x = x * kept / (1 - self.channel_drop)
        if self.feature_noise:
            x = x + self.feature_noise * torch.randn(x.shape, generator=rng)
        if self.time_mask:
            width = int(torch.randint(self.time_mask + 1, (), generator=rng))
            start = int(torch.randint(max(1, len(x) - width), (), generator=rng))
            x[start : start + width] = 0
        return x

    def collate(self, items: list[dict[str, Any]]) -> BatchFeature:
        """A batch for `ASRModel`, with `ids`, `seconds` of audio and `dropped` beside it."""
        good = [item for item in items if "features" in item]
        if not good:
            raise DataError(f"every example of a batch is unusable: {items[0]}")
        batch = self.processor.collate(
            [item["features"] for item in good],
            [item["target"] for item in good],
            encoded=self.encoded is not None,
        )
        batch["ids"] = [item["id"] for item in good]
        batch["seconds"] = sum(item["seconds"] for item in good)
        batch["dropped"] = [item for item in items if "features" not in item]
        return batch


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of similar length whose padded audio stays within `batch_seconds`.

    Examples are sorted by their duration with up to 3 % of jitter, cut into batches by the budget,
    and the batches are shuffled; all drawn from (seed, epoch). `most` limits the clips in a batch
    as well.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        batch_seconds: float,
        seed: int = 0,
        shuffle: bool = True,
        most: int | None = None,
    ) -> None:
        self.seconds, self.most = np.asarray(seconds), most or len(seconds)
        if self.seconds.max() > batch_seconds:
            raise DataError(
                f"training.batch_seconds={batch_seconds} is below the longest clip "
                f"({self.seconds.max():.1f} s)"
            )
        self.batch_seconds, self.seed, self.shuffle = batch_seconds, seed, shuffle
        self.epoch = self.count = 0
        most = max(len(self._make(epoch)) for epoch in range(8)) if shuffle else 0
        self.count = min(len(self.seconds), most + most // 50 + (most > 0))
        self.batches = self._make(0)
        self.count = len(self.batches)
        self.batch_size = 1  # accelerate asks; batches have no fixed size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration shuffles for."""
        self.epoch = epoch

    def _make(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        jitter = rng.uniform(0.97, 1.03, len(self.seconds)) if self.shuffle else 1.0
        batches: list[list[int]] = []
        batch: list[int] = []
        longest = 0.0
        for i in np.argsort(-self.seconds * jitter, kind="stable"):
            longest = max(longest, self.seconds[i])
            full = len(batch) == self.most or longest * (len(batch) + 1) > self.batch_seconds
            if batch and full:
                batches.append(batch)
                batch, longest = [], self.seconds[i]
            batch.append(int(i))
        batches.append(batch)
        # Jitter moves the count by a batch or two; the trainer needs one number for all epochs, so
        # the fullest batches are halved until it is reached.
        while len(batches) < self.count:
            fullest = max(range(len(batches)), key=lambda j: len(batches[j]))
            batch = batches.pop(fullest)
            batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        if self.shuffle:
            rng.shuffle(batches)
        return batches

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._make(self.epoch)
