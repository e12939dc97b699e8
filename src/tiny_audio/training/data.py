"""Examples -> checked examples -> features.

Every example that cannot be used is skipped with a reason, counted and named; nothing is cut to
fit.
"""

import json
import random
import re
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

import hydra
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import BatchFeature

from ..asr.asr_config import check_keys
from ..asr.asr_processing import SAMPLE_RATE, ASRProcessor, AudioError, load_audio
from .augment import disturb
from .manifests import DataError, Example, Reader

# Slower than anybody reads, faster than anybody speaks.
CHARACTERS_PER_SECOND = (0.3, 40.0)
GLOBAL_DRAWS = threading.Lock()
# Marks in transcripts, and what they mean in training text; the first that fits counts.
MARKS = {
    r"\s*<comma>": ",",  # GigaSpeech
    r"\s*<period>": ".",
    r"\s*<questionmark>": "?",
    r"\s*<exclamationpoint>": "!",
    r"ignore_time_segment_in_scoring": "",  # TED-LIUM: what is said there was not written down
    r"<[^<>]*>|\[[^\[\]]*\]|\([^()]*\)": " ",  # <unk>, <sil>, [noise], (laughter)
}
ENOUGH = 200  # examples of a stream, before a share of dropped ones says anything


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL log, without a last line that a kill cut short; none where no file is."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class Dropped:
    """Counts of the examples that were skipped, by reason, with the ids, also in a JSONL file.

    Args:
        path: of the file, written anew; each checkpoint has a copy, for the run that continues it.
        allowed: share of examples that may be dropped.
    """

    def __init__(self, path: Path | None = None, allowed: float = 1.0) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.seen: set[str] = set()
        self.path, self.allowed = path, allowed
        if path is not None:
            path.unlink(missing_ok=True)

    def add(self, id: str, reason: str, detail: str = "") -> None:
        """Note a skipped example; one that was noted before is not counted again."""
        if id in self.seen:
            return
        self.seen.add(id)
        self.counts[reason] += 1
        self.first.setdefault(reason, id)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"id": id, "reason": reason, "detail": detail}) + "\n")

    def __str__(self) -> str:
        parts = [f"{n} {reason} (first: {self.first[reason]})" for reason, n in self.counts.items()]
        return ", ".join(parts) or "none"

    def check(self, total: int) -> None:
        """Raise DataError when more than the allowed share of `total` examples was dropped."""
        count = self.counts.total()
        if count > self.allowed * total:
            raise DataError(
                f"{count} of {total} examples were dropped, more than data.max_dropped_fraction="
                f"{self.allowed}: {self}. Mend the data, or raise the limit"
            )


def prepare_text(text: str, lowercase: bool = False) -> str:
    """Training text: annotation marks read (see `MARKS`), white space folded, ALL CAPS lowered.

    Case, digits and punctuation are kept, so that a model can learn them; `lowercase` drops case
    and all punctuation but the apostrophe, for small recipes.
    """
    text = normalize("NFC", text)
    for mark, meaning in MARKS.items():
        text = re.sub(mark, meaning, text, flags=re.IGNORECASE)
    text = " ".join(text.split())
    if lowercase:
        letters = text.lower().replace("’", "'")
        # letters, marks, digits, the apostrophe, and what joins or parts letters of some scripts
        kept = (c if c in "'\u200c\u200d" or category(c)[0] in "LMN" else " " for c in letters)
        text = " ".join("".join(kept).split())
    return text.lower() if text.isupper() and len(text) > 3 else text


def why_unreadable(audio: Any) -> str:
    """What is wrong with audio that no header gave a length for."""
    try:
        load_audio(audio)
    except (AudioError, TypeError) as error:
        return str(error)
    return "its length is not known"


@dataclass(eq=False)
class Clips:
    """Checks examples, reads them into features, and makes batches of them.

    Args:
        processor: makes features and targets.
        dropped: where skipped examples are noted.
        min_seconds, max_seconds: clips outside are skipped.
        lowercase: see `prepare_text`.
        max_train_samples: keep the first so many of each epoch; None keeps all.
        feature_noise: standard deviation of noise on cached encoder frames.
        channel_drop: share of channels of cached encoder frames that are dropped.
        time_mask: longest run of cached encoder frames that is dropped.
        noise: {"path", "share", "snr"}: recordings of a folder are added to a share of the clips,
            at a signal to noise ratio between the two of `snr`, in dB.
        transform: {"_target_": class of any library, ...}; called with `samples` and `sample_rate`.
        disturb: share of the clips that `augment.disturb` changes.
        mask_time, mask_bands: SpecAugment (Park et al. 2019) on features: two masks, each over at
            most this share of the time; over at most so many mel bands.
        seed: of the augmentation, with the epoch and the example's id.
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
    noise: Any = None
    transform: Any = None
    disturb: float = 0.0
    mask_time: float = 0.0
    mask_bands: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self.total = self.rewritten = self.epoch = 0  # examples; texts that `prepare_text` changed
        self.known: set[str] = set()  # ids: reports and cached frames go by them
        self.encoded: Any = None  # encoder frames by id, once there is a cache of them
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise DataError(f"data.max_train_samples={self.max_train_samples}: at least 1, or null")
        self.transform = self.transform and hydra.utils.instantiate(self.transform)
        self.noises: list[Path] = []
        if self.noise:
            check_keys(self.noise, {"path", "share", "snr"}, "data.noise")
            folder = Path(str(self.noise["path"])).expanduser()
            self.noises = sorted(path for path in folder.rglob("*") if path.is_file())
            if not self.noises:
                raise DataError(f"data.noise.path={folder}: no files there")

    def admitted(self, source: Any, streaming: bool = False) -> Iterator[Example]:
        """Examples of a source that pass `admit`, each with an id of its own; others are noted."""
        for example in iter(Reader(source, streaming).read, None):
            self.total += 1
            if example.id in self.known:
                example.id = f"{example.id}@{self.total}"
            self.known.add(example.id)
            if refusal := self.admit(example):
                self.dropped.add(**refusal)
            else:
                yield example

    def admit(self, example: Example) -> dict[str, Any] | None:
        """Prepare the text and tokens of an example; `id`, `reason` and `detail` where it cannot be
        used."""
        written, example.text = example.text, prepare_text(example.text, self.lowercase)
        self.rewritten += example.text != written
        example.target = self.processor.tokenize(example.text)
        seconds, letters = example.duration, len(example.text)
        slow, fast = (rate * seconds for rate in CHARACTERS_PER_SECOND)
        wrong = {
            "empty text": not letters and not example.silence,
            "unreadable audio": seconds < 0,
            "shorter than min_seconds": seconds < self.min_seconds,
            "over max_seconds": seconds > self.max_seconds,
            "more tokens than frames": not self.fits(example),
            "implausible characters per second": letters and not slow <= letters <= fast,
        }
        reasons = [reason for reason, holds in wrong.items() if holds]
        if not reasons:
            return None
        detail = f"{seconds:.2f} s" if seconds >= 0 else why_unreadable(example.audio)
        return {"id": example.id, "reason": reasons[0], "detail": detail}

    def fits(self, example: Example) -> bool:
        """Whether CTC can align the tokens: each needs a frame, a repeated one a blank too."""
        repeats = sum(a == b for a, b in pairwise(example.target))
        frames = self.processor.frames_for_seconds(example.duration)
        return len(example.target) + repeats <= frames

    def read(self, example: Example) -> dict[str, Any]:
        """An example as a dict with `id`, `source`, `seconds`, `features` (time first), `target`
        (token ids) and `characters` (classes); or `id`, `reason` and `detail` of why it has none.
        """
        item = {"id": example.id, "seconds": example.duration, "target": example.target}
        item["source"] = example.source
        item["characters"] = self.processor.spell(example.text)
        if self.encoded is not None:
            return {**item, "features": self.augment(self.encoded[example.id], example.id)}
        try:
            samples = load_audio(example.audio)
        except AudioError as error:
            return {"id": example.id, "reason": "unreadable audio", "detail": str(error)}
        if not samples.any() and not example.silence:
            return {"id": example.id, "reason": "silent", "detail": "every sample is zero"}
        if not self.min_seconds <= len(samples) / SAMPLE_RATE <= self.max_seconds + 0.1:
            detail = f"{len(samples) / SAMPLE_RATE:.2f} s, not {example.duration:.2f} s"
            return {"id": example.id, "reason": "not as long as it says", "detail": detail}
        features = self.processor.features(self.disturbed(samples, example))
        return {**item, "features": self.mask(features, example.id)}

    def rng(self, example_id: str) -> np.random.Generator:
        """Draws for an example: fixed by (seed, epoch, id), so that a resumed run repeats them."""
        return np.random.default_rng([self.seed, self.epoch, zlib.crc32(example_id.encode())])

    def disturbed(self, samples: np.ndarray, example: Example) -> np.ndarray:
        """Samples (n,) at 16 kHz with `augment.disturb`, noise from a folder, and the transform."""
        rng = self.rng(example.id)
        if rng.random() < self.disturb:
            changed = disturb(samples, rng)
            fits = len(changed) <= self.max_seconds * SAMPLE_RATE
            samples = changed if fits else samples
        if self.noises and rng.random() < self.noise["share"]:
            sound = load_audio(str(self.noises[rng.integers(len(self.noises))]))
            sound = np.roll(sound, -int(rng.integers(len(sound))))
            sound = np.resize(sound, len(samples))  # repeats it where it is shorter
            gain = 10 ** (-rng.uniform(*self.noise["snr"]) / 20)
            level = np.sqrt(np.square(samples).mean() / max(float(np.square(sound).mean()), 1e-12))
            samples = (samples + gain * level * sound).astype(np.float32)
        if self.transform:
            with GLOBAL_DRAWS:  # libraries draw from the generators that all threads share
                random.seed(int(rng.integers(2**32)))
                np.random.seed(int(rng.integers(2**32)))
                samples = self.transform(samples=samples, sample_rate=SAMPLE_RATE)
        return samples

    def mask(self, features: torch.Tensor, example_id: str) -> torch.Tensor:
        """SpecAugment on features (n,) or (t, mels): stretches are set to the clip's mean."""
        rng, mean = self.rng(example_id + "/mask"), features.mean()
        widths = (int(self.mask_time * len(features)), self.mask_bands)
        for axis, most in enumerate(widths[: features.ndim]):
            for _ in range(2 if most else 0):
                width = int(rng.integers(most + 1))
                start = int(rng.integers(features.shape[axis] - width + 1))
                features.narrow(axis, start, width).fill_(mean)
        return features

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that `augment` draws for; the trainer calls it."""
        self.epoch = epoch

    def augment(self, frames: torch.Tensor, example_id: str) -> torch.Tensor:
        """Noise, dropped channels and a dropped run of frames on encoder frames (t, d).

        Drawn from (seed, epoch, id), so that a resumed run repeats it.
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
        """A batch for `ASRModel` of items with features, with `ids`, and `seconds` of audio, also
        of each source."""
        batch = self.processor.collate(
            [item["features"] for item in items],
            [item["target"] for item in items],
            [item["characters"] for item in items],
            encoded=self.encoded is not None,
        )
        batch["ids"] = [item["id"] for item in items]
        batch["seconds"] = sum(item["seconds"] for item in items)
        batch["sources"] = Counter[str]()
        for item in items:
            batch["sources"][item["source"]] += item["seconds"]
        return batch


class SpeechDataset(Clips, Dataset):
    """All examples of the sources, checked, read when asked for: see `Clips.read`."""

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

    def repeated(self, example: Example) -> list[Example]:
        """An example as often as its source says; each time with an id of its own, and so with its
        own draws, where clips are disturbed."""
        ids = [
            f"{example.id}#{i}" if i and self.disturb else example.id for i in range(example.repeat)
        ]
        return [replace(example, id=id) for id in ids]

    def collate(self, items: list[dict[str, Any]]) -> BatchFeature:
        """As `Clips.collate`, also of items that could not be read; they are in `dropped`.

        Where none of a batch could be, the first readable example takes their place: a corrupt
        file that is long enough to be a batch of its own does not end a run.
        """
        readable = (item for item in map(self.read, self.examples) if "features" in item)
        good = [item for item in items if "features" in item] or list(islice(readable, 1))
        if not good:
            raise DataError(f"no example can be read: {items[0]}")
        batch = super().collate(good)
        batch["dropped"] = [item for item in items if "features" not in item]
        return batch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self.examples[index])

    def serve_encoded(self, encoded: Any) -> None:
        """Serve cached encoder frames: `encoded` holds (t, d_encoder) by the examples' ids.

        Examples that are not in it could not be read when it was made; they are left out.
        """
        self.encoded = encoded
        for example in self.examples:
            if example.id not in encoded:
                self.dropped.add(example.id, "no cached frames")
        self.examples = [e for e in self.examples if e.id in encoded]
        if self.disturb:  # their lengths are not those of the files any more
            for example in self.examples:
                example.duration = encoded.count(example.id) * self.processor.frame_seconds
