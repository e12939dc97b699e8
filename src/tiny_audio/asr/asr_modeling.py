"""ASRModel: encode -> project -> scatter into the prompt -> decode.

Shapes: b clips, t encoder frames, f projected frames (f = ceil(t / stack)), s prompt and text
tokens, d the decoder's hidden size, c CTC classes (class 0 is the blank).
"""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import cached_file

from .asr_bases import (
    add_lora,
    cast_base,
    choose_attention,
    is_trained,
    load_base,
    load_weights,
    shard_like,
)
from .asr_config import AUTO_MAP, IGNORE, ASRConfig, check_keys, encoder_frames
from .asr_ctc import CharacterHead, CTCHead, LengthLimit
from .asr_encoder import build_encoder, mask_group_norm, run_encoder
from .asr_ngram import NGram, load_arpa, save_arpa
from .asr_projector import AudioProjector
from .asr_search import PrefixSearch, SearchSettings

WEIGHTS = "model.safetensors"
NGRAM = "ngram.arpa.gz"  # n-gram of the training transcripts, beside the weights
SPARE_TOKENS = 8  # tokens that a clip may have beyond one per projected frame


class ASRModel(PreTrainedModel, GenerationMixin):
    """An audio encoder and a causal language model, connected by a trained projector.

    `from_base` builds it from the base models, and `from_pretrained` loads it from a trained folder
    or Hub id. Only the projector, the bridge's residual, the CTC heads and the LoRA weights are
    trained.
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
        self.post_init()  # before the submodules exist: they initialise their own weights
        self.encoder: Any = encoder or build_encoder(config.audio_config)
        self.decoder: Any = decoder or AutoModelForCausalLM.from_config(config.text_config)
        mask_group_norm(self.encoder)
        self.projector = AudioProjector(config)
        self.ctc: Any = CTCHead(config) if config.ctc_token_ids else None
        self.characters: Any = CharacterHead(config) if config.ctc_alphabet else None
        self.ngram: NGram | None = None
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
        audio_config = self.config.audio_config
        lengths = encoder_frames(audio_config, input_features_mask.sum(1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_is_trained):
            hidden = run_encoder(self.encoder, audio_config, input_features, input_features_mask)
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

        Returns:
            Embeddings (b, f, d) and a boolean mask (b, f).
        """
        b, f, d = frames.shape
        inside = torch.arange(f, device=frames.device) < lengths[:, None]  # (b, f)
        if self.residual is None:
            return frames, inside
        embedding = self.get_input_embeddings().weight.detach()
        log_probs = self.ctc(frames, embedding)  # (b, f, c)
        best = log_probs.argmax(-1)
        spoken = (best > 0) & inside
        starts = spoken & (best != F.pad(best[:, :-1], (1, 0)))
        run = (starts.cumsum(1) - 1).clamp(min=0)  # (b, f): index of the run of each frame
        rows = embedding[self.ctc.token_ids].to(frames.dtype)  # (c - 1, d)
        weights = log_probs[..., 1:].softmax(-1).to(frames.dtype)  # without the blank
        mixed = weights @ rows + self.residual(frames)
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
        lengths: Tensor,
        keep: Tensor,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scatter audio embeddings (b, f, d) onto the placeholders of `input_ids` (b, s).

        Placeholders of dropped frames move to the left, into the padding. Columns that are padding
        in every row are cut, so the decoder never computes them.

        Returns:
            Embeddings (b, s', d) in the decoder's dtype, the attention mask (b, s') and the labels
            (b, s'), which are all -100 if none are given.

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
        index = (slots.cumsum(1) - 1).clamp(min=0)  # (b, s): the frame of each placeholder
        picked = audio.gather(1, index[..., None].expand(-1, -1, audio.shape[-1]))
        embeds = torch.where(slots[..., None], picked.to(embeds.dtype), embeds)
        mask = attention_mask * (~slots | keep.gather(1, index))
        width = int(mask.sum(1).max())
        order = mask.argsort(dim=1, stable=True)[:, -width:]  # (b, s'): masked ones go left
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
            character_loss_weight: weight of the character head's loss per label.
            encoded: see `encode`.

        Returns:
            `loss` (scalar) and `logits`: (label positions, vocab), or (b, s, vocab).
        """
        hidden, steps = self.encode(input_features, input_features_mask, encoded)
        if ctc_loss_weight or decoder_loss_weight or labels is None:
            frames, lengths = self.projector(hidden, steps)
        embedding = self.get_input_embeddings().weight
        losses: list[Tensor] = []
        logits: Any = None
        if labels is not None and ctc_loss_weight:
            if self.ctc is None:
                raise ValueError("ctc_loss_weight is set but the model has no CTC head")
            nll = self.ctc.loss(frames, lengths, labels, embedding, ctc_negatives)
            losses.append(ctc_loss_weight * nll)
        if labels is not None and character_loss_weight:
            if self.characters is None:
                raise ValueError("character_loss_weight is set but the model has no character head")
            if character_labels is None:
                raise ValueError("character_loss_weight is set but character_labels is missing")
            nll = self.characters.loss(hidden, steps, character_labels)
            losses.append(character_loss_weight * nll)
        if decoder_loss_weight or labels is None:
            audio, keep = self.bridge(frames, lengths)
            embeds, attention_mask, moved = self.embed(
                input_ids, attention_mask, audio, lengths, keep, labels
            )
            hidden = self.decoder.base_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state
            targets = moved[:, 1:]
            at = targets != IGNORE
            if labels is not None:
                hidden = hidden[:, :-1][at]  # (label positions, d)
            logits = self.decoder.get_output_embeddings()(hidden)
            if labels is not None:
                nll = F.cross_entropy(logits.float(), targets[at], reduction="sum")
                losses.append(decoder_loss_weight * nll)
        if labels is None:
            return CausalLMOutput(logits=logits)
        total: Any = num_items_in_batch
        if total is None:
            total = (labels != IGNORE).sum().clamp(min=1)
        loss: Any = sum(part / total for part in losses)
        return CausalLMOutput(loss=loss, logits=logits)

    # -- decoding ------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_features: Tensor,
        input_features_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        generation_config: GenerationConfig | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
        encoded: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Transcribe a left-padded batch with the decoder alone, token by token.

        Args:
            input_features, input_features_mask, input_ids, attention_mask: from `ASRProcessor`.
            generation_config: replaces the model's own.
            logits_processor: additional processors.
            encoded: see `encode`.
            kwargs: any argument of `GenerationMixin.generate` (num_beams, streamer, ...).

        Returns:
            Only the new token ids, (b, new tokens). Each row may have one token per projected
            frame plus `SPARE_TOKENS`.
        """
        hidden, steps = self.encode(input_features, input_features_mask, encoded)
        embeds, attention_mask, lengths = self.prompts(hidden, steps, input_ids, attention_mask)
        limits = self.token_limits(lengths)
        limit = LengthLimit(limits, self.config.end_token_id)
        processors = LogitsProcessorList([*(logits_processor or []), limit])
        config = copy.deepcopy(generation_config or self.generation_config)
        most = config.max_new_tokens or int(limits.max()) + 1
        kwargs = config.update(**{"max_new_tokens": most, **kwargs})
        return self.decoder.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=processors,
            **kwargs,
        )

    @staticmethod
    def token_limits(lengths: Tensor) -> Tensor:
        """Maximum number of new tokens for clips of `lengths` (b,) projected frames."""
        return lengths + SPARE_TOKENS

    def prompts(
        self, hidden: Tensor, steps: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Build the decoder's inputs from encoder frames and the prompts of `ASRProcessor`.

        Returns:
            Embeddings (b, s', d), attention mask (b, s') and numbers of projected frames (b,).
        """
        frames, lengths = self.projector(hidden, steps)
        audio, keep = self.bridge(frames, lengths)
        embeds, mask, _ = self.embed(input_ids, attention_mask, audio, lengths, keep)
        return embeds, mask, lengths

    def search(self, settings: dict[str, Any]) -> PrefixSearch:
        """Return the search over the character head's output, see `ASRConfig.decoding`."""
        if self.characters is None:
            raise ValueError("this model has no character head: use decode='generate'")
        own = SearchSettings(**{f.name: settings[f.name] for f in fields(SearchSettings)})
        ngram, words = self.ngram if settings["lexicon"] else None, tuple(settings["words"])
        # The many small steps suit a CPU, and CUDA queues them just as fast.
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        key = ngram, words, device
        if self.last_search is None or self.last_search[0] != key:
            if words and ngram is None:
                raise ValueError("words to prefer need a lexicon: use lexicon=True and an n-gram")
            ngram = ngram.preferring(words) if ngram and words else ngram
            search = PrefixSearch(self.config.ctc_alphabet, ngram, own, device)
            self.last_search = key, search  # cached, because the lexicon takes a moment to build
        search = copy.copy(self.last_search[1])
        search.settings = own
        return search

    @torch.no_grad()
    def ctc_greedy(self, hidden: Tensor, steps: Tensor) -> list[list[int]]:
        """Decode each clip to token ids by the best path of the CTC head over tokens."""
        if self.ctc is None:
            raise ValueError("this model has no CTC head: use decode='generate'")
        frames, lengths = self.projector(hidden, steps)
        return self.ctc.greedy(self.ctc(frames, self.get_input_embeddings().weight), lengths)

    @contextmanager
    def decoder_without_lora(self) -> Iterator[None]:
        """Disable the decoder's LoRA: this leaves a plain language model."""
        layers = [m for m in self.decoder.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    # -- modes, parts --------------------------------------------------------------------------

    @property
    def encoder_is_trained(self) -> bool:
        """True if LoRA weights of the encoder are trained, so it needs gradients."""
        return any(p.requires_grad for n, p in self.encoder.named_parameters() if ".lora_" in n)

    def train(self, mode: bool = True) -> "ASRModel":
        """Set the mode of all parts but a frozen encoder, which stays in evaluation mode.

        The encoder then uses no dropout, layer drop or time masking. The decoder follows `mode`,
        because gradients flow through it.
        """
        super().train(mode)
        # Batch norms stay in evaluation mode, because checkpoints do not save their statistics.
        # Feature extractors of waveform encoders do too: they have no LoRA, and in training mode
        # they request gradients of their input.
        frozen = ("feature_extractor",) if self.encoder_is_trained else ("",)
        for name, module in self.encoder.named_modules():
            if name.startswith(frozen) or isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's token embeddings."""
        return self.decoder.get_input_embeddings()

    # -- saving and loading --------------------------------------------------------------------

    def checkpoint_names(self, self_contained: bool) -> list[str]:
        """List the tensors that a checkpoint holds; of tied tensors, only the first."""
        names: dict[int, str] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if self_contained or is_trained(name):
                names.setdefault(id(tensor), name)
        return list(names.values())

    def checkpoint(self, self_contained: bool) -> dict[str, Tensor]:
        """Collect the tensors of a checkpoint by name.

        This gathers shards, so every process must call it.
        """
        state = self.state_dict()
        saved = {name: state[name] for name in self.checkpoint_names(self_contained)}
        full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in saved.items()}
        return {name: tensor.contiguous() for name, tensor in full.items()}

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, self_contained: bool | None = None,
        state_dict: dict[str, Tensor] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Write config, generation config, tensors and the code that loads them.

        Args:
            save_directory: folder, created if missing.
            state_dict: result of `checkpoint`; None calls it.
            self_contained: also write the weights of the base models, so the folder needs nothing
                else. None does so if the model was loaded from such a folder, or if a base model is
                a local folder.
        """
        unused = {"is_main_process", "safe_serialization", "max_shard_size"}  # ignored: one file
        check_keys(kwargs, unused, "save_pretrained")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        bases = (self.config.encoder_name, self.config.decoder_name)
        if self_contained is None:
            self_contained = self.config.self_contained or any(Path(b).is_dir() for b in bases)
        tensors = self.checkpoint(self_contained) if state_dict is None else state_dict
        save_file(tensors, folder / (WEIGHTS + ".tmp"), metadata={"format": "pt"})
        (folder / (WEIGHTS + ".tmp")).replace(folder / WEIGHTS)
        self.config.ngram_file = None
        if self.ngram:
            self.config.ngram_file = NGRAM
            save_arpa(self.ngram, folder / NGRAM)
        config = self.config.to_dict()
        config.update(AUTO_MAP, architectures=["ASRModel"], self_contained=self_contained)
        if self_contained:  # leave local paths out of the saved model
            config.update(encoder_name=Path(bases[0]).name, decoder_name=Path(bases[1]).name)
        for part in (config, config["audio_config"], config["text_config"]):
            for key in ("dtype", "_name_or_path", "_attn_implementation", "attn_implementation"):
                part.pop(key, None)  # settings of the run
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        self.generation_config.save_pretrained(folder)
        for name in CODE:
            source = Path(__file__).with_name(f"{name}.py")
            if not source.exists():  # code from a model folder: unimported files are elsewhere
                source = Path(str(cached_file(str(self.config.name_or_path), source.name)))
            if source.resolve() != (folder / source.name).resolve():
                shutil.copyfile(source, folder / source.name)

    @classmethod
    def from_base(
        cls, config: ASRConfig, *, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> "ASRModel":
        """Load the base models that `config` names and add the parts to train.

        The character head may start from the encoder's own CTC head.

        Args:
            config: this method sets its `audio_config`, `text_config`, commits of the base models,
                `projector_scale` and `ctc_direct`.
            dtype: dtype of the base weights; the trained parts stay in fp32.
            kwargs: `attn_implementation`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            OSError: if a base model is not found.
            ValueError: if a base model lacks weights.
        """
        encoder, own_head = load_base(config, "encoder", dtype, **kwargs)
        decoder, _ = load_base(config, "decoder", dtype, **kwargs)
        config.audio_config, config.text_config = encoder.config, decoder.config
        embeddings = decoder.get_input_embeddings().weight.detach()
        config.projector_scale = embeddings.float().pow(2).mean().sqrt().item()
        if config.ctc_direct is None:
            config.ctc_direct = own_head is not None
        model = cls(config, encoder, decoder)
        if own_head:
            model.characters.start_from(*own_head)
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name_or_path: str | Path, *, config: ASRConfig | None = None, **kwargs: Any
    ) -> "ASRModel":
        """Load a trained model from a folder or Hub id, and the base models that it names.

        Args:
            name_or_path: folder written by `save_pretrained`, or Hub id.
            config: replaces the saved config.
            kwargs: `dtype`, `attn_implementation`, `device_map` ("auto" or a device),
                and Hub arguments (`revision`, `token`, `cache_dir`, `local_files_only`, ...).

        Raises:
            OSError: if the folder or its weights are missing.
            ValueError: if tensors are missing, unexpected or of another shape.
        """
        hub = {k: kwargs.pop(k) for k in HUB_KEYS if k in kwargs}
        for key in AUTO_CLASS_KEYS:
            kwargs.pop(key, None)
        dtype, device = kwargs.pop("dtype", None), kwargs.pop("device_map", None)
        if isinstance(device, dict) and len({*device.values()}) == 1:  # one device for all
            device = next(iter(device.values()))
        attention = kwargs.pop("attn_implementation", None)
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        check_keys(kwargs, {"dtype", "device_map", "attn_implementation", *HUB_KEYS}, cls.__name__)
        if cached_file(str(name_or_path), "config.json", **hub) is None:
            raise OSError(f"{name_or_path} has no config.json")
        config = config or ASRConfig.from_pretrained(name_or_path, **hub)
        tensors = load_weights(str(cached_file(str(name_or_path), WEIGHTS, **hub)))
        local = {k: v for k, v in hub.items() if k not in ("revision", "subfolder")}
        if config.self_contained:
            model = cls(config)
            for part in (model.encoder, model.decoder):
                choose_attention(part, attention)
                cast_base(part, dtype)
        else:
            scale = config.projector_scale
            model = cls.from_base(config, dtype=dtype, attn_implementation=attention, **local)
            config.projector_scale = scale
        model.load_tensors(tensors, f"{name_or_path}/{WEIGHTS}")
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **hub)
        if config.ngram_file:
            model.ngram = load_arpa(Path(str(cached_file(name_or_path, config.ngram_file, **hub))))
        config.name_or_path = str(name_or_path)
        if device == "auto":
            device = torch.accelerator.current_accelerator(check_available=True)
        if device:
            model.to(device)  # type: ignore[arg-type]
        return model.eval()

    def load_tensors(
        self, tensors: dict[str, Tensor], source: str, fresh_lora: bool = False
    ) -> None:
        """Load the tensors of a checkpoint; none may be missing or unexpected.

        Args:
            tensors: by name, as `checkpoint_names` lists them.
            source: file that they come from, for error messages.
            fresh_lora: keep the initial values of LoRA weights that the file lacks (a new stage).

        Raises:
            ValueError: naming the tensors that are missing, unexpected or of another shape.
        """
        expected = self.state_dict()
        names = set(self.checkpoint_names(self.config.self_contained))
        if fresh_lora:
            tensors = {n: t for n, t in tensors.items() if is_trained(n)}
            names = {n for n in names if n in tensors or ".lora_" not in n}
        common = names & set(tensors)
        found = {
            "missing": names - common,
            "unexpected": set(tensors) - common,
            "mis-shaped": {n for n in common if tensors[n].shape != expected[n].shape},
        }
        for kind, bad in found.items():
            if bad:
                raise ValueError(f"{source}: {len(bad)} {kind} tensors, first {sorted(bad)[:3]}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                expected[name].copy_(shard_like(tensor, expected[name]))


CODE = "asr_bases asr_config asr_ctc asr_decoding asr_encoder asr_modeling asr_ngram".split()
CODE += ["asr_pipeline", "asr_processing", "asr_projector", "asr_search", "handler"]
HUB_KEYS = set("revision token cache_dir local_files_only force_download proxies subfolder".split())
# Arguments that transformers' Auto classes and pipelines add to those of the user.
AUTO_CLASS_KEYS = {"_from_pipeline", "_commit_hash", "_from_auto", "adapter_kwargs"}
AUTO_CLASS_KEYS |= {"trust_remote_code", "code_revision", "low_cpu_mem_usage", "use_safetensors"}
