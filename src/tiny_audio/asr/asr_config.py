"""ASRConfig: every setting that defines a trained model, and nothing about the run.

Device, dtype and attention implementation are chosen when the model is loaded and never saved. The
names follow Hugging Face's composite models: `audio_config` describes the encoder, `text_config`
the decoder.
"""

import difflib
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

# Size and place of a LoRA; `r` = 0 leaves that part frozen.
LORA_DEFAULTS = {"r": 0, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": []}
# Decoding settings, see `asr_decoding`. After training, weights are tuned on evaluation clips.
DECODING_DEFAULTS: dict[str, Any] = {
    "beams": 48,  # hypotheses that the CTC search keeps
    "candidates": 12,  # most likely characters that it tries in each frame
    "temperature": 3.0,  # flattens the posteriors: sharp ones hide the correct word
    "lexicon": True,  # False: search characters, without words
    "ngram": 0.6,  # weight of the n-gram of the training transcripts
    "word": 0.0,  # bonus for each word
    "open_character": 4.0,  # cost of each character of a word that the lexicon lacks
    "words": [],  # names and terms to prefer; the lexicon may lack them
    "proposals": 12,  # maximum number of texts that the decoder scores
    "margin": 6.0,  # maximum distance of a text's score from the best one
    "prior": 0.4,  # weight of n-gram, word bonus and character costs when the decoder scores
    "decoder": 0.5,  # weight of log p(text | audio) from the trained decoder
    "language_model": 0.0,  # weight of log p(text) from the decoder without LoRA
    "decoder_word": 0.0,  # bonus for each word: the two scores above prefer short texts
}
DECODE = ("rescore", "ctc", "generate")
IGNORE = -100  # label of positions without a target
SPARE_TOKENS = 8  # tokens that a clip's text may have beyond one per projected frame
BRIDGES = ("frames", "posteriors")
# Keys that transformers itself writes into a config or passes to it.
HF_KEYS = {
    *("auto_map", "custom_pipelines", "model_type", "name_or_path", "num_labels"),
    *("attn_implementation", "output_attentions", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}

# Entries of a saved config that tell trust_remote_code which classes to load.
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
    """Refuse unknown keys and suggest the nearest valid one.

    Raises:
        ValueError: naming the first key of `given` that is not in `known`.
    """
    for key in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        raise ValueError(f"unknown key {key!r} in {where}; {hint}")


def lora_settings(settings: dict[str, Any] | None) -> dict[str, Any]:
    """Fill in the defaults of LoRA settings and refuse unknown keys.

    Args:
        settings: any of `r`, `lora_alpha`, `lora_dropout`, `target_modules`; None means no LoRA.

    Raises:
        ValueError: if a key is unknown, or a rank is set without target modules.
    """
    check_keys(settings or {}, LORA_DEFAULTS, "LoRA settings")
    full = {**LORA_DEFAULTS, **(settings or {})}
    full["target_modules"] = list(full["target_modules"] or [])
    if full["r"] and not full["target_modules"]:
        raise ValueError(f"a LoRA of rank {full['r']} needs target_modules, e.g. [q_proj, v_proj]")
    return full


def decoding_settings(settings: dict[str, Any] | None) -> dict[str, Any]:
    """Fill in `DECODING_DEFAULTS`; refuse unknown keys, and a search that keeps no text."""
    check_keys(settings or {}, DECODING_DEFAULTS, "decoding settings")
    full = {**DECODING_DEFAULTS, **(settings or {})}
    if min(full["beams"], full["candidates"], full["proposals"]) < 1:
        raise ValueError("decoding: beams, candidates and proposals must be at least 1")
    return full


@strict
class ASRConfig(PreTrainedConfig):
    """Configuration of an encoder -> projector -> decoder speech recogniser.

    Args:
        encoder_name: Hub id or folder of the audio encoder.
        decoder_name: Hub id or folder of the causal language model.
        encoder_revision: commit of the encoder, resolved when it is first loaded.
        decoder_revision: commit of the decoder.
        audio_config: the encoder's own config.
        text_config: the decoder's own config.
        stack: number of encoder frames concatenated into one projected frame.
        projector_hidden: width of the projector.
        projector_scale: initial RMS of the projector's output; set to that of the token embeddings.
        bridge: input of the decoder: "frames" (the projected frames) or "posteriors" (the
            CTC-weighted sum of the decoder's token embeddings plus a learned residual).
        encoder_lora: LoRA on the encoder, see `lora_settings`.
        decoder_lora: LoRA on the decoder.
        ctc_token_ids: decoder token ids of the CTC head's classes 1, 2, ...; class 0 is the
            blank. Empty: no CTC head.
        ctc_alphabet: byte values of the character head's classes 1, 2, ...; class 0 is the
            blank. Empty: no character head.
        ctc_hidden: width of the character head.
        ctc_direct: whether the character head starts from the encoder's own CTC head; None until
            the encoder is first loaded.
        decoding: settings of the search for text, see `DECODING_DEFAULTS`.
        ngram_file: `ngram.arpa.gz` if the model has an n-gram of the training transcripts.
        writing_file: `writing.json` if it knows the transcripts' capitals and punctuation.
        prompt_prefix, prompt_suffix: the processor's text around the audio tokens, for reference.
        audio_token_id: id of the placeholder token of one projected frame.
        end_token_id: id of the token that ends a transcript.
        self_contained: whether the weights file also holds the base models.

    Raises:
        ValueError: if a key is unknown or a value is out of range.
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
    writing_file: str | None = None
    prompt_prefix: str = ""
    prompt_suffix: str = ""
    audio_token_id: int = -1
    end_token_id: int = -1
    self_contained: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "ctc_decode_weight" in kwargs:
            raise ValueError(
                "this model was saved by an older version that decodes differently: train it again "
                "from its training_config.yaml, or with `make quickstart`"
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
