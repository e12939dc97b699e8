"""Encoder frames that are computed once: for small recipes that train a frozen encoder's output."""

import ctypes
import hashlib
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from .asr_modeling import ASRModel
from .batches import LengthBatchSampler
from .data import SpeechDataset


class Frames:
    """Encoder frames (t, d_encoder) in fp16 by the clips' ids: a folder with a file for each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, clip: str) -> Path:
        """The clip's file; an id may hold any character, a file's name may not."""
        return self.folder / f"{hashlib.sha256(clip.encode()).hexdigest()}.npy"

    def __contains__(self, clip: str) -> bool:
        return self.path(clip).exists()

    def __getitem__(self, clip: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self.path(clip)))


def return_freed_memory() -> None:
    """Have glibc give back what tensors of ever new sizes left in its heap: 1.5 GB otherwise."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # not in musl
            libc.malloc_trim(0)


def cache_encoder_frames(model: ASRModel, data: SpeechDataset, parent: Path, workers: int) -> None:
    """Run the frozen encoder once over `data`, into a folder of `parent` that is named for what it
    was made of, and have `data` serve its frames.

    A frozen encoder gives the same frames in every epoch; for a small recipe that trains many
    epochs they cost more than everything else.

    Raises:
        ValueError: when the encoder is trained, or does not hear a clip alike in every epoch.
    """
    if model.encoder_is_trained:
        raise ValueError("training.cache_encoder needs a frozen encoder: set encoder_lora.r=0")
    if data.noises or data.transform or data.mask_time or data.mask_bands:
        raise ValueError("data.noise, transform and mask_* need training.cache_encoder=false")
    made_of: list[Any] = [model.config.encoder_name, model.config.encoder_revision]
    made_of += [str(next(model.encoder.parameters()).dtype)]
    made_of += [data.processor.tail_seconds, data.processor.min_seconds]
    for e in sorted(data.examples, key=lambda e: e.id):
        audio = e.audio if isinstance(e.audio, dict) else {"path": e.audio}
        with suppress(OSError, TypeError):  # what cannot be read has no frames
            made_of += [e.id, crc32(audio.get("bytes") or Path(audio["path"]).read_bytes())]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    folder = parent / f"encoder_frames-{digest}"
    if not folder.exists():
        aside = Frames(folder.with_suffix(".tmp"))  # renamed once it is whole
        shutil.rmtree(aside.folder, ignore_errors=True)
        aside.folder.mkdir(parents=True)
        order = list({example.id: i for i, example in enumerate(data.examples)}.values())
        seconds = [data.examples[i].duration for i in order]
        # By length: a batch of long clips would need gigabytes for their attention scores.
        budget = LengthBatchSampler(seconds, max(64.0, *seconds), shuffle=False)
        batches = [[order[i] for i in batch] for batch in budget]
        loader = DataLoader(
            data, batch_sampler=batches, collate_fn=data.collate, num_workers=workers
        )
        bar = tqdm(total=len(order), desc="encoding", unit="clip")
        with torch.inference_mode(), bar:
            for batch in loader:
                for item in batch["dropped"]:
                    data.dropped.add(item["id"], item["reason"], item["detail"])
                audio = [batch[k] for k in ("input_features", "input_features_mask")]
                hidden, lengths = model.encode(*(x.to(model.device) for x in audio))
                for clip, rows, n in zip(batch["ids"], hidden, lengths, strict=True):
                    np.save(aside.path(clip), rows[:n].half().cpu().numpy())
                bar.update(len(batch["ids"]))
                return_freed_memory()
        aside.folder.replace(folder)
    data.serve_encoded(Frames(folder))
