"""Count the FLOPs and memory of a training step from the configs alone.

A copy of the model takes one real step on torch's meta device, whose tensors have shapes but no
data. A dispatch mode sees every operation. It adds up FLOPs by torch's own formulas (a multiply-add
is two), and counts a result's bytes until its last reference is gone. The meta device has no
autocast: each part runs in the dtype of its weights. Trained heads over bf16 base weights are thus
counted in fp32, which overestimates their memory slightly.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv

from ..asr.asr_audio import SAMPLE_RATE
from ..asr.asr_encoder import family_of
from ..asr.asr_modeling import ASRModel
from ..asr.asr_packing import PACKED, packed_attention

PARTS = ("encoder", "projector", "ctc heads", "decoder", "logits")
PROMPT_TOKENS = 8, 8  # tokens of the chat format before and after the audio
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # also runs on meta
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Count fused attention like plain attention, without the work it repeats to save memory.
FLOPS: dict[Any, Any] = {
    **flop_registry,
    FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    FUSED_BACKWARD: lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q.shape, k.shape, v.shape),
}


@dataclass
class Cost:
    """The cost of a training step.

    Attributes:
        gflop: GFLOP per second of audio, forward and backward, for each of `PARTS`.
        memory: bytes at the peak, by key: "weights", "optimizer", and each of `PARTS` (its
            activations and gradients).
    """

    gflop: dict[str, float]
    memory: dict[str, int]


class Recorder(TorchDispatchMode):
    """Adds up the FLOPs and live bytes of the operations inside it, by the current `part`."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.flops, self.live, self.peak = (Counter[str]() for _ in range(3))
        self.most = 0  # bytes at the peak, over all parts
        self.owner: dict[int, tuple[str, Any]] = {}  # by storage: part, weak reference

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := FLOPS.get(func._overloadpacket):
            self.flops[self.part] += formula(*args, **kwargs, out_val=out)
        self.track(out)
        return out

    def track(self, tensors: Any) -> None:
        """Add the bytes of nested tensors; a storage that several share counts once."""
        for tensor in [tensors] if isinstance(tensors, Tensor) else tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.owner:
                    end = weakref.ref(storage, lambda _, key=key, size=size: self._free(key, size))
                    self.owner[key] = (self.part, end)
                    self.live[self.part] += size
        if (total := self.live.total()) > self.most:
            self.peak, self.most = self.live.copy(), total

    def _free(self, key: int, size: int) -> None:
        self.live[self.owner.pop(key)[0]] -= size


def counted_attention(
    _: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention (b, heads, s, d) that keeps no scores for the backward pass, as fused kernels do.

    The exception is a mask that needs gradients, such as Parakeet's relative positions.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if attention_mask is not None and attention_mask.requires_grad:
        scores = query @ key.transpose(2, 3) * kwargs["scaling"] + attention_mask
        out = scores.softmax(-1) @ value
    else:
        out = FUSED(query, key, value, scale=kwargs["scaling"])[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("counted", counted_attention)
COUNTED_PACKED = f"counted, {PACKED}"
AttentionInterface.register(COUNTED_PACKED, partial(packed_attention, attend=counted_attention))


def without_weights(config: Any, dtype: torch.dtype | None = None) -> ASRModel:
    """Build a model on the meta device, with the shapes and dtypes of `ASRModel.from_base`.

    Args:
        config: an ASRConfig that contains both base configs; it is not modified.
        dtype: dtype of the base weights; None is fp32.
    """
    config = copy.copy(config)
    for name in ("audio_config", "text_config"):
        setattr(config, name, copy.deepcopy(getattr(config, name)))
    config.audio_config._attn_implementation = "counted"
    for key, off in (("layerdrop", 0.0), ("apply_spec_augment", False)):  # no randomness
        setattr(config.audio_config, key, off)
    with torch.device("meta"):
        encoder = (
            family_of(config.audio_config).build(config.audio_config).to(dtype or torch.float32)
        )
        decoder = AutoModelForCausalLM.from_config(config.text_config).to(dtype or torch.float32)
        model = ASRModel(config, encoder, decoder)
    model.decoder.set_attn_implementation(COUNTED_PACKED)
    return model


def meta_copy(model: ASRModel) -> ASRModel:
    """Copy the model to the meta device; the copy trains the same parameters."""
    copied = without_weights(model.config, next(model.encoder.parameters()).dtype)
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return copied


def count(
    meta: ASRModel, settings: Mapping[str, Any], seconds: float, tokens: int, clips: int = 1
) -> Cost:
    """Count the cost of a training step on `clips` clips without padding.

    Assumes that with the bridge "posteriors" the decoder sees one frame per token, and that the
    optimizer is a fused AdamW: two states per trained parameter, and no memory for its step.

    Args:
        meta: a model on the meta device; it is modified.
        settings: the training group of the config.
        seconds: length of a clip.
        tokens: transcript tokens of a clip, without the end token.
        clips: clips in a step, which determine the memory.
    """
    if settings["gradient_checkpointing"]:
        meta.activation_checkpointing_enable({"use_reentrant": False})
    recorder = Recorder()
    with torch.device("meta"), recorder:
        recorder.part = "weights"
        recorder.track([*meta.parameters(), *meta.buffers()])
        recorder.live["optimizer"] = 2 * sum(p.nbytes for p in meta.parameters() if p.requires_grad)
        step = _Step(meta.train(), recorder)
        for module in meta.encoder.children():
            if hasattr(module, "layers"):  # transformers 5.17 applies layer dropout while training
                module.training = False
        step.forward(settings, clips, seconds, tokens)
        step.backward()
    audio = 1e9 * clips * seconds
    return Cost({part: recorder.flops[part] / audio for part in PARTS}, dict(recorder.peak))


class _Step:
    """One step of `ASRModel.forward` and its backward pass, run part by part.

    `forward` itself cannot run on meta tensors, because its masks depend on the data.
    """

    def __init__(self, model: ASRModel, recorder: Recorder) -> None:
        self.model, self.recorder = model, recorder
        self.cuts: list[tuple[str, Tensor, Tensor | None]] = []  # part, its output, the next input

    def cut(self, output: Tensor) -> Tensor:
        """Detach a part's output as the next part's input; `backward` passes its gradient on."""
        fresh = output.detach().requires_grad_(output.requires_grad)
        self.cuts.append((self.recorder.part, output, fresh))
        return fresh

    def forward(self, settings: Mapping[str, Any], clips: int, seconds: float, tokens: int) -> None:
        """Run the model's parts one by one; `cuts` keeps each output for `backward`."""
        model, recorder, cuts = self.model, self.recorder, self.cuts
        audio, text = model.config.audio_config, model.config.text_config
        recorder.part = "encoder"
        mels = model.family.mels(audio)
        steps = round(seconds * SAMPLE_RATE / model.family.hop)
        shape = [mels, steps] if mels else [steps]
        if settings["cache_encoder"]:
            shape = [model.family.frames(audio, steps), audio.hidden_size]
        features = torch.empty(clips, *shape, dtype=next(model.encoder.parameters()).dtype)
        mask = torch.empty(clips, steps, dtype=torch.bool)
        hidden, lengths = model.encode(features, mask, settings["cache_encoder"])
        hidden = self.cut(hidden)
        recorder.part = "projector"
        frames, lengths = model.projector(hidden, lengths)
        frames = self.cut(frames)
        recorder.part = "ctc heads"
        rows = model.decoder.get_input_embeddings().weight
        if settings["ctc_loss_weight"] and model.ctc is not None:
            some = min(settings["ctc_negatives"], len(model.ctc.token_ids))
            classes = torch.arange(1, some + 1) if some else None
            cuts.append((recorder.part, model.ctc(frames, rows, classes), None))
        if settings["character_loss_weight"] and model.characters is not None:
            cuts.append((recorder.part, model.characters(hidden), None))
        if not settings["decoder_loss_weight"]:
            return
        fed, _ = model.bridge(frames, lengths)
        fed = self.cut(fed if model.residual is None else fed[:, :tokens])
        recorder.part = "decoder"
        start, end = PROMPT_TOKENS  # the start is read once for all clips
        words = end + tokens + 1
        shape = clips, start + fed.shape[1] + words, start
        others = torch.empty(start + clips * words, text.hidden_size, dtype=rows.dtype)
        packed = torch.cat([fed.flatten(0, 1).to(rows.dtype), others])
        places = torch.empty(len(packed), dtype=torch.long)
        states = self.cut(model.read_packed(packed, places, shape))
        recorder.part = "logits"
        targets = torch.empty(clips * (tokens + 1), dtype=torch.long)
        logits = model.decoder.get_output_embeddings()(states[: len(targets)])
        cuts.append((recorder.part, F.cross_entropy(logits.float(), targets), None))

    def backward(self) -> None:
        """Run backward through the parts, last to first, freeing the activations of each."""
        while self.cuts:
            self.recorder.part, output, fresh = self.cuts.pop()
            gradient = torch.ones_like(output) if fresh is None else fresh.grad
            del fresh
            if output.requires_grad and gradient is not None:
                torch.autograd.backward(output, gradient)


def table(*rows: Sequence[str]) -> str:
    """Format rows of equal length as text: first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def describe(model: ASRModel) -> str:
    """Format a table of the model's parts: total and trained parameters, dtype, mode."""
    rows = [("part", "total", "trained", "dtype", "mode")]
    for part, module in model.named_children():
        tensors = list(module.parameters())
        total = sum(p.numel() for p in tensors)
        trained = sum(p.numel() for p in tensors if p.requires_grad)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        rows.append((part, f"{total:,}", f"{trained:,}", dtype, "trained" if trained else "frozen"))
    return table(*rows)


def expected_cost(
    model: ASRModel, settings: dict[str, Any], examples: Sequence[Any]
) -> tuple[float, str]:
    """GFLOP per second of audio, and a line with that figure and the memory of a step."""
    seconds, tokens = 8.4, 25  # a guess for streams
    if examples:
        seconds = sum(example.duration for example in examples) / len(examples)
        tokens = round(sum(len(example.target) for example in examples) / len(examples))
    clips = max(1, int(settings["batch_seconds"] / seconds))
    cost = count(meta_copy(model), settings, seconds, max(1, tokens), clips)
    gflop = sum(cost.gflop.values())
    parts = ", ".join(f"{part} {n:.1f}" for part, n in cost.gflop.items() if n)
    return gflop, (
        f"{gflop:.1f} GFLOP per second of audio ({parts}); expected memory "
        f"{sum(cost.memory.values()) / 1e9:.1f} GB with {clips} clips of {seconds:.1f} s"
    )


GPUS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "gpus.yaml").read_text())


def gpu_of(device_name: str) -> str | None:
    """The name in `gpus.yaml` of the GPU that torch calls `device_name`, or None."""
    return next((name for name, gpu in GPUS.items() if device_name in gpu["devices"]), None)
