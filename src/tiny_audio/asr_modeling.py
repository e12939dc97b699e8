"""ASRModel: encode -> project -> scatter into the prompt -> decode.

Shapes: b clips, t encoder frames, f projected frames (f = ceil(t / stack)), s prompt and text
tokens, d the decoder's hidden size, c CTC classes (class 0 is the blank).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import cached_file

from .asr_config import ASRConfig, check_keys, encoder_frames

WEIGHTS = "model.safetensors"
IGNORE = -100  # label positions that carry no target
LOG_ZERO = -1e4  # log of "impossible", finite so that sums of it stay finite
# How often a decoder may speak per projected frame, and what every clip may add to that.
TOKENS_PER_FRAME, SPARE_TOKENS = 1, 8
# Parameters that a checkpoint of the base model may lack: used only by SpecAugment in training.
MAY_BE_MISSING = {"masked_spec_embed", "encoder.masked_spec_embed"}


class WhisperEncoderHalf(WhisperEncoder):
    """Whisper's encoder, loaded from a checkpoint whose decoder is not wanted."""

    _keys_to_ignore_on_load_unexpected = (r"decoder\.", "proj_out")


class AudioProjector(nn.Module):
    """Stack `stack` frames, then a SwiGLU (Shazeer 2020, arXiv 2002.05202) into decoder space.

    The output norm starts at `projector_scale`, the RMS of the decoder's token embeddings, so that
    projected frames are as loud as the tokens that they stand among.
    """

    def __init__(self, config: ASRConfig) -> None:
        super().__init__()
        self.stack = config.stack
        d_in = config.stack * config.audio_config.hidden_size
        d_out = config.text_config.hidden_size
        self.input_norm = nn.RMSNorm(d_in, eps=1e-6)
        self.gate_proj = nn.Linear(d_in, config.projector_hidden, bias=False)
        self.up_proj = nn.Linear(d_in, config.projector_hidden, bias=False)
        self.dropout = nn.Dropout(config.projector_dropout)
        self.down_proj = nn.Linear(config.projector_hidden, d_out, bias=False)
        self.output_norm = nn.RMSNorm(d_out, eps=1e-6)
        nn.init.constant_(self.output_norm.weight, config.projector_scale)

    def forward(self, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(b, t, d_encoder), zero beyond `lengths` (b,) -> (b, f, d), lengths (b,) in frames."""
        b, t, _ = hidden.shape
        hidden = F.pad(hidden, (0, 0, 0, -t % self.stack))
        x = self.input_norm(hidden.view(b, -1, self.input_norm.normalized_shape[0]))
        x = self.dropout(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (b, f, hidden)
        return self.output_norm(self.down_proj(x)), (lengths + self.stack - 1) // self.stack


class CTCHead(nn.Module):
    """CTC over projected frames whose classifier is the decoder's own token embeddings.

    logit(token) = scale * cosine(frame - mean, embedding - mean), with a learned blank: a frame
    that means a word lies where the decoder already has that word. Classes 1.. are
    `ctc_token_ids`; class 0 is the blank.
    """

    token_ids: Tensor
    class_of: Tensor

    def __init__(self, config: ASRConfig) -> None:
        super().__init__()
        d = config.text_config.hidden_size
        ids = torch.tensor(config.ctc_token_ids)
        class_of = torch.zeros(config.text_config.vocab_size, dtype=torch.long)
        class_of[ids] = torch.arange(1, len(ids) + 1)
        self.register_buffer("token_ids", ids, persistent=False)
        self.register_buffer("class_of", class_of, persistent=False)  # 0: not a class of ours
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.blank = nn.Linear(d, 1)
        nn.init.zeros_(self.blank.weight)
        nn.init.zeros_(self.blank.bias)

    def forward(self, frames: Tensor, embedding: Tensor, classes: Tensor | None = None) -> Tensor:
        """Frames (b, f, d) and the embedding matrix (vocab, d) -> log-probabilities (b, f, c).

        With `classes` (n,), some of 1.., only of the blank and those: (b, f, n + 1).
        """
        ids = self.token_ids if classes is None else self.token_ids[classes - 1]
        rows = embedding.detach()[self.token_ids].to(frames.dtype)  # (c - 1, d)
        mean = rows.mean(0)
        rows = rows if classes is None else embedding.detach()[ids].to(frames.dtype)
        cosine = F.normalize(frames - mean, dim=-1) @ F.normalize(rows - mean, dim=-1).T
        logits = torch.cat([self.blank(frames), self.log_scale.exp() * cosine], dim=-1)
        return logits.float().log_softmax(-1)

    def loss(
        self,
        frames: Tensor,
        lengths: Tensor,
        labels: Tensor,
        embedding: Tensor,
        negatives: int = 0,
    ) -> Tensor:
        """Summed negative log-likelihood (Graves et al. 2006) of `labels` (b, s); -100 is skipped.

        Tokens that are no class are left out of the target; a target that does not fit into its
        frames adds nothing (`data.py` drops such clips by name before they come here).

        Args:
            negatives: score the batch's own tokens against so many others drawn at random (a
                sampled softmax, 3x faster with 16,000 classes); 0 scores against all.
        """
        targets = self.class_of[labels.clamp(min=0)].masked_fill(labels == IGNORE, 0)
        present = targets > 0
        chosen = None
        if 0 < negatives < len(self.token_ids):
            others = torch.randperm(len(self.token_ids), device=labels.device)[:negatives] + 1
            chosen = torch.cat([targets[present], others]).unique()
            targets = torch.searchsorted(chosen, targets) + 1
        return F.ctc_loss(
            self(frames, embedding, chosen).transpose(0, 1),
            targets[present],
            lengths,
            present.sum(1),
            reduction="sum",
            zero_infinity=True,
        )

    def greedy(self, log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        """Best path, repeats merged and blanks dropped: token ids for each clip."""
        best = log_probs.argmax(-1)
        paths = [row[:n].unique_consecutive() for row, n in zip(best, lengths, strict=True)]
        return [self.token_ids[path[path > 0] - 1].tolist() for path in paths]


class CTCPrefixScorer(LogitsProcessor):
    """Joint CTC/decoder decoding: adds the CTC prefix score to the decoder's log-probabilities.

    score(token) = log p_decoder(token | prefix) + weight * log [psi(prefix token) / psi(prefix)]
    where psi is the CTC probability of all texts that begin so (Watanabe et al. 2017, "Hybrid
    CTC/Attention Architecture", algorithm 2). All candidates are scored at once: with r(t) the
    probability that frames up to t spell the prefix, psi(prefix c) = sum_t r(t-1) p(c | t), a
    matrix product. Rows may be reordered by beam search: a row finds its parent by its tokens.
    """

    def __init__(self, ctc: CTCHead, log_probs: Tensor, lengths: Tensor, end: int, weight: float):
        b, f, _ = log_probs.shape
        beyond = torch.arange(f, device=lengths.device) >= lengths[:, None]
        log_probs = log_probs.double().masked_fill(beyond[..., None], LOG_ZERO)
        log_probs[..., 0].masked_fill_(beyond, 0.0)  # padding can only be blank
        self.log_probs, self.probs = log_probs, log_probs[..., 1:].exp()  # (b, f, c)
        self.ctc, self.end, self.weight = ctc, end, weight
        self.tokens = torch.zeros(b, 0, dtype=torch.long, device=lengths.device)
        self.item = torch.arange(b, device=lengths.device)  # the clip of each row
        self.r_token = torch.full((b, f), LOG_ZERO, device=lengths.device, dtype=torch.double)
        self.r_blank = log_probs[..., 0].cumsum(1)  # the empty prefix: blanks only
        self.score = torch.zeros(b, device=lengths.device, dtype=torch.double)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Token ids (rows, n) so far and logits (rows, vocab) -> joint scores (rows, vocab)."""
        if input_ids.shape[1]:
            self._extend(input_ids)
        elif len(input_ids) > len(self.item):  # beam search: every clip has several rows
            self._select(self.item.repeat_interleave(len(input_ids) // len(self.item)), input_ids)
        psi = self._psi()  # (rows, c - 1)
        end = torch.logaddexp(self.r_token[:, -1], self.r_blank[:, -1])
        joint = torch.full_like(scores, float("-inf"), dtype=torch.float)
        joint[:, self.ctc.token_ids] = (self.weight * (psi - self.score[:, None])).float()
        joint[:, self.end] = (self.weight * (end - self.score)).float()
        return joint + scores.float().log_softmax(-1)

    def _before(self, r: Tensor, first: float) -> Tensor:
        """r(t - 1) for every t, with the given value before the first frame."""
        return torch.cat([r.new_full((len(r), 1), first), r[:, :-1]], dim=1)

    def _phi(self) -> tuple[Tensor, Tensor]:
        """Probability of the prefix before frame t: (rows, f) for a new token, for a repeat."""
        empty = self.tokens.shape[1] == 0
        blank = self._before(self.r_blank, 0.0 if empty else LOG_ZERO)
        return torch.logaddexp(self._before(self.r_token, LOG_ZERO), blank), blank

    def _psi(self) -> Tensor:
        """log psi(prefix c) for every class c but the blank: (rows, c - 1)."""
        fresh, repeat = self._phi()
        peak = fresh.max(1, keepdim=True).values
        probs = self.probs[self.item]
        psi = torch.einsum("rf,rfc->rc", (fresh - peak).exp(), probs)
        if self.tokens.shape[1]:
            last = self.ctc.class_of[self.tokens[:, -1]] - 1  # -1: the end token, never extended
            row = torch.arange(len(last), device=last.device)
            psi[row, last] = ((repeat - peak).exp() * probs[row, :, last]).sum(1)
        return psi.clamp(min=1e-300).log() + peak

    def _select(self, rows: Tensor, tokens: Tensor) -> None:
        self.item, self.tokens = self.item[rows], tokens
        self.r_token, self.r_blank = self.r_token[rows], self.r_blank[rows]
        self.score = self.score[rows]

    def _extend(self, input_ids: Tensor) -> None:
        """Move the state of each row to its parent's prefix plus the row's newest token."""
        per_item = len(self.item) // len(self.item.unique())
        item = torch.arange(len(input_ids), device=input_ids.device) // per_item
        same = (self.tokens[None] == input_ids[:, None, :-1]).all(-1) & (self.item == item[:, None])
        self._select(same.int().argmax(1), input_ids[:, :-1])
        newest = self.ctc.class_of[input_ids[:, -1]]
        row = torch.arange(len(newest), device=newest.device)
        self.score = self._psi()[row, newest - 1]
        fresh, blank = self._phi()
        repeat = self.tokens.shape[1] > 0 and self.tokens[:, -1] == input_ids[:, -1]
        phi = torch.where(torch.as_tensor(repeat, device=newest.device)[..., None], blank, fresh)
        # r_token(t) = [r_token(t-1) + phi(t)] p(t) unrolled: one cumulative sum instead of a loop
        log_p = self.log_probs[self.item, :, newest]  # (rows, f)
        total = log_p.cumsum(1)
        self.r_token = total + torch.logcumsumexp(phi - self._before(total, 0.0), 1)
        total = self.log_probs[self.item, :, 0].cumsum(1)
        into = self._before(self.r_token, LOG_ZERO)
        self.r_blank = total + torch.logcumsumexp(into - self._before(total, 0.0), 1)
        self.tokens = input_ids


class LengthLimit(LogitsProcessor):
    """Ends each row at its own number of new tokens, whatever else is in the batch."""

    def __init__(self, limits: Tensor, end: int) -> None:
        self.limits, self.end = limits, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores (rows, vocab) with nothing but the end token left where a limit is reached."""
        rows = self.limits.repeat_interleave(len(scores) // len(self.limits))
        over = (input_ids.shape[1] >= rows)[:, None]
        only_end = torch.full_like(scores, float("-inf"))
        only_end[:, self.end] = 0.0
        return torch.where(over, only_end, scores)


class ASRModel(PreTrainedModel, GenerationMixin):
    """An audio encoder and a causal language model with a trained projector between them.

    Built from the base models by `from_base`, from a trained folder or Hub id by
    `from_pretrained`. Only the projector, the CTC head and LoRA weights are trained.
    """

    config_class = ASRConfig
    config: ASRConfig
    main_input_name = "input_features"
    input_modalities = ["audio"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(
        self, config: ASRConfig, encoder: nn.Module | None = None, decoder: Any = None
    ) -> None:
        super().__init__(config)
        self.post_init()  # before there are children: each of them brings its own weights
        self.encoder: Any = encoder or build_encoder(config.audio_config)
        self.decoder: Any = decoder or AutoModelForCausalLM.from_config(config.text_config)
        self.projector = AudioProjector(config)
        self.ctc: Any = CTCHead(config) if config.ctc_token_ids else None
        self.residual: Any = None
        if config.bridge == "posteriors":
            if self.ctc is None:
                raise ValueError("bridge 'posteriors' needs a CTC head: ctc_token_ids is empty")
            d = config.text_config.hidden_size
            self.residual = nn.Linear(d, d, bias=False)
            nn.init.zeros_(self.residual.weight)
        add_lora(self.encoder, config.encoder_lora, "encoder")
        add_lora(self.decoder, config.decoder_lora, "decoder")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trained(name))
        self.generation_config = GenerationConfig(
            eos_token_id=config.end_token_id, pad_token_id=config.end_token_id
        )

    # -- training and inference share these three steps --------------------------------------

    def encode(
        self, input_features: Tensor, input_features_mask: Tensor, encoded: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Encoder frames at the clips' real lengths.

        Args:
            encoded: `input_features` are such frames already, (b, t, d_encoder), from a cache.
            input_features: (b, samples), or (b, mels, frames) for a mel encoder.
            input_features_mask: (b, samples or frames), 1 where there is audio.

        Returns:
            Hidden states (b, t, d_encoder), zero beyond each clip, and lengths (b,) in frames.
        """
        if encoded:
            return input_features, input_features_mask.sum(1)
        lengths = encoder_frames(self.config.audio_config, input_features_mask.sum(1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_is_trained):
            if self.config.audio_config.model_type == "whisper":
                hidden = encode_whisper(self.encoder, input_features, input_features_mask)
            else:
                hidden = self.encoder(
                    input_features, attention_mask=input_features_mask.long()
                ).last_hidden_state
        inside = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        return hidden * inside[..., None], lengths

    def project(
        self, input_features: Tensor, input_features_mask: Tensor, encoded: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Audio -> projected frames (b, f, d) in fp32 or autocast dtype, and lengths (b,)."""
        hidden, lengths = self.encode(input_features, input_features_mask, encoded)
        return self.projector(hidden.to(self.projector.gate_proj.weight.dtype), lengths)

    def bridge(
        self, frames: Tensor, lengths: Tensor, log_probs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the decoder is fed for each projected frame, and which of them it may see.

        "frames": the projected frames. "posteriors": the decoder's own token embeddings weighted
        by the CTC posterior, blank frames dropped and runs of one best class averaged (LegoSLM,
        arXiv 2505.11352; CTC compression, arXiv 2411.07607), plus a residual of the frames that
        starts at zero. The prompt keeps a placeholder for every frame, so that their number
        depends on the audio's length alone; `embed` leaves out the dropped ones.

        Returns:
            Embeddings (b, f, d) and a boolean mask (b, f).
        """
        b, f, d = frames.shape
        inside = torch.arange(f, device=frames.device) < lengths[:, None]  # (b, f)
        if self.residual is None or log_probs is None:
            return frames, inside
        best = log_probs.argmax(-1)
        spoken = (best > 0) & inside
        starts = spoken & (best != F.pad(best[:, :-1], (1, 0)))
        run = (starts.cumsum(1) - 1).clamp(min=0)  # (b, f): the run that each frame belongs to
        rows = self.decoder.get_input_embeddings().weight.detach()[self.ctc.token_ids]
        weights = log_probs[..., 1:].softmax(-1).to(frames.dtype)  # without the blank
        mixed = weights @ rows.to(frames.dtype) + self.residual(frames)
        mixed = mixed * spoken[..., None]
        count = frames.new_zeros(b, f).scatter_add(1, run, spoken.to(frames.dtype))
        merged = torch.zeros_like(mixed).scatter_add(1, run[..., None].expand(-1, -1, d), mixed)
        keep = torch.arange(f, device=frames.device) < starts.sum(1, keepdim=True)
        return merged / count.clamp(min=1)[..., None], keep

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        audio: Tensor,
        keep: Tensor,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scatter audio embeddings (b, f, d) onto the placeholders of `input_ids` (b, s).

        Placeholders of frames that are not kept are moved to the left, into the padding, and
        columns that are padding in every row are cut: the decoder never computes them.

        Returns:
            Embeddings (b, s', d) in the decoder's dtype, the attention mask (b, s') and the labels
            (b, s'), all -100 when none are given.

        Raises:
            ValueError: when a row has more placeholders than there are frames.
        """
        slots = input_ids == self.config.audio_token_id  # no row of the embedding: never looked up
        text_ids = input_ids.masked_fill(slots, self.config.end_token_id)
        embeds = self.decoder.get_input_embeddings()(text_ids)
        if int(slots.sum(1).max()) > audio.shape[1]:
            raise ValueError(
                f"{int(slots.sum(1).max())} audio placeholders for {audio.shape[1]} frames: "
                "input_ids and input_features come from different clips or processors"
            )
        index = (slots.cumsum(1) - 1).clamp(min=0)  # (b, s): the frame of each placeholder
        picked = audio.gather(1, index[..., None].expand(-1, -1, audio.shape[-1]))
        embeds = torch.where(slots[..., None], picked.to(embeds.dtype), embeds)
        mask = attention_mask * (~slots | keep.gather(1, index))
        width = int(mask.sum(1).max())
        order = mask.argsort(dim=1, stable=True)[:, -width:]  # (b, s'): what is masked goes left
        embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
        labels = torch.full_like(input_ids, IGNORE) if labels is None else labels
        return embeds, mask.gather(1, order), labels.gather(1, order)

    def forward(
        self,
        input_features: Tensor,
        input_features_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        decoder_loss_weight: float = 1.0,
        ctc_loss_weight: float = 0.0,
        ctc_negatives: int = 0,
        full_logits: bool = False,
        encoded: bool = False,
    ) -> CausalLMOutput:
        """Loss, and logits at label positions only: those of the whole vocabulary elsewhere cost
        memory and teach nothing.

        Args:
            input_features: (b, samples) or (b, mels, frames).
            input_features_mask: (b, samples or frames).
            input_ids: (b, s) prompt with one placeholder per projected frame, then the transcript.
            attention_mask: (b, s).
            labels: (b, s) transcript and end token, -100 elsewhere; None gives all logits.
            num_items_in_batch: label positions over all accumulated batches and ranks; the loss is
                their mean.
            decoder_loss_weight: 0 skips the decoder: the cheap alignment stage.
            ctc_loss_weight: weight of the CTC loss per label.
            ctc_negatives: see `CTCHead.loss`.
            full_logits: compute the logits at every position all the same (a baseline).
            encoded: see `encode`.

        Returns:
            `loss` (scalar) and `logits`: (label positions, vocab), or (b, s, vocab).
        """
        frames, lengths = self.project(input_features, input_features_mask, encoded)
        log_probs: Any = None
        rows = self.decoder.get_input_embeddings().weight
        if self.residual is not None and (decoder_loss_weight or labels is None):
            log_probs = self.ctc(frames, rows)
        loss: Any = None
        logits: Any = None
        total: Any = num_items_in_batch
        if labels is not None and total is None:
            total = (labels != IGNORE).sum().clamp(min=1)
        if labels is not None and ctc_loss_weight:
            if self.ctc is None:
                raise ValueError("ctc_loss_weight is set but the model has no CTC head")
            nll = self.ctc.loss(frames, lengths, labels, rows, ctc_negatives)
            loss = ctc_loss_weight * nll / total
        if decoder_loss_weight or labels is None:
            audio, keep = self.bridge(frames, lengths, log_probs)
            embeds, attention_mask, shifted = self.embed(
                input_ids, attention_mask, audio, keep, labels
            )
            hidden = self.decoder.base_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state
            head = self.decoder.get_output_embeddings()
            if labels is None or full_logits:
                logits = head(hidden)  # (b, s', vocab)
            if labels is not None:
                targets = shifted[:, 1:]
                at = targets != IGNORE
                if full_logits:
                    scored = logits[:, :-1].float()[at]
                else:
                    scored = logits = head(hidden[:, :-1][at])  # (label positions, vocab)
                nll = F.cross_entropy(scored.float(), targets[at], reduction="sum")
                loss = decoder_loss_weight * nll / total + (0.0 if loss is None else loss)
        return CausalLMOutput(loss=loss, logits=logits)

    # -- decoding ------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_features: Tensor,
        input_features_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        ctc_decode_weight: float | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Transcribe a left-padded batch; returns new token ids only, as (b, new tokens).

        Args:
            input_features, input_features_mask, input_ids, attention_mask: from `ASRProcessor`.
            ctc_decode_weight: weight of the CTC prefix score; None takes the config's, 0 leaves
                the decoder alone.
            generation_config: replaces the model's own.
            logits_processor: further processors, applied before the CTC score.
            kwargs: any argument of `GenerationMixin.generate` (num_beams, streamer, ...).

        Each row may speak one token per projected frame and `SPARE_TOKENS` more.
        """
        weight = self.config.ctc_decode_weight if ctc_decode_weight is None else ctc_decode_weight
        frames, lengths = self.project(input_features, input_features_mask)
        log_probs: Any = None
        if self.ctc is not None and (weight or self.residual is not None):
            log_probs = self.ctc(frames, self.decoder.get_input_embeddings().weight)
        audio, keep = self.bridge(frames, lengths, log_probs)
        embeds, attention_mask, _ = self.embed(input_ids, attention_mask, audio, keep)
        end = self.config.end_token_id
        processors = LogitsProcessorList(logits_processor or [])
        if weight and self.ctc is not None:
            processors.append(CTCPrefixScorer(self.ctc, log_probs, lengths, end, weight))
        limits = self.token_limits(lengths)
        processors.append(LengthLimit(limits, end))
        kwargs.setdefault("max_new_tokens", int(limits.max()) + 1)
        return self.decoder.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config or self.generation_config,
            logits_processor=processors,
            **kwargs,
        )

    @staticmethod
    def token_limits(lengths: Tensor) -> Tensor:
        """Most new tokens that each clip of `lengths` (b,) projected frames may have."""
        return lengths * TOKENS_PER_FRAME + SPARE_TOKENS

    @torch.no_grad()
    def ctc_generate(self, input_features: Tensor, input_features_mask: Tensor) -> list[list[int]]:
        """Greedy transcript of the CTC head alone: token ids for each clip."""
        if self.ctc is None:
            raise ValueError("this model has no CTC head")
        frames, lengths = self.project(input_features, input_features_mask)
        log_probs = self.ctc(frames, self.decoder.get_input_embeddings().weight)
        return self.ctc.greedy(log_probs, lengths)

    # -- modes, parts --------------------------------------------------------------------------

    @property
    def encoder_is_trained(self) -> bool:
        """True when the encoder has LoRA weights, so that gradients must reach it."""
        return bool(self.config.encoder_lora["r"])

    def train(self, mode: bool = True) -> "ASRModel":
        """Training mode for the trained parts; a frozen encoder stays as it was pretrained, with
        no dropout, layer drop or time masking. The decoder follows: gradients flow through it."""
        super().train(mode)
        if not self.encoder_is_trained:
            self.encoder.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embeddings."""
        return self.decoder.get_input_embeddings()

    # -- saving and loading --------------------------------------------------------------------

    def checkpoint_names(self, self_contained: bool) -> list[str]:
        """Names of the tensors that a checkpoint holds; of tied ones, the first."""
        seen: set[int] = set()
        names = []
        for name, tensor in self.state_dict(keep_vars=True).items():
            if (self_contained or is_trained(name)) and id(tensor) not in seen:
                seen.add(id(tensor))
                names.append(name)
        return names

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        self_contained: bool | None = None,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write config, generation config, tensors and the code that loads them.

        Args:
            save_directory: folder, made if missing.
            self_contained: write the base models' weights too, so that the folder needs nothing
                else. None: only where a base model is a local folder, which others lack.
            state_dict: tensors to write instead of the model's own (a gathered sharded state).
        """
        check_keys(kwargs, {"is_main_process", "safe_serialization"}, "save_pretrained")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        bases = (self.config.encoder_name, self.config.decoder_name)
        if self_contained is None:
            self_contained = self.config.self_contained or any(Path(b).is_dir() for b in bases)
        state = self.state_dict() if state_dict is None else state_dict
        tensors = {n: state[n].contiguous() for n in self.checkpoint_names(self_contained)}
        save_file(tensors, folder / (WEIGHTS + ".tmp"), metadata={"format": "pt"})
        (folder / (WEIGHTS + ".tmp")).replace(folder / WEIGHTS)
        config = self.config.to_dict()
        config.update(AUTO_MAP, architectures=["ASRModel"], self_contained=self_contained)
        if self_contained:  # no path of this machine travels with the model
            config.update(encoder_name=Path(bases[0]).name, decoder_name=Path(bases[1]).name)
        for part in (config, config["audio_config"], config["text_config"]):
            for key in ("dtype", "_name_or_path", "_attn_implementation", "attn_implementation"):
                part.pop(key, None)  # choices of the run
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        self.generation_config.save_pretrained(folder)
        here = Path(__file__).parent
        for source in [*sorted(here.glob("asr_*.py")), here / "handler.py"]:
            if source.exists() and source.resolve() != (folder / source.name).resolve():
                shutil.copyfile(source, folder / source.name)

    @classmethod
    def from_base(
        cls, config: ASRConfig, *, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> "ASRModel":
        """Load the base models that `config` names and put fresh trained parts between them.

        Args:
            config: its `audio_config` and `text_config` may be None; they are read here, and the
                commits that were resolved are written into it.
            dtype: of the base weights; the trained parts stay in fp32.
            kwargs: `attn_implementation`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            OSError: when a base model is not found.
            ValueError: when a base model lacks weights.
        """
        loaded = []
        for part in ("encoder", "decoder"):
            name, revision = getattr(config, f"{part}_name"), getattr(config, f"{part}_revision")
            kind: Any = AutoModel if part == "encoder" else AutoModelForCausalLM
            extra: dict[str, Any] = {}
            where = {k: v for k, v in kwargs.items() if k != "attn_implementation"}
            base = AutoConfig.from_pretrained(name, revision=revision, **where)
            if base.model_type == "whisper":  # its decoder is not wanted
                kind, extra = WhisperEncoderHalf, {"key_mapping": {r"^(model\.)?encoder\.": ""}}
            model, info = kind.from_pretrained(  # type: ignore[misc]
                name,
                revision=revision,
                dtype=dtype or torch.float32,
                output_loading_info=True,
                **extra,
                **kwargs,
            )
            if missing := set(info["missing_keys"]) - MAY_BE_MISSING:
                raise ValueError(f"{part} {name} lacks weights: {sorted(missing)[:5]}")
            loaded.append(model)
            commit = vars(model.config).get("_commit_hash")  # absent for a local folder
            setattr(config, f"{part}_revision", commit or revision)
        encoder, decoder = loaded
        config.audio_config, config.text_config = encoder.config, decoder.config
        embeddings = decoder.get_input_embeddings().weight.detach()
        config.projector_scale = embeddings.float().pow(2).mean().sqrt().item()
        return cls(config, encoder, decoder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name_or_path: str | Path, *args: Any, config: ASRConfig | None = None, **kwargs: Any
    ) -> "ASRModel":
        """Load a trained model from a folder or Hub id; its base models from where it says.

        Args:
            name_or_path: folder written by `save_pretrained`, or Hub id.
            config: replaces the one beside the weights.
            kwargs: `dtype`, `attn_implementation`, `device_map` ("auto" or a device),
                and Hub arguments (`revision`, `token`, `cache_dir`, `local_files_only`, ...).

        Raises:
            OSError: when the folder or its weights are missing.
            ValueError: for tensors that are missing, unexpected or of another shape.
        """
        hub = {k: kwargs.pop(k) for k in HUB_KEYS if k in kwargs}
        for key in AUTO_CLASS_KEYS:
            kwargs.pop(key, None)
        dtype, device = kwargs.pop("dtype", None), kwargs.pop("device_map", None)
        attention = kwargs.pop("attn_implementation", None)
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        if args:
            raise ValueError("ASRModel.from_pretrained takes one positional argument, the model")
        check_keys(kwargs, {"dtype", "device_map", "attn_implementation", *HUB_KEYS}, cls.__name__)
        config = config or ASRConfig.from_pretrained(name_or_path, **hub)
        tensors = load_file(str(cached_file(str(name_or_path), WEIGHTS, **hub)))
        local = {k: v for k, v in hub.items() if k not in ("revision", "subfolder")}
        if config.self_contained:
            for part in (config.audio_config, config.text_config):
                part._attn_implementation = attention
            model = cls(config)
            if dtype:
                model.encoder.to(dtype)
                model.decoder.to(dtype)
        else:
            scale = config.projector_scale
            model = cls.from_base(config, dtype=dtype, attn_implementation=attention, **local)
            config.projector_scale = scale
        model.load_tensors(tensors, f"{name_or_path}/{WEIGHTS}")
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **hub)
        config.name_or_path = str(name_or_path)
        if device == "auto":
            device = torch.accelerator.current_accelerator(check_available=True)
        if device:
            model.to(device)  # type: ignore[arg-type]
        return model.eval()

    def load_tensors(
        self, tensors: dict[str, Tensor], source: str, fresh_lora: bool = False
    ) -> None:
        """Fill in checkpoint tensors; every expected one must be there, and nothing else.

        Args:
            tensors: by name, as `checkpoint_names` lists them.
            source: file that they come from, for messages.
            fresh_lora: LoRA weights that the file lacks may keep their start (a new stage).

        Raises:
            ValueError: naming the tensors that are missing, unexpected or of another shape.
        """
        expected = self.state_dict()
        names = set(self.checkpoint_names(self.config.self_contained))
        if fresh_lora:
            names = {n for n in names if n in tensors or ".lora_" not in n}
        wrong = [
            f"{n}: {tuple(tensors[n].shape)} in the file, {tuple(expected[n].shape)} in the model"
            for n in sorted(names & set(tensors))
            if tensors[n].shape != expected[n].shape
        ]
        for kind, found in (
            ("missing", sorted(names - set(tensors))),
            ("unexpected", sorted(set(tensors) - names)),
            ("mis-shaped", wrong),
        ):
            if found:
                raise ValueError(f"{source}: {len(found)} {kind} tensors, first {found[:3]}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                expected[name].copy_(tensor)


HUB_KEYS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
    "subfolder",
)
# What transformers' Auto classes and pipelines pass along beside their user's arguments.
AUTO_CLASS_KEYS = (
    *("_from_pipeline", "_commit_hash", "_from_auto"),
    *("trust_remote_code", "code_revision", "adapter_kwargs"),
)
AUTO_MAP: dict[str, Any] = {
    "auto_map": {
        "AutoConfig": "asr_config.ASRConfig",
        "AutoModelForSpeechSeq2Seq": "asr_modeling.ASRModel",
        "AutoProcessor": "asr_processing.ASRProcessor",
    },
    "custom_pipelines": {
        "automatic-speech-recognition": {
            "impl": "asr_pipeline.ASRPipeline",
            "pt": ["AutoModelForSpeechSeq2Seq"],
        }
    },
}


def is_trained(name: str) -> bool:
    """Whether a parameter of this name is trained, and so belongs in every checkpoint."""
    return name.startswith(("projector.", "ctc.", "residual.")) or ".lora_" in name


def build_encoder(audio_config: Any) -> nn.Module:
    """An encoder with random weights from its config (the encoder half, for Whisper)."""
    if audio_config.model_type == "whisper":
        return WhisperEncoderHalf(audio_config)
    return AutoModel.from_config(audio_config)


def add_lora(module: nn.Module, settings: Any, part: str) -> None:
    """Put LoRA (Hu et al. 2021, arXiv 2106.09685) on the named modules of `module`, in place.

    Raises:
        ValueError: when a target matches no module.
    """
    if not settings["r"]:
        return
    leaves = {name.rsplit(".", 1)[-1] for name, _ in module.named_modules()}
    for target in settings["target_modules"]:
        if target not in leaves:
            raise ValueError(f"{part} LoRA target {target!r} matches no module of the {part}")
    inject_adapter_in_model(LoraConfig(**settings), module)


def encode_whisper(encoder: Any, features: Tensor, mask: Tensor) -> Tensor:
    """Whisper's encoder at the real length instead of 30 s: (b, mels, n) -> (b, t, d).

    Position embeddings are cut to t; padding is zeroed before each convolution and hidden from
    attention, so that a clip's frames do not depend on what else is in the batch.

    Raises:
        ValueError: when the audio is longer than the encoder's positions.
    """
    mask = mask[:, None].to(features.dtype)  # (b, 1, n)
    positions = encoder.embed_positions.weight
    dtype = encoder.conv1.weight.dtype
    x = F.gelu(encoder.conv1((features * mask).to(dtype))) * mask.to(dtype)
    x = F.gelu(encoder.conv2(x)).transpose(1, 2)  # (b, t, d)
    t = x.shape[1]
    if t > len(positions):
        raise ValueError(
            f"{t} encoder frames, but Whisper has {len(positions)} positions: audio over 30 s must "
            "be split (the pipeline does)"
        )
    x = F.dropout(x + positions[:t], p=encoder.dropout, training=encoder.training)
    visible = mask[:, 0, ::2].bool()  # (b, t): frame i sees input step 2 i
    bias = torch.zeros(len(x), 1, 1, t, dtype=x.dtype, device=x.device)
    bias = bias.masked_fill(~visible[:, None, None], torch.finfo(x.dtype).min)
    for layer in encoder.layers:
        out = layer(x, bias.expand(-1, -1, t, -1))
        x = out[0] if isinstance(out, tuple) else out
    return encoder.layer_norm(x)
