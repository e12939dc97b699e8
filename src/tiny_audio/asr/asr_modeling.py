"""ASRModel: encode -> project -> scatter into the prompt -> decode.

Shapes: b clips, t encoder frames, f projected frames (f = ceil(t / stack)), s prompt and text
tokens, d the decoder's hidden size, c CTC classes (class 0 is the blank).
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutput

from .asr_bases import add_lora, is_trained
from .asr_config import IGNORE, SPARE_TOKENS, ASRConfig
from .asr_ctc import CharacterHead, CTCHead, LengthLimit
from .asr_encoder import family_of, mask_group_norm
from .asr_ngram import NGram, build_ngram
from .asr_packing import NO_MASK, Shape, check_packed, pack, use_packed_attention
from .asr_projector import AudioProjector
from .asr_saving import SavedModel
from .asr_search import PrefixSearch, Proposal
from .asr_writing import Writing


class ASRModel(SavedModel, GenerationMixin):
    """An audio encoder and a causal language model, connected by a trained projector.

    `from_base` builds it from the base models, and `from_pretrained` loads it from a trained folder
    or Hub id. Only the projector, the bridge's residual, the CTC heads and the LoRA weights are
    trained.
    """

    main_input_name = "input_features"
    input_modalities = ["audio"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(
        self, config: ASRConfig, encoder: nn.Module | None = None, decoder: Any = None
    ) -> None:
        super().__init__(config)
        self.post_init()  # before the submodules exist: they initialise their own weights
        self.family = family_of(config.audio_config)
        self.encoder: Any = encoder or self.family.build(config.audio_config)
        self.decoder: Any = decoder or AutoModelForCausalLM.from_config(config.text_config)
        mask_group_norm(self.encoder)
        use_packed_attention(self.decoder)
        self.projector = AudioProjector(config)
        self.ctc: Any = CTCHead(config) if config.ctc_token_ids else None
        self.characters: Any = CharacterHead(config) if config.ctc_alphabet else None
        self.ngram: NGram | None = None
        self.writing: Writing | None = None
        self.last_search: Any = None  # kept by `search`
        self.last_text_prompt: Any = None  # kept by `read_text_prompt`
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
        """Run the encoder at the real lengths of the clips.

        Args:
            input_features: (b, samples), or (b, mels, frames) for a mel encoder.
            input_features_mask: (b, samples or frames), 1 for audio and 0 for padding.
            encoded: `input_features` already holds encoder frames (b, t, d_encoder), from a cache.

        Returns:
            Hidden states (b, t, d_encoder), zero beyond each clip, and lengths (b,) in frames.
        """
        if encoded:
            return input_features, input_features_mask.sum(1)
        lengths = self.family.frames(self.config.audio_config, input_features_mask.sum(1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_is_trained):
            features = input_features.to(self.encoder.dtype)
            hidden = self.family.run(self.encoder, features, input_features_mask)
        inside = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        return hidden.masked_fill(~inside[..., None], 0.0), lengths

    def bridge(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Turn projected frames into decoder inputs, with a mask of the frames to keep.

        "frames" uses the projected frames as they are. "posteriors" weights the decoder's own token
        embeddings by the CTC posterior and adds a residual of the frames that starts at zero
        (LegoSLM, arXiv 2505.11352). It drops blank frames and averages each run of frames with the
        same best class (CTC compression, arXiv 2411.07607). The prompt keeps a placeholder for
        every frame, so their number depends only on the audio's length. `embed` leaves out the
        dropped frames.

        Args:
            frames: (b, f, d), from the projector.
            lengths: (b,) frames of each clip.

        Returns:
            Embeddings (b, f, d) and a boolean mask (b, f).
        """
        b, f, d = frames.shape
        inside = torch.arange(f, device=frames.device) < lengths[:, None]  # (b, f)
        if self.residual is None:
            return frames, inside
        embedding = self.get_input_embeddings().weight.detach()
        log_probs: Tensor = self.ctc(frames, embedding)  # (b, f, c)
        best = log_probs.argmax(-1)
        spoken = (best > 0) & inside
        starts = spoken & (best != F.pad(best[:, :-1], (1, 0)))
        run = (starts.cumsum(1) - 1).clamp(min=0)  # (b, f): index of the run of each frame
        rows = self.get_input_embeddings()(self.ctc.token_ids).detach()  # (c - 1, d)
        weights = log_probs[..., 1:].softmax(-1).to(frames.dtype)  # without the blank
        mixed = weights @ rows.to(frames.dtype) + self.residual(frames)
        mixed = mixed * spoken[..., None]
        count = frames.new_zeros(b, f).scatter_add(1, run, spoken.to(frames.dtype))
        merged = torch.zeros_like(mixed).scatter_add(1, run[..., None].expand(-1, -1, d), mixed)
        keep = torch.arange(f, device=frames.device) < starts.sum(1, keepdim=True)
        return merged / count.clamp(min=1)[..., None], keep

    def embed(
        self, input_ids: Tensor, mask: Tensor, audio: Tensor, lengths: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scatter audio embeddings (b, f, d) onto the placeholders of `input_ids` (b, s).

        `mask` (b, s) is the attention mask; `lengths` and `keep` are those of `bridge`.

        Returns:
            Embeddings (b, s, d) in the decoder's dtype, and a boolean mask (b, s): False for
            padding and for the placeholders of dropped frames.

        Raises:
            ValueError: if the number of placeholders in a row differs from its `lengths` (b,).
        """
        slots = input_ids == self.config.audio_token_id  # has no embedding row: do not look it up
        text_ids = input_ids.masked_fill(slots, self.config.end_token_id)
        embeds = self.decoder.get_input_embeddings()(text_ids)
        if not torch.equal(slots.sum(1), lengths):
            raise ValueError(
                f"{slots.sum(1).tolist()} audio placeholders for {lengths.tolist()} frames: "
                "input_ids and input_features come from different clips or processors"
            )
        frame_of_slot = (slots.cumsum(1) - 1).clamp(min=0)  # (b, s)
        picked = audio.gather(1, frame_of_slot[..., None].expand(-1, -1, audio.shape[-1]))
        embeds = torch.where(slots[..., None], picked.to(embeds.dtype), embeds)
        return embeds, mask.bool() & (~slots | keep.gather(1, frame_of_slot))

    def forward(
        self,
        input_features: Tensor,
        input_features_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        character_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        decoder_loss_weight: float = 1.0,
        ctc_loss_weight: float = 0.0,
        ctc_negatives: int = 0,
        character_loss_weight: float = 0.0,
        encoded: bool = False,
    ) -> CausalLMOutput:
        """Compute the loss, and the logits at label positions only.

        Logits at other positions would cost memory and teach nothing.

        Args:
            input_features: (b, samples) or (b, mels, frames).
            input_features_mask: (b, samples or frames).
            input_ids: (b, s) prompt with one placeholder per projected frame, then the transcript.
            attention_mask: (b, s).
            labels: (b, s) transcript and end token, -100 elsewhere; None returns all logits.
            character_labels: (b, n) classes of the character head, padded with 0.
            num_items_in_batch: number of label positions over all accumulated batches and ranks;
                the loss is the mean over these.
            decoder_loss_weight: 0 skips the decoder (the cheap alignment stage).
            ctc_loss_weight: weight of the CTC loss per label.
            ctc_negatives: see `CTCHead.loss`.
            character_loss_weight: weight of the character head's loss per label (a token).
            encoded: see `encode`.

        Returns:
            `loss` (scalar) and `logits`: (label positions, vocab), or (b, s, vocab).
        """
        hidden, steps = self.encode(input_features, input_features_mask, encoded)
        if ctc_loss_weight or decoder_loss_weight or labels is None:
            frames, lengths = self.projector(hidden, steps)
        losses: list[Tensor] = []
        logits: Any = None
        if labels is not None and ctc_loss_weight:
            if self.ctc is None:
                raise ValueError("ctc_loss_weight is set but the model has no CTC head")
            embedding = self.get_input_embeddings().weight
            nll = self.ctc.loss(frames, lengths, labels, embedding, ctc_negatives)
            losses.append(ctc_loss_weight * nll)
        if labels is not None and character_loss_weight:
            if self.characters is None:
                raise ValueError("character_loss_weight is set but the model has no character head")
            if character_labels is None:
                raise ValueError("character_loss_weight needs character_labels: give a text")
            nll = self.characters.loss(hidden, steps, character_labels)
            losses.append(character_loss_weight * nll)
        if decoder_loss_weight or labels is None:
            audio, keep = self.bridge(frames, lengths)
            embeds, mask = self.embed(input_ids, attention_mask, audio, lengths, keep)
            start = 0 if labels is None else self.common_start(input_ids, attention_mask)
            states, read = self.run_decoder(embeds, mask, start)
            if labels is None:
                states = states.new_zeros(embeds.shape).masked_scatter(read[..., None], states)
                return CausalLMOutput(logits=self.decoder.get_output_embeddings()(states))
            first = read & (read.cumsum(1) == 1)  # no state of its row predicts it
            targets = labels.masked_fill(first, IGNORE)[read]
            at = targets != IGNORE
            logits = self.decoder.get_output_embeddings()(states[:-1][at[1:]])
            nll = F.cross_entropy(logits.float(), targets[at], reduction="sum")
            losses.append(decoder_loss_weight * nll)
        total: Any = num_items_in_batch
        if total is None:
            total = (labels != IGNORE).sum().clamp(min=1)
        loss: Any = sum(part / total for part in losses)
        return CausalLMOutput(loss=loss, logits=logits)

    def common_start(self, input_ids: Tensor, attention_mask: Tensor) -> int:
        """Count the tokens before the audio if all prompts (b, s) share them, else 0."""
        place = attention_mask.cumsum(1) * attention_mask  # from 1; 0 in the padding
        audio = input_ids[0] == self.config.audio_token_id
        n = max(0, int(place[0, audio.int().argmax()]) - 1)
        starts = input_ids[(place > 0) & (place <= n)].view(len(input_ids), n)
        return n if starts.eq(starts[:1]).all() else 0

    def run_decoder(self, embeds: Tensor, mask: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Run the decoder over a batch (b, s, d) without its padding, see `asr_packing`.

        Args:
            embeds, mask: from `embed`.
            start: number of tokens at the start of each row that are the same in all rows, and are
                read once. Gradients are the same as if each row had its own copy.

        Returns:
            The last hidden states (n, d) of the tokens after `start`, and their mask (b, s).
        """
        own = mask & (mask.cumsum(1) > start)
        packed = torch.cat([embeds[0, mask[0] & ~own[0]], embeds[own]])
        return self.read_packed(packed, *pack(own, start))[start:], own

    def read_packed(self, packed: Tensor, places: Tensor, shape: Shape) -> Tensor:
        """Return the last hidden states (n, d) of a packed sequence (n, d), see `pack`.

        Raises:
            ValueError: if the decoder cannot read packed clips.
        """
        check_packed(self.decoder)
        return self.decoder.base_model(
            inputs_embeds=packed[None],
            # Our attention uses none, but without one transformers would make one of (n, n).
            attention_mask=packed.new_ones(NO_MASK),
            position_ids=(places % shape[1])[None],
            use_cache=False,
            places=places,
            shape=shape,
        ).last_hidden_state[0]

    # -- decoding ------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_features: Tensor,
        input_features_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        stopping_criteria: list[StoppingCriteria] | None = None,
        encoded: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Transcribe a left-padded batch with the decoder alone, token by token.

        Args:
            input_features, input_features_mask, input_ids, attention_mask: from `ASRProcessor`.
            stopping_criteria: additional criteria.
            encoded: see `encode`.
            kwargs: any argument of `GenerationMixin.generate` (num_beams, streamer, ...).

        Returns:
            Only the new token ids, (b, new tokens). Each row may have one token per projected
            frame plus `SPARE_TOKENS`.
        """
        hidden, steps = self.encode(input_features, input_features_mask, encoded)
        embeds, attention_mask, lengths = self.prompts(hidden, steps, input_ids, attention_mask)
        limits = lengths + SPARE_TOKENS
        stop = StoppingCriteriaList([*(stopping_criteria or []), LengthLimit(limits)])
        self.decoder.generation_config = self.generation_config  # the decoder's own may sample
        own = kwargs.get("generation_config") or self.generation_config
        most = own.max_new_tokens or int(limits.max())
        options = {"max_new_tokens": most, "stopping_criteria": stop, **kwargs}
        return self.decoder.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)

    def prompts(
        self, hidden: Tensor, steps: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Build the decoder's inputs from encoder frames and the prompts of `ASRProcessor`.

        Placeholders of dropped frames move to the left, into the padding. Columns that are padding
        in every row are cut.

        Returns:
            Embeddings (b, s', d), attention mask (b, s') and numbers of projected frames (b,).
        """
        frames, lengths = self.projector(hidden, steps)
        audio, keep = self.bridge(frames, lengths)
        embeds, mask = self.embed(input_ids, attention_mask, audio, lengths, keep)
        padding_first = mask.long().argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
        embeds = embeds.gather(1, padding_first[..., None].expand(-1, -1, embeds.shape[-1]))
        return embeds, mask.gather(1, padding_first).to(attention_mask.dtype), lengths

    def search(self, settings: dict[str, Any]) -> PrefixSearch:
        """Return the search over the character head's output, see `ASRConfig.decoding`."""
        ngram, words = self.ngram if settings["lexicon"] else None, tuple(settings["words"])
        if ngram is None:  # only the characters count, as in scripts without spaces
            settings = {**settings, "ngram": 0.0, "word": 0.0, "open_character": 0.0}
        # The many small steps suit a CPU, and CUDA queues them just as fast.
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        key = ngram, words, device
        if self.last_search is None or self.last_search[0] != key:
            if words and ngram is None:
                raise ValueError("words to prefer need a lexicon: use lexicon=True and an n-gram")
            ngram = ngram.preferring(words) if ngram and words else ngram
            ngram = ngram or build_ngram([])
            search = PrefixSearch(self.config.ctc_alphabet, ngram, settings, device)
            self.last_search = key, search  # cached, because the lexicon takes a moment to build
        search = copy.copy(self.last_search[1])
        search.settings = settings
        return search

    def propose(
        self, log_probs: Tensor, steps: Tensor, settings: dict[str, Any]
    ) -> list[list[Proposal]]:
        """Find texts in the character head's output (b, t, c) of clips with `steps` (b,) frames.

        Returns the proposals of each clip, best first, written like the training transcripts.
        """
        proposals = self.search(settings)(log_probs, steps)
        if self.writing is None:
            return proposals
        write = self.writing.write
        return [[replace(p, text=write(p.text)) for p in of_clip] for of_clip in proposals]

    @torch.no_grad()
    def ctc_greedy(self, hidden: Tensor, steps: Tensor) -> list[list[int]]:
        """Decode each clip to token ids by the best path of the CTC head over tokens."""
        if self.ctc is None:
            raise ValueError("this model has no CTC head: use decode='generate'")
        frames, lengths = self.projector(hidden, steps)
        return self.ctc.greedy(self.ctc(frames, self.get_input_embeddings().weight), lengths)

    def decoder_without_lora(self) -> AbstractContextManager[None]:
        """Turn off the decoder's LoRA: this leaves a plain language model."""
        if not self.config.decoder_lora["r"]:
            return nullcontext()
        return rescale_adapter_scale(self.decoder, 0.0)

    # -- modes, parts --------------------------------------------------------------------------

    @property
    def encoder_is_trained(self) -> bool:
        """True if LoRA weights of the encoder are trained, so it needs gradients."""
        return any(p.requires_grad for n, p in self.encoder.named_parameters() if ".lora_" in n)

    def train(self, mode: bool = True) -> "ASRModel":
        """Set training or evaluation mode, as `nn.Module.train` does.

        A frozen encoder always stays in evaluation mode, so it applies no dropout, layer drop or
        time masking. Of a trained one, only batch norms and the feature extractor do.
        """
        super().train(mode)
        # Checkpoints do not save the statistics of batch norms. Feature extractors of waveform
        # encoders have no LoRA, and in training mode they request gradients of their input.
        frozen = "feature_extractor" if self.encoder_is_trained else ""  # "" begins every name
        for name, module in self.encoder.named_modules():
            if name.startswith(frozen) or isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's token embeddings."""
        return self.decoder.get_input_embeddings()
