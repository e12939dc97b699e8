"""Build the model that a stage starts with, and its processor."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer

from ..asr.asr_bases import load_weights
from ..asr.asr_config import ASRConfig
from ..asr.asr_encoder import encoder_config, family_of
from ..asr.asr_modeling import ASRModel
from ..asr.asr_processing import ASRProcessor
from ..asr.asr_saving import NGRAM, WEIGHTS
from ..asr.asr_writing import Writing
from ..errors import one_line
from .parts import keep_new_letters
from .stream import SpeechStream
from .vocabulary import blend, ctc_vocabulary, extend_vocabulary, transcript_ngram


def build_processor(cfg: DictConfig) -> ASRProcessor:
    """Build the processor from the encoder's feature extractor and the decoder's tokenizer.

    Raises:
        ValueError: if a base model cannot be loaded; names its key.
    """
    choices = cfg.model
    key = "encoder_model_name"
    try:
        encoder = {"revision": choices.encoder_revision}
        audio_config = AutoConfig.from_pretrained(choices[key], **encoder)
        extractor = AutoFeatureExtractor.from_pretrained(choices[key], **encoder)
        key = "decoder_model_name"
        tokenizer = AutoTokenizer.from_pretrained(choices[key], revision=choices.decoder_revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.{key}={choices[key]}: {one_line(error)}") from error
    geometry = ("model_type", *family_of(audio_config).geometry)
    own = ("stack", "prompt_prefix", "prompt_suffix", "end_token", "tail_seconds", "max_seconds")
    return ASRProcessor(
        extractor,
        tokenizer,
        encoder={key: getattr(encoder_config(audio_config), key) for key in geometry},
        **{key: cfg.model[key] for key in own},
    )


def model_config(cfg: DictConfig, tokens: list[int], alphabet: list[int], **more: Any) -> ASRConfig:
    """The ASRConfig of a stage; `tokens` and `alphabet` are the classes of its CTC heads."""
    known = {field.name for field in fields(ASRConfig)}
    return ASRConfig(
        encoder_name=cfg.model.encoder_model_name,
        decoder_name=cfg.model.decoder_model_name,
        encoder_lora=OmegaConf.to_container(cfg.encoder_lora),
        decoder_lora=OmegaConf.to_container(cfg.peft),
        ctc_token_ids=tokens,
        ctc_alphabet=alphabet,
        **{key: value for key, value in cfg.model.items() if key in known},
        **more,
    )


def is_tuned(cfg: DictConfig) -> bool:
    """Whether the weights of decoding are chosen at the end of the run."""
    return bool(cfg.model.tune and cfg.data.eval and cfg.training.eval_strategy != "no")


def build_model(
    cfg: DictConfig,
    processor: ASRProcessor,
    ctc: tuple[list[int], list[int]] = ([], []),
    start: str | None = None,
) -> ASRModel:
    """Build a model from its base models; trained parts are new or come from the folder `start`.

    Args:
        cfg: the config of a stage.
        processor: the model's processor.
        ctc: the token ids and bytes of the CTC heads, see `ctc_vocabulary`; an empty list omits
            that head.
        start: folder of a trained model; its n-gram, capitals and punctuation are taken over too,
            and its decoding weights if the run chooses none.

    Raises:
        ValueError: if `start` holds tensors that do not fit this config.
    """
    ids = {"audio_token_id": processor.audio_token_id, "end_token_id": processor.end_token_id}
    config = model_config(cfg, *ctc, **ids)
    if start and cfg.model.decoding is None and not is_tuned(cfg):
        config.decoding = ASRConfig.from_pretrained(start).decoding
    dtype = cfg.training.dtype and getattr(torch, cfg.training.dtype)
    attention = cfg.training.attn_implementation
    model = ASRModel.from_base(config, dtype=dtype, attn_implementation=attention)
    processor.alphabet = list(ctc[1])
    if start:
        model.load_words(Path(start))
        tensors = load_weights(str(Path(start) / WEIGHTS))
        keep_new_letters(tensors, model)
        model.load_tensors(tensors, str(start), fresh_lora=True)
    return model


def stage_model(
    cfg: DictConfig, processor: ASRProcessor, data: Any, start: str | None, resume: str | None
) -> ASRModel:
    """Build the model that a stage starts with.

    The transcripts determine the classes of its heads and the words of its n-gram. A model to start
    from keeps its own and gains the new ones. A resumed run takes them from its checkpoint.
    """
    streamed = isinstance(data, SpeechStream)
    texts = list(data.texts(cfg.data.vocabulary_rows) if streamed else data.examples)
    if before := resume or start:
        tokens, alphabet = extend_vocabulary(ASRConfig.from_pretrained(before), texts, resume)
    else:
        tokens, alphabet = ctc_vocabulary(texts)
    heads = (tokens if cfg.model.ctc else [], alphabet if cfg.model.ctc_characters else [])
    model = build_model(cfg, processor, heads, start)
    if resume and (Path(resume) / NGRAM).exists():
        model.load_words(Path(resume))
    elif model.characters is not None and (
        model.ngram is None or start == cfg.model.pretrained_model_path  # later stages have it
    ):
        words = cfg.data.words and Path(cfg.data.words).expanduser()
        own = transcript_ngram(processor, texts, words)
        if own and model.ngram:
            new = len({*own.words} - {*model.ngram.words})
            print(f"the model's n-gram is mixed with that of the transcripts: {new} new words")
            own = blend(model.ngram, own)
        model.ngram = own or model.ngram
        if own:
            model.writing = Writing.learn((e.text for e in texts), processor.spoken, model.writing)
    return model
