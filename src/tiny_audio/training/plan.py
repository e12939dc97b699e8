"""What a training step costs, from the configs alone: FLOPs and bytes of a forward and a backward.

A twin of the model without weights takes one real step on torch's meta device, where tensors have
shapes but no data. Every operation is seen: its FLOPs by torch's own formulas (a multiplication and
an addition are two), its results as bytes that live until the last reference is gone. There is no
autocast there: each part runs in the dtype of its weights, so that trained heads over bf16 base
weights are counted in fp32, with a little more memory than autocast takes.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

from ..asr.asr_config import encoder_frames
from ..asr.asr_encoder import build_encoder
from ..asr.asr_modeling import ASRModel
from ..asr.asr_processing import SAMPLE_RATE

PARTS = ("encoder", "projector", "ctc heads", "decoder", "logits")
MEL_RATE = 100  # mel frames a second: hop of 10 ms
PROMPT_TOKENS = 16  # of the chat format around the audio
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # runs on meta too
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Fused attention is counted as the plain one is: what it computes twice to save memory is no work.
FLOPS: dict[Any, Any] = {
    **flop_registry,
    FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    FUSED_BACKWARD: lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q.shape, k.shape, v.shape),
}


# What an operation makes on the meta device, by its arguments. Layers are alike, and torch works a
# shape out in Python, which takes longer than all else here.
KNOWN: dict[Any, Any] = {}


def form(x: Any) -> Any:
    """Shape, stride, dtype and device of tensors, alone or in lists; other things as they are."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    return tuple(map(form, x)) if isinstance(x, list | tuple) else (type(x), x)


@dataclass
class Cost:
    """What a step costs.

    `gflop` is for a second of audio, forward and backward, by `PARTS`. `memory` is in bytes at the
    fullest moment, by what they are: weights, optimizer, and of `PARTS` what the forward pass keeps
    and the backward pass makes.
    """

    gflop: dict[str, float]
    memory: dict[str, int]


class Recorder(TorchDispatchMode):
    """Adds up the FLOPs and live bytes of what runs inside it, under the name `part`."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.flops, self.live, self.peak = (Counter[str]() for _ in range(3))
        self.most = 0  # of peak, in total
        self.owner: dict[int, tuple[str, Any]] = {}  # by storage: part, and what tells its end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = (func, form(args), form(tuple(kwargs.items())))
        if known := KNOWN.get(key):
            out = torch.empty_strided(*known[:2], dtype=known[2], device="meta")
        else:
            out = func(*args, **kwargs)
            made = isinstance(out, Tensor) and out.untyped_storage()._cdata not in self.owner
            if made and out.is_meta and not func.is_view:  # nor changed in place
                KNOWN[key] = form(out)
        if formula := FLOPS.get(func._overloadpacket):
            self.flops[self.part] += formula(*args, **kwargs, out_val=out)
        self.track(out)
        return out

    def track(self, tensors: Any) -> None:
        """Note the storages of `tensors`, a tree of them, that were not seen before."""
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
    """Attention (b, heads, s, d) as a fused kernel keeps it: no scores, unless their mask needs
    gradients (Parakeet's relative positions)."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if attention_mask is not None and attention_mask.requires_grad:
        scores = query @ key.transpose(2, 3) * kwargs["scaling"] + attention_mask
        out = scores.softmax(-1) @ value
    else:
        out = FUSED(query, key, value, scale=kwargs["scaling"])[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("counted", counted_attention)


def without_weights(config: Any, dtype: torch.dtype | None = None) -> ASRModel:
    """A model on the meta device: shapes and dtypes as `ASRModel.from_base` makes them.

    Args:
        config: an ASRConfig with both base configs in it; it is copied.
        dtype: of the base weights; None is fp32.
    """
    config = copy.copy(config)
    for name in ("audio_config", "text_config"):
        setattr(config, name, part := copy.deepcopy(getattr(config, name)))
        part._attn_implementation = "counted"
    for key, off in (("layerdrop", 0.0), ("apply_spec_augment", False)):  # chance changes no count
        if key in vars(config.audio_config):
            setattr(config.audio_config, key, off)
    with torch.device("meta"):
        encoder = build_encoder(config.audio_config).to(dtype or torch.float32)
        decoder = AutoModelForCausalLM.from_config(config.text_config).to(dtype or torch.float32)
        return ASRModel(config, encoder, decoder)


def twin_of(model: ASRModel) -> ASRModel:
    """The model without its weights; it trains the same parameters."""
    twin = without_weights(model.config, next(model.encoder.parameters()).dtype)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return twin


def count(
    twin: ASRModel,
    settings: Mapping[str, Any],
    seconds: float,
    tokens: int,
    clips: int = 1,
    prompt: int = PROMPT_TOKENS,
) -> Cost:
    """The cost of a training step on `clips` clips without padding.

    Args:
        twin: a model without weights; it is used up.
        settings: the training group of the config.
        seconds: length of a clip.
        tokens: transcript tokens of a clip, without the end token.
        clips: clips in a step: they set the memory.
        prompt: tokens of the chat format around the audio.

    With the bridge "posteriors" the decoder is taken to see one frame for each token. The optimizer
    is a fused AdamW: two states for each trained parameter, and nothing for its step.
    """
    if settings["gradient_checkpointing"]:
        twin.gradient_checkpointing_enable({"use_reentrant": False})
    recorder = Recorder()
    with torch.device("meta"), recorder:
        recorder.part = "weights"
        recorder.track([*twin.parameters(), *twin.buffers()])
        recorder.live["optimizer"] = 2 * sum(p.nbytes for p in twin.parameters() if p.requires_grad)
        step = _Step(twin.train(), recorder)
        for module in twin.encoder.children():
            if hasattr(module, "layers"):  # transformers 5.17 draws whether to drop each of them
                module.training = False
        step.forward(settings, clips, seconds, tokens, prompt)
        step.backward()
    audio = 1e9 * clips * seconds
    return Cost({part: recorder.flops[part] / audio for part in PARTS}, dict(recorder.peak))


class _Step:
    """One step of `ASRModel.forward` and its backward pass, cut at the parts' borders.

    The parts are called one by one: masks of real clips depend on data, which meta tensors lack.
    """

    def __init__(self, model: ASRModel, recorder: Recorder) -> None:
        self.model, self.recorder = model, recorder
        self.cuts: list[tuple[str, Tensor, Tensor | None]] = []  # part, its output, the next input

    def cut(self, output: Tensor) -> Tensor:
        """The output of a part as a fresh input of the next; gradients are handed over by hand."""
        fresh = output.detach().requires_grad_(output.requires_grad)
        self.cuts.append((self.recorder.part, output, fresh))
        return fresh

    def forward(
        self, settings: Mapping[str, Any], clips: int, seconds: float, tokens: int, prompt: int
    ) -> None:
        """Run the parts; what they keep for the backward pass stays in `cuts`."""
        model, recorder, cuts = self.model, self.recorder, self.cuts
        audio, text = model.config.audio_config, model.config.text_config
        recorder.part = "encoder"
        bins = [audio.num_mel_bins] if "num_mel_bins" in vars(audio) else []
        steps = round(seconds * (MEL_RATE if bins else SAMPLE_RATE))
        shape = [*bins, steps]
        if settings["cache_encoder"]:
            shape = [encoder_frames(audio, steps), audio.hidden_size]
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
        words = torch.empty(clips, prompt + tokens + 1, text.hidden_size, dtype=rows.dtype)
        embeds = torch.cat([fed.to(rows.dtype), words], dim=1)
        out = model.decoder.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        out = self.cut(out)
        recorder.part = "logits"
        logits = model.decoder.get_output_embeddings()(out[:, -tokens - 2 : -1].flatten(0, 1))
        targets = torch.empty(len(logits), dtype=torch.long)
        cuts.append((recorder.part, F.cross_entropy(logits.float(), targets), None))

    def backward(self) -> None:
        """Backward through the parts, the last first; each frees what it kept."""
        while self.cuts:
            self.recorder.part, output, fresh = self.cuts.pop()
            gradient = torch.ones_like(output) if fresh is None else fresh.grad
            del fresh
            if output.requires_grad and gradient is not None:
                torch.autograd.backward(output, gradient)


def table(*rows: Sequence[str]) -> str:
    """Rows of equally many cells as lines: the first column starts, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def describe(model: ASRModel) -> str:
    """A table of the parts: parameters in total and trained, dtype, mode."""
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
    """GFLOP of a second of audio, and a line that says it and the memory of a step."""
    seconds, tokens = 8.4, 25  # of a stream: a guess
    if examples:
        seconds = sum(example.duration for example in examples) / len(examples)
        tokens = round(sum(len(example.target) for example in examples) / len(examples))
    clips = max(1, int(settings["batch_seconds"] / seconds))
    cost = count(twin_of(model), settings, seconds, max(1, tokens), clips)
    gflop = sum(cost.gflop.values())
    parts = ", ".join(f"{part} {n:.1f}" for part, n in cost.gflop.items() if n)
    return gflop, (
        f"{gflop:.1f} GFLOP a second of audio ({parts}); expected memory "
        f"{sum(cost.memory.values()) / 1e9:.1f} GB with {clips} clips of {seconds:.1f} s"
    )


GPUS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "gpus.yaml").read_text())


def gpu_of(device_name: str) -> str | None:
    """The name in `gpus.yaml` of a device that torch calls `device_name`; None for others."""
    return next((name for name, gpu in GPUS.items() if device_name in gpu["devices"]), None)
