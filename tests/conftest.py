"""Shared parts of the tests: tiny base models with random weights, clips, and the real small ones.

The tiny models are real transformers classes with a few thousand weights, saved by their own
`save_pretrained`, so everything but their size is what a user runs.
"""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: more threads only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import hydra
import numpy as np
import pytest
import soundfile
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoTokenizer,
    HubertConfig,
    HubertModel,
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    PreTrainedTokenizerFast,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from tiny_audio.asr.asr_audio import SAMPLE_RATE, load_audio, split_blocks
from tiny_audio.asr.asr_config import ASRConfig
from tiny_audio.asr.asr_encoder import WAVEFORM_ENCODERS
from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_processing import ASRProcessor
from tiny_audio.commands import assets
from tiny_audio.commands.speech import read_manifest
from tiny_audio.loading import load_pipeline
from tiny_audio.training.manifests import Example
from tiny_audio.training.recipe import CONFIGS
from tiny_audio.training.vocabulary import transcript_ngram

TEXTS = (
    "the cat sat",
    "on a red mat",
    "she sells sea shells",
    "by the shore",
    "a dog ran far",
    "seven blue birds",
    "no no no",
    "call waiting",
    "press one",
    "press two to go back",
    "the red dog",
    "birds by the sea",
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Which of the two base models have a LoRA: the same names in every test.
LORAS = {"both": (4, 4), "encoder": (4, 0), "decoder": (0, 4), "neither": (0, 0)}


@pytest.fixture(autouse=True)
def same_threads():
    """Leave the number of threads as it was: the last bits of a result depend on it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tone(seconds: float, hz: float = 440.0, rate: int = SAMPLE_RATE, level: float = 0.3) -> Any:
    """A sine wave: float32 samples (n,)."""
    time = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * hz * time)).astype(np.float32)


def babble(seconds: float, seed: int) -> np.ndarray:
    """Something that changes as speech does: tones and noise in random syllables."""
    rng = np.random.default_rng(seed)
    n = round(seconds * SAMPLE_RATE)
    parts = []
    while sum(map(len, parts)) < n:
        part = tone(rng.uniform(0.05, 0.2), rng.uniform(120, 2500), level=rng.uniform(0.05, 0.5))
        parts.append(part + 0.02 * rng.standard_normal(len(part)).astype(np.float32))
    return np.concatenate(parts)[:n].astype(np.float32)


def split_at_pauses(samples: np.ndarray, max_seconds: float) -> list[tuple[int, int]]:
    """(start, end) in samples of the pieces that the pipeline cuts a recording into."""
    return [(at, at + len(part)) for at, part in split_blocks([samples], max_seconds)]


def write_audio(path: Path, samples: np.ndarray, rate: int, codec: str) -> Path:
    """Encode samples (n,) or (channels, n) with FFmpeg; the container follows the suffix."""
    samples = np.atleast_2d(samples)
    if codec == "vorbis":  # FFmpeg's own encoder of it is experimental
        soundfile.write(path, samples.T, rate, format="OGG", subtype="VORBIS")
        return path
    layout = {1: "mono", 2: "stereo"}[len(samples)]
    pcm = np.ascontiguousarray((samples.T * 32767).round().astype(np.int16).reshape(1, -1))
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for packet in (*stream.encode(frame), *stream.encode(None)):
            out.mux(packet)
    return path


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A JSONL manifest."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# A tiny HuBERT, wav2vec2 or WavLM.
WAVEFORM_SHAPE: dict[str, Any] = dict(  # noqa: C408
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    conv_dim=(16, 16, 16),
    conv_kernel=(10, 8, 8),
    conv_stride=(5, 8, 8),  # 320 samples a frame: 50 Hz, as the real one
    conv_bias=True,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
    initializer_range=0.1,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the chat tokens, in which every word of TEXTS is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + text for text in TEXTS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `whisper`, `hubert` and `decoder`, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    hubert = HubertConfig(**WAVEFORM_SHAPE)
    group = HubertConfig(  # HuBERT base and large-ls960 differ in the norm of their extractor
        **{**hubert.to_diff_dict(), "feat_extract_norm": "group", "conv_bias": False}
    )
    group.do_stable_layer_norm = False
    parakeet = ParakeetEncoderConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        subsampling_conv_channels=8,
        initializer_range=0.1,
    )
    whisper = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=80,
        max_source_positions=1500,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.1,
        init_std=0.1,
    )
    smollm3 = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    for name in WAVEFORM_ENCODERS:
        config = AutoConfig.for_model(name, **WAVEFORM_SHAPE)
        AutoModel.from_config(config).save_pretrained(folder / name)
    HubertModel(group).save_pretrained(folder / "hubert-group")
    for name in (*WAVEFORM_ENCODERS, "hubert-group"):
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(
            folder / name
        )
    ParakeetForCTC(
        ParakeetCTCConfig(encoder_config=parakeet.to_dict(), vocab_size=64, pad_token_id=0)
    ).save_pretrained(folder / "parakeet")
    ParakeetFeatureExtractor(feature_size=80).save_pretrained(folder / "parakeet")
    WhisperModel(whisper).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder / "whisper")
    SmolLM3ForCausalLM(smollm3).save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    return folder


def build_asr(
    encoder: Path,
    decoder: Path,
    texts: Sequence[str] = TEXTS,
    lora: str = "neither",
    bridge: str = "frames",
    ctc: bool = True,
    stack: int = 4,
    hidden: int = 32,
    seed: int = 0,
    fresh: bool = False,
    **settings: Any,
) -> tuple[ASRProcessor, ASRModel]:
    """Processor and model on two base folders.

    The parts that start at zero (LoRA, residual, blank) are given random values, as training would,
    so that they matter; `fresh` leaves them as they start.
    """
    audio_config = json.loads((encoder / "config.json").read_text())
    audio_config = audio_config.get("encoder_config", audio_config)
    geometry = {
        k: audio_config[k]
        for k in ("model_type", "conv_kernel", "conv_stride", "subsampling_factor")
        if k in audio_config
    }
    assert encoder.name.startswith(geometry["model_type"].split("_")[0])
    processor = ASRProcessor(
        AutoFeatureExtractor.from_pretrained(encoder),
        AutoTokenizer.from_pretrained(decoder),
        encoder=geometry,
        stack=stack,
    )
    ranks = LORAS[lora]
    classes = sorted({t for text in texts for t in processor.tokenize(text)}) if ctc else []
    config = ASRConfig(
        encoder_name=str(encoder),
        decoder_name=str(decoder),
        stack=stack,
        projector_hidden=hidden,
        bridge=bridge,
        encoder_lora={"r": ranks[0], "target_modules": ["q_proj", "k_proj"]},
        decoder_lora={"r": ranks[1], "target_modules": ["q_proj", "v_proj"]},
        ctc_token_ids=classes,
        ctc_alphabet=sorted(set(b"abcdefghijklmnopqrstuvwxyz '")) if ctc else [],
        ctc_hidden=32,
        prompt_prefix=processor.prompt_prefix,
        prompt_suffix=processor.prompt_suffix,
        audio_token_id=processor.audio_token_id,
        end_token_id=processor.end_token_id,
        **settings,
    )
    torch.manual_seed(seed)
    model = ASRModel.from_base(config).eval()
    processor.alphabet = config.ctc_alphabet
    if model.characters is not None:
        examples = [Example(text, None, text, 1.0) for text in texts]
        model.ngram = transcript_ngram(processor, examples)
    if not fresh:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".lora_B" in key or key.startswith("residual"):
                    parameter.normal_(std=0.1, generator=generator)
            if model.characters is not None:  # as sure of its letters as a trained one
                model.characters.output.weight.mul_(100)
            if model.ctc is not None:  # about as loud as the best class: some frames are blank
                frames = torch.randn(200, parameter_width(model), generator=generator)
                rows = model.decoder.get_input_embeddings().weight
                log_probs = model.ctc(frames[None] * config.projector_scale, rows)[0]
                best = log_probs[:, 1:].max(1).values - log_probs[:, 0]
                model.ctc.blank.bias.fill_(best.median())
    return processor, model


def parameter_width(model: ASRModel) -> int:
    """The decoder's hidden size."""
    return model.config.text_config.hidden_size


@pytest.fixture(scope="session")
def build(tiny_bases: Path) -> Callable[..., tuple[ASRProcessor, ASRModel]]:
    """`build("whisper", lora="both", bridge="posteriors", ...)`: see `build_asr`."""

    def make(encoder: str = "whisper", **options: Any) -> tuple[ASRProcessor, ASRModel]:
        return build_asr(tiny_bases / encoder, tiny_bases / "decoder", **options)

    return make


@pytest.fixture(scope="session")
def model_folder(build: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with both heads; its weights are random, so it talks to its limit."""
    processor, model = build("whisper", bridge="posteriors", lora="decoder")
    processor.max_seconds = 4.0
    folder = tmp_path_factory.mktemp("use") / "tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipe(model_folder: Path) -> Any:
    return load_pipeline(str(model_folder), "cpu")


@pytest.fixture(scope="session")
def clips() -> list[np.ndarray]:
    """Four clips of unequal lengths, the longest not first."""
    return [babble(s, seed) for seed, s in enumerate((1.01, 2.4, 0.55, 1.73))]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL manifest of 12 clips, 0.9 to 1.9 s, with relative paths; a clip for each of TEXTS."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "wav").mkdir()
    rows = []
    for i, text in enumerate(TEXTS):
        seconds = 0.9 + 0.09 * i
        write_audio(folder / f"wav/{i}.wav", babble(seconds, 100 + i), 16_000, "pcm_s16le")
        row = {"id": f"clip{i}", "audio": f"wav/{i}.wav", "text": text, "duration": seconds}
        rows.append(row)
    return write_manifest(folder / "train.jsonl", rows)


@pytest.fixture(scope="session")
def compose_in(tiny_bases, corpus):
    """`compose_in(folder, "training.lr=1", steps=(6, 4), ...)`: the quickstart, on tiny parts."""

    def make(
        folder,
        *overrides,
        steps=(6, 4),
        output="run",
        encoder="whisper",
        manifest=corpus,
        **training,
    ):
        with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
            cfg = hydra.compose(
                "config",
                [
                    "+experiments=quickstart",
                    f"model.encoder_model_name={tiny_bases / encoder}",
                    f"model.decoder_model_name={tiny_bases / 'decoder'}",
                    "model.projector_hidden=32",
                    f"run.output_dir={folder / output}",
                    "training.dataloader_num_workers=0",
                    "data.disturb=0",  # lengths stay what they are
                    "data.words=null",
                    "training.logging_steps=1",
                    "training.save_steps=1000",
                    "training.eval_strategy=no",
                    "training.bf16=false",  # not every CPU has it
                    "++training.use_cpu=true",
                    *overrides,
                ],
            )
        if len(cfg.stages) == 3:  # both heads in one stage: two stages are enough here
            cfg.stages = cfg.stages[1:]
            cfg.stages[0].training.character_loss_weight = 1.0
            del cfg.stages[0].training.eval_strategy
        cfg.data.train = [{"path": str(manifest)}]
        cfg.data.eval = [{"path": str(manifest), "sample": 3}]
        for stage, count in zip(cfg.stages, steps, strict=True):
            settings = {"max_steps": count, "warmup_steps": 1, "batch_seconds": 6, **training}
            for key, value in settings.items():
                OmegaConf.update(stage.training, key, value, force_add=True)
        return cfg

    return make


@pytest.fixture
def compose(compose_in, tmp_path):
    """`compose_in` in this test's own folder."""
    return partial(compose_in, tmp_path)


@pytest.fixture(scope="session")
def real_bases() -> assets.Assets:
    """Whisper tiny.en, SmolLM2-135M and recorded speech in the cache, fetched where missing."""
    return assets.prepare(synthetic=False)


@pytest.fixture(scope="session")
def real_rows(real_bases: assets.Assets) -> list[dict[str, Any]]:
    """Four recorded clips of unequal lengths with their texts; `audio` is an absolute path."""
    rows = read_manifest(real_bases.dev)
    rows = sorted(rows, key=lambda row: row["duration"])
    rows = [row for row in rows if 0.8 < row["duration"] < 5]
    chosen = [rows[i] for i in (len(rows) // 2, -1, 0, len(rows) // 4)]
    return [{**row, "audio": str(real_bases.dev.parent / row["audio"])} for row in chosen]


@pytest.fixture(scope="session")
def real_clips(real_rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """Samples of `real_rows`."""
    return [load_audio(row["audio"]) for row in real_rows]
