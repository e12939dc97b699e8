"""Cache of encoder frames, for small recipes with a frozen encoder."""

import ctypes
import hashlib
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

from ..asr.asr_encoder import MaskedGroupNorm
from ..asr.asr_modeling import ASRModel
from ..progress import progress_bar
from .batches import cut_batches
from .checks import read_log
from .data import SpeechDataset
from .manifests import audio_checksum

CLIPS_PER_TASK = 128
BATCH_SECONDS = 64.0  # padded audio in a batch; limits the memory of attention
UNREAD = "dropped.jsonl"  # the clips of a cache that could not be read
MAX_THREADS = 4  # each thread holds a batch in memory


class Frames:
    """Encoder frames (t, d_encoder) in fp16 by clip id, in a folder with one file per clip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, clip: str) -> Path:
        """The clip's file, named by a hash because an id may hold any character."""
        return self.folder / f"{hashlib.sha256(clip.encode()).hexdigest()}.npy"

    def __contains__(self, clip: str) -> bool:
        return self.path(clip).exists()

    def count(self, clip: str) -> int:
        """The number of frames of a clip, without reading them."""
        return len(np.load(self.path(clip), mmap_mode="r"))

    def __getitem__(self, clip: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self.path(clip)))


def return_freed_memory() -> None:
    """Make glibc return freed heap memory: tensors of varying sizes leave up to 1.5 GB there."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):  # not in musl
        libc.malloc_trim(0)


def cache_frames(model: ASRModel, data: SpeechDataset, parent: Path, bf16: bool = False) -> None:
    """Encode `data` once with the frozen encoder, and make `data` serve the frames.

    The frames are kept in a folder under `parent`, named by a hash of all inputs. A frozen encoder
    gives the same frames in every epoch, and computing them dominates the time of a small recipe.
    `bf16` multiplies matrices in bfloat16.

    Raises:
        ValueError: if the encoder is trained.
    """
    if model.encoder_is_trained:
        raise ValueError("training.cache_encoder needs a frozen encoder: set encoder_lora.r=0")
    model.eval()  # frames without dropout
    made_of: list[Any] = [model.config.encoder_lora, bf16]
    for part in model.encoder.parameters():
        made_of.append(crc32(part.detach().cpu().reshape(-1).view(torch.uint8).numpy()))
    made_of += [data.processor.tail_seconds, data.processor.min_seconds, data.max_seconds]
    made_of += [data.min_seconds, data.disturb, data.disturb and data.seed]
    for e in sorted(data.examples, key=lambda e: e.id):
        made_of += [e.id, e.duration, audio_checksum(e.audio)]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    folder = parent / f"encoder_frames-{digest}"
    if not folder.exists():
        unfinished = Frames(folder.with_suffix(".tmp"))  # renamed when complete
        shutil.rmtree(unfinished.folder, ignore_errors=True)
        unfinished.folder.mkdir(parents=True)
        encode_all(model, data, unfinished, bf16)
        unfinished.folder.replace(folder)
    for row in read_log(folder / UNREAD):  # a stage that reuses the cache reports them too
        data.dropped.add(**row)
    data.serve_encoded(Frames(folder))


def encode_all(model: ASRModel, data: SpeechDataset, frames: Frames, bf16: bool) -> None:
    """Encode every example once into `frames`, longest first.

    Several threads each encode `CLIPS_PER_TASK` clips at a time on one core. That is faster than
    one batch on all cores, and it overlaps reading with encoding.
    """
    order = list({example.id: i for i, example in enumerate(data.examples)}.values())
    order.sort(key=lambda i: -data.examples[i].duration)
    parts = [order[i : i + CLIPS_PER_TASK] for i in range(0, len(order), CLIPS_PER_TASK)]
    cores = torch.get_num_threads()
    # MaskedGroupNorm stores the lengths of the current batch, so threads cannot share it.
    stateful = any(isinstance(module, MaskedGroupNorm) for module in model.encoder.modules())
    threads = 1 if stateful else min(cores, MAX_THREADS)
    bar = progress_bar(total=len(order), desc="encoding", unit="clip")
    one_core = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(threads, **one_core) as pool, bar, ExitStack() as at_the_end:
        at_the_end.callback(pool.shutdown, cancel_futures=True)  # after Ctrl-C or an error
        work = [pool.submit(encode_some, model, data, rows, frames, bf16) for rows in parts]
        for rows, part in zip(parts, work, strict=True):
            for item in part.result():
                with (frames.folder / UNREAD).open("a") as file:
                    file.write(json.dumps(item) + "\n")
            bar.update(len(rows))
            return_freed_memory()
    torch.set_num_threads(cores)


def encode_some(
    model: ASRModel, data: SpeechDataset, rows: list[int], frames: Frames, bf16: bool
) -> list[dict[str, Any]]:
    """Encode the examples at `rows`; return those that cannot be read.

    Clips are batched by the length of their features: disturbed clips differ from their files.
    """
    processor = data.processor
    items = [data.read(data.examples[row]) for row in rows]
    good = [item for item in items if "features" in item]
    steps = [processor.encoder_steps(len(item["features"])) for item in good]
    seconds = np.array(steps) * processor.frame_seconds
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)  # of this thread
    with torch.inference_mode(), autocast:
        for batch in cut_batches(seconds, BATCH_SECONDS):
            together = [good[row] for row in batch]
            inputs = processor.collate([item["features"] for item in together]).to(model.device)
            hidden, lengths = model.encode(inputs["input_features"], inputs["input_features_mask"])
            for item, frame, n in zip(together, hidden, lengths, strict=True):
                np.save(frames.path(item["id"]), frame[:n].half().cpu().numpy())
    return [item for item in items if "features" not in item]
