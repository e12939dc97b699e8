"""ASRConfig: every choice that defines a trained model, and nothing about the run.

Device, dtype and attention implementation are choices of whoever loads the model; they are never
saved. Hugging Face's names for composite models are kept: `audio_config` describes the encoder,
`text_config` the decoder.
"""

import difflib
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

# Where a LoRA goes and how large it is; `r` = 0 leaves that part frozen.
LORA_DEFAULTS: dict[str, Any] = {
    "r": 0,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": [],
}
# How text is found: see `asr_decoding`. Weights are chosen on the evaluation clips after training.
DECODING_DEFAULTS: dict[str, Any] = {
    "beams": 48,  # hypotheses of the CTC search
    "candidates": 12,  # most likely characters that it tries in a frame
    "temperature": 1.5,  # flattens the posteriors: sharp ones hide the right word
    "lexicon": True,  # False: search characters alone, without words
    "ngram": 0.5,  # weight of the n-gram of the training transcripts
    "word": 0.5,  # bonus of each word
    "open_character": 4.0,  # price of each character of a word that the lexicon lacks
    "words": [],  # names and terms to prefer, whether the lexicon holds them or not
    "proposals": 8,  # texts that the decoder scores, at most
    "margin": 6.0,  # how far below the best of them a text may lie
    "prior": 0.4,  # weight of n-gram, word bonus and prices beside the decoder's scores
    "decoder": 0.5,  # weight of log p(text | audio), by the trained decoder
    "language_model": 0.0,  # weight of log p(text), by the decoder as it came
    "decoder_word": 0.0,  # bonus of each word beside those two, which prefer short texts
}
DECODE = ("rescore", "ctc", "generate")
WAVEFORM_ENCODERS = ("hubert", "wav2vec2", "wavlm")
IGNORE = -100  # label positions that carry no target
BRIDGES = ("frames", "posteriors")
# Keys that transformers itself writes into or passes to a config.
HF_KEYS = {
    *("auto_map", "custom_pipelines", "model_type", "name_or_path", "num_labels"),
    *("attn_implementation", "output_attentions", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}

# What the saved config says about the code beside it, for trust_remote_code.
PIPELINE = {"impl": "asr_pipeline.ASRPipeline", "pt": ["AutoModelForSpeechSeq2Seq"]}
AUTO_MAP: dict[str, Any] = {
    "auto_map": {
        "AutoConfig": "asr_config.ASRConfig",
        "AutoModelForSpeechSeq2Seq": "asr_modeling.ASRModel",
        "AutoProcessor": "asr_processing.ASRProcessor",
    },
    "custom_pipelines": {"automatic-speech-recognition": PIPELINE},
}


def check_keys(given: Any, known: Any, where: str) -> None:
    """Refuse unknown keys by name, with the nearest valid one.

    Raises:
        ValueError: naming each key of `given` that is not in `known`.
    """
    for key in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        raise ValueError(f"unknown key {key!r} in {where}; {hint}")


def lora_settings(settings: dict[str, Any] | None) -> dict[str, Any]:
    """Fill a LoRA setting with its defaults, refusing unknown keys.

    Args:
        settings: any of `r`, `lora_alpha`, `lora_dropout`, `target_modules`; None means no LoRA.

    Raises:
        ValueError: for an unknown key, or a rank without target modules.
    """
    check_keys(settings or {}, LORA_DEFAULTS, "LoRA settings")
    full = {**LORA_DEFAULTS, **(settings or {})}
    full["target_modules"] = list(full["target_modules"] or [])
    if full["r"] and not full["target_modules"]:
        raise ValueError(f"a LoRA of rank {full['r']} needs target_modules, e.g. [q_proj, v_proj]")
    return full


def decoding_settings(settings: dict[str, Any] | None) -> dict[str, Any]:
    """Fill decoding settings with `DECODING_DEFAULTS`, refusing unknown keys."""
    check_keys(settings or {}, DECODING_DEFAULTS, "decoding settings")
    return {**DECODING_DEFAULTS, **(settings or {})}


@strict
class ASRConfig(PreTrainedConfig):
    """Configuration of an encoder -> projector -> decoder speech recogniser.

    Args:
        encoder_name: Hub id or folder of the audio encoder.
        decoder_name: Hub id or folder of the causal language model.
        encoder_revision: commit of the encoder that was resolved when it was first loaded.
        decoder_revision: the same for the decoder.
        audio_config: the encoder's own config.
        text_config: the decoder's own config.
        stack: encoder frames that are concatenated into one projected frame.
        projector_hidden: width of the SwiGLU projector.
        projector_dropout: dropout after the gate, in training.
        projector_scale: RMS of the decoder's token embeddings, where the projector's output starts.
        bridge: what the decoder is fed: "frames", the projected frames themselves, or
            "posteriors", the CTC-weighted sum of its own token embeddings plus a learned residual.
        encoder_lora: LoRA on the encoder, see `lora_settings`.
        decoder_lora: LoRA on the decoder.
        ctc_token_ids: decoder token ids that the CTC head knows, in the order of its classes
            1, 2, ...; class 0 is the blank. Empty means that there is no CTC head.
        ctc_alphabet: byte values that the character head knows, in the order of its classes
            1, 2, ...; class 0 is the blank. Empty means that there is no such head.
        ctc_hidden: width of the character head.
        ctc_direct: the character head started from the encoder's own CTC head; None: not known yet.
        decoding: weights and sizes of the search for text, see `DECODING_DEFAULTS`.
        ngram_file: n-gram of the training transcripts, an ARPA file beside the weights.
        prompt_prefix: text before the audio tokens, special tokens of the chat format included.
        prompt_suffix: text after the audio tokens.
        audio_token_id: id of the token that stands for one projected frame.
        end_token_id: id of the token that ends a transcript.
        self_contained: the folder's weights file carries the base models too.

    Raises:
        ValueError: for an unknown key or a value out of range.
    """

    model_type = "tiny_audio"
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig}  # type: ignore  # noqa: RUF012

    encoder_name: str = ""
    decoder_name: str = ""
    encoder_revision: str | None = None
    decoder_revision: str | None = None
    audio_config: Any = None
    text_config: Any = None
    stack: int = 5
    projector_hidden: int = 8192
    projector_dropout: float = 0.0
    projector_scale: float = 1.0
    bridge: str = "frames"
    encoder_lora: Any = None
    decoder_lora: Any = None
    ctc_token_ids: Any = None
    ctc_alphabet: Any = None
    ctc_hidden: int = 768
    ctc_direct: bool | None = None
    decoding: Any = None
    ngram_file: str | None = None
    prompt_prefix: str = ""
    prompt_suffix: str = ""
    audio_token_id: int = -1
    end_token_id: int = -1
    self_contained: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "ctc_decode_weight" in kwargs:
            raise ValueError(
                "this model was saved by an older version, which decoded in another way: train it "
                "again with its own training_config.yaml, e.g. make quickstart"
            )
        if self.bridge not in BRIDGES:
            raise ValueError(f"bridge must be one of {BRIDGES}, not {self.bridge!r}")
        if self.stack < 1:
            raise ValueError(f"stack must be at least 1, not {self.stack}")
        known = {f.name for f in fields(type(self))} | HF_KEYS
        check_keys([key for key in kwargs if not key.startswith("_")], known, "ASRConfig")
        if isinstance(self.audio_config, dict):
            self.audio_config = AutoConfig.for_model(**self.audio_config)
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        self.encoder_lora = lora_settings(self.encoder_lora)
        self.decoder_lora = lora_settings(self.decoder_lora)
        self.decoding = decoding_settings(self.decoding)
        self.ctc_token_ids = list(self.ctc_token_ids or [])
        self.ctc_alphabet = list(self.ctc_alphabet or [])
        super().__post_init__(**kwargs)


def encoder_frames(audio_config: Any, n: Any) -> Any:
    """Encoder frames that `n` input steps give, from the encoder's own convolution geometry.

    Args:
        audio_config: config of the encoder.
        n: int or integer tensor; mel frames for a mel encoder, samples for a waveform encoder.

    Raises:
        ValueError: for an encoder family that is not supported.
    """
    if audio_config.model_type == "whisper":
        return (n + 1) // 2  # the second convolution has stride 2, kernel 3, padding 1
    if audio_config.model_type == "parakeet_encoder":  # convolutions of stride 2, "same" padding
        for _ in range(int(audio_config.subsampling_factor).bit_length() - 1):
            n = (n + 1) // 2
        return n
    if audio_config.model_type in WAVEFORM_ENCODERS:
        for kernel, stride in zip(audio_config.conv_kernel, audio_config.conv_stride, strict=True):
            n = (n - kernel) // stride + 1
        return n
    raise ValueError(
        f"encoder type {audio_config.model_type!r} is not supported; "
        f"use whisper, parakeet or one of {', '.join(WAVEFORM_ENCODERS)}"
    )
