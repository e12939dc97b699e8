"""Encoder frames that are computed once: for small recipes that train a frozen encoder's output."""

import ctypes
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from .asr_modeling import ASRModel
from .data import LengthBatchSampler, SpeechDataset


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


class Frames(Mapping[str, torch.Tensor]):
    """What a `FrameWriter` wrote: frames (t, d) in fp16 by clip, read from disk when asked for."""

    def __init__(self, path: Path) -> None:
        index = json.loads(path.read_text())
        self.file, self.width = path.with_suffix(".f16"), index["width"]
        self.clips: dict[str, tuple[int, int]] = index["clips"]  # first frame, number of them

    def __len__(self) -> int:
        return len(self.clips)

    def __iter__(self) -> Iterator[str]:
        return iter(self.clips)

    def __getitem__(self, clip: str) -> torch.Tensor:
        at, n = self.clips[clip]  # not a memory map: its pages would count as this process's own
        offset, count = 2 * at * self.width, n * self.width
        flat = np.fromfile(self.file, np.float16, count, offset=offset)
        return torch.from_numpy(flat).view(n, self.width)


def return_freed_memory() -> None:
    """Have glibc give back what tensors of ever new sizes left in its heap: 1.5 GB otherwise."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # not in musl
            libc.malloc_trim(0)


def cache_encoder_frames(model: ASRModel, data: SpeechDataset, path: Path, workers: int) -> None:
    """Run the frozen encoder once over `data`, into `path`, and have `data` serve its frames.

    A frozen encoder gives the same frames in every epoch; for a small recipe that trains many
    epochs they cost more than everything else. Kept in fp16, read from disk when asked for.
    """
    if model.encoder_is_trained:
        raise ValueError("training.cache_encoder needs a frozen encoder: set encoder_lora.r=0")
    if not path.exists():
        order = list({example.id: i for i, example in enumerate(data.examples)}.values())
        seconds = [data.examples[i].duration for i in order]
        # By length: a batch of long clips would need gigabytes for their attention scores.
        budget = LengthBatchSampler(seconds, max(64.0, *seconds), shuffle=False)
        batches = [[order[i] for i in batch] for batch in budget]
        loader = DataLoader(
            data, batch_sampler=batches, collate_fn=data.collate, num_workers=workers
        )
        writer, bar = FrameWriter(path), tqdm(total=len(order), desc="encoding", unit="clip")
        with torch.inference_mode(), writer, bar:
            for batch in loader:
                for item in batch["dropped"]:
                    data.dropped.add(item["id"], item["reason"], item["detail"])
                audio = {
                    k: batch[k].to(model.device) for k in ("input_features", "input_features_mask")
                }
                hidden, lengths = model.encode(**audio)
                for clip, rows, n in zip(batch["ids"], hidden, lengths, strict=True):
                    writer.add(clip, rows[:n].half().cpu().numpy())
                bar.update(len(batch["ids"]))
                return_freed_memory()
    data.serve_encoded(Frames(path))
