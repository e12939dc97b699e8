"""Check examples, read them into features, and collate batches.

An example that cannot be used is skipped; its id and the reason are logged and counted. Clips and
transcripts are never truncated to fit.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import BatchFeature

from ..asr.asr_audio import SAMPLE_RATE, AudioError, load_audio
from ..asr.asr_processing import ASRProcessor
from .augment import disturb, draw_timing
from .batches import cut_batches
from .checks import Dropped, prepare_text, why_refused
from .manifests import DataError, Example, Reader


@dataclass(eq=False)
class Clips:
    """Checks examples, reads them into features, and collates them into batches.

    Args:
        processor: makes features and targets.
        dropped: records skipped examples.
        min_seconds, max_seconds: limits on the length of a clip; others are skipped.
        lowercase: see `prepare_text`.
        max_train_samples: use only the first N examples of each epoch; None uses all.
        feature_noise: standard deviation of noise added to cached encoder frames.
        channel_drop: share of the channels of cached encoder frames that are zeroed.
        time_mask: longest run of cached encoder frames that is zeroed.
        disturb: share of the clips that `augment.disturb` changes.
        seed: seed of the augmentation, together with the epoch and the example's id.
        token_head, character_head: whether the model has these CTC heads, which limit the text.
    """

    processor: ASRProcessor
    dropped: Dropped
    min_seconds: float = 0.1
    max_seconds: float = 30.0
    lowercase: bool = False
    max_train_samples: int | None = None
    feature_noise: float = 0.0
    channel_drop: float = 0.0
    time_mask: int = 0
    disturb: float = 0.0
    seed: int = 0
    token_head: bool = True
    character_head: bool = True

    def __post_init__(self) -> None:
        self.total = self.rewritten = self.epoch = 0  # rewritten: texts that `prepare_text` changed
        self.known: set[str] = set()  # ids so far; reports and cached frames need unique ones
        self.encoded: Any = None  # cached encoder frames by id, if any
        self.sampler: Any = None  # makes the batches of an epoch, if any
        self.max_seconds = min(self.max_seconds, self.processor.longest_seconds)
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise DataError(f"data.max_train_samples={self.max_train_samples}: at least 1, or null")

    def admitted(self, source: Any, streaming: bool = False) -> Iterator[Example]:
        """Yield the usable examples of a source with unique ids; record the others as dropped."""
        for example in iter(Reader(source, streaming).read, None):
            self.total += 1
            if example.id in self.known:
                example.id = f"{example.id}@{self.total}"
            self.known.add(example.id)
            if refusal := self.admit(example):
                self.dropped.add(**refusal)
            else:
                yield example

    def repeated(self, example: Example) -> list[Example]:
        """Repeat an example as often as its source says.

        If clips are disturbed, each repetition has its own id and thus its own random numbers.
        """
        copies = range(example.repeat)
        ids = [f"{example.id}#{i}" if i and self.disturb else example.id for i in copies]
        self.total += len({*ids}) - 1  # each is dropped by itself, too
        return [replace(example, id=id) for id in ids]

    def admit(self, example: Example) -> dict[str, Any] | None:
        """Prepare the text and tokens of an example, in place.

        Returns None, or `id`, `reason` and `detail` if the example cannot be used.
        """
        original, example.text = example.text, prepare_text(example.text, self.lowercase)
        self.rewritten += example.text != original
        example.target = self.processor.tokenize(example.text)
        steps = self.processor.frames_for_seconds(example.duration)
        frames = math.ceil(steps / self.processor.stack) if self.token_head else math.inf
        letter_frames = steps if self.character_head else math.inf
        limits = self.min_seconds, self.max_seconds
        refusal = why_refused(example, frames, letter_frames, limits)
        return refusal and {"id": example.id, **refusal}

    def read(self, example: Example) -> dict[str, Any]:
        """Read an example's audio and make its features.

        Returns `id`, `seconds`, `features` (time first), `target` (token ids) and
        `characters` (classes), or `id`, `reason` and `detail` if the audio cannot be used.
        """
        item = {"id": example.id, "seconds": example.duration, "target": example.target}
        item["characters"] = self.processor.spell(example.text)
        if self.encoded is not None:
            return {**item, "features": self.perturb(self.encoded[example.id], example.id)}
        try:
            samples = load_audio(example.audio)
        except AudioError as error:
            return {"id": example.id, "reason": "unreadable audio", "detail": str(error)}
        if not samples.any():
            return {"id": example.id, "reason": "silent", "detail": "every sample is zero"}
        stated = example.duration
        longest = min(self.max_seconds + 0.1, self.processor.longest_seconds, 1.1 * stated + 0.5)
        shortest = max(self.min_seconds, 0.9 * stated - 0.5)
        if not shortest <= len(samples) / SAMPLE_RATE <= longest:
            detail = f"{len(samples) / SAMPLE_RATE:.2f} s, not {stated:.2f} s"
            return {"id": example.id, "reason": "not as long as stated", "detail": detail}
        return {**item, "features": self.processor.features(self.disturbed(samples, example))}

    def rng(self, example_id: str, epoch: int) -> np.random.Generator:
        """A generator seeded by (seed, epoch, id), so a resumed run repeats its numbers."""
        return np.random.default_rng([self.seed, epoch, zlib.crc32(example_id.encode())])

    def features_seconds(self, example: Example, epoch: int) -> float:
        """Predict the seconds that an example's features span, with the processor's tail."""
        if self.disturb and self.encoded is not None:  # `serve_encoded` counted them
            return example.duration
        seconds = example.duration
        if self.disturb and (rng := self.rng(example.id, epoch)).random() < self.disturb:
            speed, before, behind = draw_timing(rng)
            changed = seconds / speed + before + behind
            seconds = changed if changed <= self.max_seconds else seconds
        return seconds + self.processor.tail_seconds

    def disturbed(self, samples: np.ndarray, example: Example) -> np.ndarray:
        """Change samples (n,) at 16 kHz with `augment.disturb`, unless they become too long."""
        rng = self.rng(example.id, self.epoch)
        if rng.random() < self.disturb:
            changed = disturb(samples, rng)
            if len(changed) <= self.max_seconds * SAMPLE_RATE:
                return changed
        return samples

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that seeds the augmentation; the trainer calls this."""
        self.epoch = epoch
        if self.sampler:
            self.sampler.set_epoch(epoch)

    def perturb(self, frames: torch.Tensor, example_id: str) -> torch.Tensor:
        """Add noise to cached encoder frames (t, d); zero some channels and one stretch of frames.

        Seeded by (seed, epoch, id), so resumed training repeats it.
        """
        key = f"{self.seed}/{self.epoch}/{example_id}"
        rng = torch.Generator().manual_seed(zlib.crc32(key.encode()))
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
        """Collate items with features into a batch, with their `ids` and `seconds` of audio."""
        batch = self.processor.collate(
            [item["features"] for item in items],
            [item["target"] for item in items],
            [item["characters"] for item in items],
            encoded=self.encoded is not None,
        )
        batch["ids"] = [item["id"] for item in items]
        batch["seconds"] = sum(item["seconds"] for item in items)
        return batch


class SpeechDataset(Clips, Dataset):
    """All usable examples of the sources; their audio is read on access, see `Clips.read`."""

    def __init__(
        self,
        sources: Sequence[Any],
        processor: ASRProcessor,
        dropped: Dropped,
        streaming: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(processor, dropped, **options)
        self.examples: list[Example] = []
        for source in sources:
            for example in self.admitted(source, streaming):
                self.examples += self.repeated(example)
        self.examples = self.examples[: self.max_train_samples]
        if not self.examples:
            raise DataError(f"no usable example in {list(sources)}: {dropped}")
        dropped.check(self.total)

    def collate(self, items: list[dict[str, Any]]) -> BatchFeature:
        """Collate the readable items as `Clips.collate` does; `dropped` holds the others.

        If none is readable, the first readable example of the dataset replaces them. Otherwise a
        corrupt file that is alone in its batch would end the run.
        """
        readable = (item for item in map(self.read, self.examples) if "features" in item)
        good = [item for item in items if "features" in item] or list(islice(readable, 1))
        if not good:
            raise DataError(f"no example can be read: {items[0]}")
        batch = super().collate(good)
        batch["dropped"] = [item for item in items if "features" not in item]
        return batch

    def batches(self, batch_seconds: float) -> Iterator[dict[int, dict[str, Any]]]:
        """Yield each clip once, in batches of similar length: row number -> item of `read`.

        Clips that cannot be read are recorded as dropped.
        """
        for rows in cut_batches(self.lengths(self.epoch), batch_seconds):
            items = {row: self[row] for row in rows}
            good = {row: item for row, item in items.items() if "features" in item}
            for row in items.keys() - good.keys():
                self.dropped.add(**items[row])
            if good:
                yield good

    def lengths(self, epoch: int) -> list[float]:
        """Seconds of each example's features in an epoch."""
        return [self.features_seconds(example, epoch) for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self.examples[index])

    def serve_encoded(self, encoded: Any) -> None:
        """Serve cached encoder frames: `encoded` maps an example's id to (t, d_encoder).

        Examples without cached frames are dropped: they could not be read when the cache was made.
        """
        self.encoded = encoded
        for example in self.examples:
            if example.id not in encoded:
                self.dropped.add(example.id, "no cached frames")
        self.examples = [e for e in self.examples if e.id in encoded]
        if self.disturb:  # disturbed clips differ in length from their files
            for example in self.examples:
                example.duration = encoded.count(example.id) * self.processor.frame_seconds
