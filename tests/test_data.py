"""From manifests to batches: nothing is lost, everything dropped is named, order repeats."""

import copy
import json
import os
import shutil
import time
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TEXTS, babble, write_audio, write_manifest
from datasets import Audio, Dataset
from torch.utils.data import DataLoader

from tiny_audio.asr.asr_processing import ASRProcessor
from tiny_audio.training import data as data_module
from tiny_audio.training import frames
from tiny_audio.training.batches import LengthBatchSampler
from tiny_audio.training.checks import Dropped, prepare_text, read_log, spelled, why_refused
from tiny_audio.training.data import SpeechDataset
from tiny_audio.training.frames import Frames, cache_frames
from tiny_audio.training.manifests import DataError, Example, Reader, header_seconds, read_source
from tiny_audio.training.stream import SpeechStream
from tiny_audio.training.vocabulary import ctc_vocabulary, read_counts, transcript_ngram


@pytest.fixture(scope="module")
def processor(build):
    return build("whisper", ctc=False)[0]


# -- sources -------------------------------------------------------------------------------------


def rows_of(source):
    return list(read_source(source))


def test_manifest_paths_are_relative_to_the_manifest(corpus, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = rows_of({"path": str(corpus)})
    assert len(rows) == 12
    assert rows[3].id == "clip3"
    assert rows[3].audio == str(corpus.parent / "wav/3.wav")
    absolute = write_manifest(tmp_path / "abs.jsonl", [{"audio": rows[3].audio, "text": "x"}])
    assert rows_of({"path": str(absolute)})[0].audio == rows[3].audio
    # A name relative to the working folder works as well.
    shutil.copytree(corpus.parent, tmp_path / "moved")
    assert rows_of({"path": "moved/train.jsonl"})[3].audio == "moved/wav/3.wav"


def test_columns_can_have_other_names_and_csv_is_read(corpus, tmp_path):
    name = corpus.parent / "wav/3.wav"
    (tmp_path / "m.csv").write_text(f'ID,wav,words\nq7,{name},"one, two"\nq8,{name},three\n')
    source = {"path": str(tmp_path / "m.csv"), "id_column": "ID", "audio_column": "wav",
              "text_column": "words"}  # fmt: skip
    rows = rows_of(source)
    assert [(r.id, r.text) for r in rows] == [("q7", "one, two"), ("q8", "three")]
    assert rows[0].duration == pytest.approx(0.9 + 0.27, abs=0.01)  # out of the file's header


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_is_read_as_it_is_written(corpus, tmp_path, streaming):
    """No id becomes a number, no word a missing value or a truth; an empty duration is none."""
    name = corpus.parent / "wav/3.wav"
    rows = [("007", "None", ""), ("NA", "42", "1.17"), ("1e3", "true", ""), ("nan", "null", "")]
    lines = [f"{i},{name},{text},{seconds}" for i, text, seconds in rows]
    path = tmp_path / "m.csv"
    path.write_text("\n".join(["id,audio,text,duration", *lines]) + "\n")
    found = list(iter(Reader({"path": str(path)}, streaming).read, None))
    assert [(e.id, e.text) for e in found] == [row[:2] for row in rows]
    assert all(e.duration == pytest.approx(1.17, abs=0.01) for e in found)


def test_numbers_are_texts_too(corpus, tmp_path):
    audio = str(corpus.parent / "wav/3.wav")
    path = write_manifest(tmp_path / "m.jsonl", [{"id": 7, "audio": audio, "text": 5}])
    assert [(e.id, e.text) for e in rows_of({"path": str(path)})] == [("7", "5")]


def test_a_manifest_that_is_cut_short_is_named(corpus, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(corpus.read_text()[:-20])
    with pytest.raises(DataError, match=r"m\.jsonl, row 12 .* is not a JSON"):
        rows_of({"path": str(path)})


def test_ids_are_made_up_where_there_are_none(corpus, tmp_path):
    audio = str(corpus.parent / "wav/3.wav")
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": audio, "text": t} for t in "abc"])
    assert len({row.id for row in rows_of({"path": str(path)})}) == 3


def test_header_seconds(corpus):
    audio = corpus.parent / "wav/3.wav"
    assert header_seconds(str(audio)) == pytest.approx(1.17, abs=0.01)
    assert header_seconds({"bytes": audio.read_bytes()}) == pytest.approx(1.17, abs=0.01)
    assert header_seconds("gone.wav") == -1


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({"path": "gone.jsonl"}, DataError, "gone.jsonl: no such file"),
        ({"text_column": "txt"}, DataError, "no column 'txt'; has .*text"),
        ({"audio_column": "wav"}, DataError, "no column 'wav'"),
        (
            {"text_colum": "text"},
            ValueError,
            "unknown key 'text_colum'.*did you mean 'text_column'",
        ),
        ({"repeats": 2}, ValueError, "did you mean 'repeat'"),
        ({"path": None}, DataError, "a data source needs a path"),
    ],
)
def test_source_errors_name_the_cause(corpus, source, error, message):
    with pytest.raises(error, match=message):
        rows_of({"path": str(corpus), **source})


def test_a_path_alone_is_a_source(corpus):
    assert rows_of(str(corpus)) == rows_of({"path": str(corpus)})


# -- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain", "lowered"),
    [
        ("Hello,  world!\n", "Hello, world!", "hello world"),
        ("It cost 1,250 dollars.", "It cost 1,250 dollars.", "it cost 1 250 dollars"),
        ("don't <laugh> stop [noise] now (sic)", "don't stop now", "don't stop now"),
        ("HE SAID SO", "he said so", "he said so"),
        ("NASA", "nasa", "nasa"),
        ("TV", "TV", "tv"),
        ("ok", "ok", "ok"),
        ("Straße, Café — naïve", "Straße, Café — naïve", "straße café naïve"),
        ("don’t", "don't", "don't"),
        ("‘no’, she said", "‘no’, she said", "no' she said"),
        ("cafe\u0301", "café", "café"),  # two characters become the one
        ("नमस्ते, दुनिया", "नमस्ते, दुनिया", "नमस्ते दुनिया"),
        ("<noise>", "", ""),
        (" \t ", "", ""),
        ("...", "...", ""),
        ("a < b", "a < b", "a b"),
        ("AS THEY LEFT <COMMA> HE SAID <PERIOD>", "as they left, he said.", "as they left he said"),
        ("REALLY <QUESTIONMARK>", "really?", "really"),
        ("no <exclamationpoint> <noise> so", "no! so", "no so"),
        ("ignore_time_segment_in_scoring", "", ""),
        ("and <unk> then", "and then", "and then"),
    ],
)
def test_training_text(text, plain, lowered):
    assert prepare_text(text) == plain
    assert prepare_text(text, lowercase=True) == lowered
    assert prepare_text(plain) == plain  # doing it twice changes nothing


# -- examples ------------------------------------------------------------------------------------


@pytest.fixture
def mixed(corpus, tmp_path):
    """Manifest with good clips and one of every kind that cannot be used."""
    good = [json.loads(line) for line in corpus.read_text().splitlines()]
    for row in good:
        row["audio"] = str(corpus.parent / row["audio"])
    (tmp_path / "broken.wav").write_text("no audio in here " * 50)
    write_audio(tmp_path / "hush.wav", np.zeros(16_000), 16_000, "pcm_s16le")
    nan = np.full(16_000, np.nan, np.float32)
    import soundfile

    soundfile.write(tmp_path / "nan.wav", nan, 16_000, subtype="FLOAT")
    bad = [
        {"id": "broken", "audio": "broken.wav", "text": "the cat", "duration": 1.0},
        {"id": "gone", "audio": "gone.wav", "text": "the cat", "duration": 1.0},
        {"id": "nan", "audio": "nan.wav", "text": "the cat", "duration": 1.0},
        {"id": "hush", "audio": "hush.wav", "text": "the cat", "duration": 1.0},
        {"id": "mute", "audio": good[0]["audio"], "text": " <noise> ", "duration": 0.9},
        {"id": "null", "audio": good[0]["audio"], "text": None, "duration": 0.9},
        {"id": "long", "audio": good[0]["audio"], "text": "the cat", "duration": 31.0},
        {"id": "longer", "audio": good[-1]["audio"], "text": "the cat", "duration": 0.4},
        {"id": "short", "audio": good[0]["audio"], "text": "the cat", "duration": 0.05},
        {"id": "wordy", "audio": good[0]["audio"], "text": "the cat sat " * 40, "duration": 0.9},
    ]
    return write_manifest(tmp_path / "mixed.jsonl", [*good, *bad])


EXPECTED = {
    "broken": "unreadable audio",
    "gone": "unreadable audio",
    "nan": "unreadable audio",
    "hush": "silent",
    "mute": "empty text",
    "null": "empty text",
    "long": "over max_seconds",
    "longer": "not as long as stated",
    "short": "shorter than min_seconds",
    "wordy": "more tokens than frames",
}


def test_every_drop_has_a_reason_and_a_name(mixed, tmp_path, processor):
    dropped = Dropped(tmp_path / "dropped.jsonl")
    data = SpeechDataset([{"path": str(mixed)}], processor, dropped, max_seconds=30.0)
    seen = []
    for _ in range(2):  # a second epoch counts nothing twice
        batch = data.collate([data[i] for i in range(len(data))])
        for item in batch["dropped"]:
            dropped.add(item["id"], item["reason"], item["detail"])
        seen = batch["ids"]
    assert sorted(seen) == sorted(f"clip{i}" for i in range(12))
    assert len(batch["input_features"]) == 12
    assert dropped.counts == Counter(EXPECTED.values())
    rows = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert {row["id"]: row["reason"] for row in rows} == EXPECTED
    assert len(rows) == len(EXPECTED)
    details = {row["id"]: row["detail"] for row in rows}
    assert "gone.wav" in details["gone"]
    assert "broken.wav" in details["broken"]
    assert data.total == 22
    assert "2 empty text (first: mute)" in str(dropped)


def test_the_character_head_learns_no_marks(processor):
    text = "“¿Cómo estás?” — she said: don’t… यह मेरी किताब है। «да» $5"
    heard = "cómo estás she said don't यह मेरी किताब है да 5"
    assert spelled(text) == heard.encode()
    processor = copy.copy(processor)
    processor.alphabet = sorted({*f"{text.lower()}'".encode()})  # even if it knows all of the bytes
    assert processor.spoken(text) == heard


def test_words_of_any_language_are_in_the_lexicon(processor):
    """A byte-level tokenizer writes "é" as two other letters."""
    tokenizer = processor.tokenizer
    processor = copy.copy(processor)
    processor.tokenizer = copy.deepcopy(tokenizer)
    processor.tokenizer.add_tokens(["ĠÃ©tÃ©"])
    processor.alphabet = sorted({*"abcdefghijklmnopqrstuvwxyzé ".encode()})
    ngram = transcript_ngram(processor, [Example("", None, "the cat", 1.0)])
    assert "été" in ngram.words


def test_too_many_drops_are_an_error():
    dropped = Dropped(allowed=0.05)
    for i in range(6):
        dropped.add(f"id{i}", "unreadable audio")
    dropped.check(120)
    with pytest.raises(DataError, match=r"6 of 119 .*max_dropped_fraction=0\.05.*id0"):
        dropped.check(119)
    dropped.allowed = 0.99
    with pytest.raises(DataError):
        dropped.check(6)


def test_a_batch_of_one_corrupt_file_does_not_end_a_run(mixed, processor):
    """The first readable example stands in for it, and it is named."""
    data = SpeechDataset([{"path": str(mixed)}], processor, Dropped())
    ids = [example.id for example in data.examples]
    batch = data.collate([data[ids.index("broken")]])
    assert batch["ids"] == ["clip0"] and [item["id"] for item in batch["dropped"]] == ["broken"]
    data.examples = [example for example in data.examples if not example.id.startswith("clip")]
    with pytest.raises(DataError, match="no example can be read"):
        data.collate([data[0]])


def test_changed_transcripts_are_counted(corpus, tmp_path, processor):
    audio = str(corpus.parent / "wav/3.wav")
    texts = ["the cat", "the <unk> cat", "THE CAT", "the cat <COMMA> sat"]
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": audio, "text": t} for t in texts])
    data = SpeechDataset([{"path": str(path)}], processor, Dropped())
    assert (data.rewritten, len(data)) == (3, 4)
    assert data.examples[3].text == "the cat, sat"


def test_a_folder_of_audio_is_read_by_its_table(corpus, tmp_path, processor):
    for i in range(3):
        (tmp_path / f"{i}.wav").write_bytes((corpus.parent / f"wav/{i}.wav").read_bytes())
    with pytest.raises(DataError, match=r"no \.parquet, and no metadata\.csv"):
        SpeechDataset([{"path": str(tmp_path)}], processor, Dropped())
    rows = [f"{i}.wav,{TEXTS[i]}" for i in range(3)]
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "\n".join(rows) + "\n")
    data = SpeechDataset([{"path": str(tmp_path)}], processor, Dropped())
    assert [example.text for example in data.examples] == list(TEXTS[:3])
    assert all("features" in data[i] for i in range(3))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_downloaded_dataset_is_read_from_its_folder(corpus, tmp_path, processor, streaming):
    """Shards of Parquet in a folder data/, as the Hub has them."""
    (tmp_path / "data").mkdir()
    for i in range(4):
        audio = {"bytes": (corpus.parent / f"wav/{i}.wav").read_bytes(), "path": f"{i}.wav"}
        row = {"id": str(i), "audio": audio, "text": TEXTS[i]}
        path = tmp_path / f"data/train-{i:05d}-of-00004.parquet"
        Dataset.from_list([row]).cast_column("audio", Audio()).to_parquet(path)
    data = SpeechDataset([{"path": str(tmp_path)}], processor, Dropped(), streaming=streaming)
    assert sorted(example.text for example in data.examples) == sorted(TEXTS[:4])
    assert all("features" in data[i] for i in range(4))


def test_a_downloaded_dataset_is_found_in_the_home_folder(corpus, tmp_path, monkeypatch):
    audio = {"bytes": (corpus.parent / "wav/0.wav").read_bytes(), "path": "0.wav"}
    rows = Dataset.from_list([{"id": 0, "audio": audio, "text": "one"}])
    (tmp_path / "mine").mkdir()
    rows.cast_column("audio", Audio()).to_parquet(tmp_path / "mine/train.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    (example,) = read_source({"path": "~/mine"})
    assert (example.id, example.text) == ("0", "one")  # 0 is an id


@pytest.mark.parametrize("first", ["1", "null", "[]", "{"])
def test_a_first_line_that_is_no_object_is_named(first, tmp_path):
    (tmp_path / "m.jsonl").write_text(first + "\n")
    with pytest.raises(DataError, match=r"m\.jsonl.*(line 1 is not a JSON object|no column)"):
        list(read_source({"path": str(tmp_path / "m.jsonl")}))


def test_copies_of_a_clip_count_like_clips(tmp_path, corpus, processor):
    """One silent clip of ten is a tenth, also if each is there eight times."""
    write_audio(tmp_path / "silent.wav", np.zeros(16_000, np.float32), 16_000, "pcm_s16le")
    rows = [{"audio": str(corpus.parent / "wav/0.wav"), "text": TEXTS[0]}] * 9
    rows += [{"audio": str(tmp_path / "silent.wav"), "text": "the cat", "duration": 1.0}]
    path = write_manifest(tmp_path / "m.jsonl", [{"id": str(i), **r} for i, r in enumerate(rows)])
    dropped = Dropped(allowed=0.15)
    sources = [{"path": str(path), "repeat": 8}]
    data = SpeechDataset(sources, processor, dropped, disturb=0.5)
    assert sum(len(items) for items in data.batches(60.0)) == 72
    assert (dropped.counts.total(), data.total) == (8, 80)
    dropped.check(data.total)


def test_nothing_usable_is_an_error(tmp_path, corpus, processor):
    audio = str(corpus.parent / "wav/3.wav")
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": audio, "text": ""}])
    with pytest.raises(DataError, match=r"no usable example.*empty text"):
        SpeechDataset([{"path": str(path)}], processor, Dropped())


@pytest.mark.parametrize("frames", [7, 12, 21])
def test_frames_limit_the_text(frames):
    """The clip with as many frames as targets (and blanks between repeats) is kept."""
    fit = (frames + 1) // 2  # of one letter or token again and again
    for n, m, fits in ((frames, fit, True), (frames + 1, fit + 1, False)):
        for target in (list(range(n)), [7] * m):
            refusal = why_refused(Example("a", None, "text", 1.0, target), frames, 99, (0.1, 30.0))
            assert (refusal or {}).get("reason") == (None if fits else "more tokens than frames")
        for text in (("ab" * n)[:n], "a" * m, "A" * m + ".,!"):
            refusal = why_refused(Example("a", None, text, 1.0, [1]), 99, frames, (0.1, 30.0))
            assert (refusal or {}).get("reason") == (None if fits else "more letters than frames")


def test_letters_need_encoder_frames(tmp_path, processor):
    """In UTF-8, Thai has three bytes for a letter, and the character head spells bytes."""
    manifest = whisper_clips(tmp_path, (2.0,))
    text = "สวัสดีครับ ผมชื่อสมชาย ยินดีที่ได้รู้จัก"
    source = {
        "path": str(write_manifest(manifest, [json.loads(manifest.read_text()) | {"text": text}]))
    }
    with pytest.raises(DataError, match="more letters than frames"):
        SpeechDataset([source], processor, Dropped(), token_head=False)
    data = SpeechDataset([source], processor, Dropped(), token_head=False, character_head=False)
    assert len(data) == 1


def test_repeat_mixes_sources(corpus, tmp_path, processor):
    other = write_manifest(
        tmp_path / "o.jsonl",
        [{"id": "extra", "audio": str(corpus.parent / "wav/3.wav"), "text": "the cat"}],
    )
    sources = [{"path": str(corpus)}, {"path": str(other), "repeat": 5}]
    data = SpeechDataset(sources, processor, Dropped())
    count = Counter(example.id for example in data.examples)
    assert count == {**{f"clip{i}": 1 for i in range(12)}, "extra": 5}
    assert len(SpeechDataset(sources, processor, Dropped(), max_train_samples=3)) == 3


def test_features_and_targets_of_an_item(corpus, processor):
    data = SpeechDataset([{"path": str(corpus)}], processor, Dropped(), lowercase=True)
    item = data[4]
    assert item["id"] == "clip4"
    assert processor.decode(item["target"]) == TEXTS[4]
    samples = data_module.load_audio(str(corpus.parent / "wav/4.wav"))
    assert torch.equal(item["features"], processor.features(samples))
    batch = data.collate([data[i] for i in range(3)])
    assert batch["seconds"] == pytest.approx(0.9 + 0.99 + 1.08)


# -- augmentation --------------------------------------------------------------------------------


@pytest.fixture
def augmented(corpus, processor):
    options = {"feature_noise": 0.1, "channel_drop": 0.2, "time_mask": 8}
    return SpeechDataset([{"path": str(corpus)}], processor, Dropped(), seed=3, **options)


def test_augmentation_is_drawn_from_seed_epoch_and_id(augmented):
    frames = torch.randn(50, 32)
    original = frames.clone()
    first = augmented.perturb(frames, "a")
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(first, augmented.perturb(frames, "a"))
    assert torch.equal(frames, original)
    assert not torch.equal(first, augmented.perturb(frames, "b"))
    augmented.epoch = 1
    assert not torch.equal(first, augmented.perturb(frames, "a"))
    augmented.epoch, augmented.seed = 0, 4
    assert not torch.equal(first, augmented.perturb(frames, "a"))
    augmented.seed = 3
    assert torch.equal(first, augmented.perturb(frames, "a"))


def test_augmentation_is_of_the_size_that_was_asked_for(augmented):
    frames = torch.ones(400, 500)
    out = augmented.perturb(frames, "a")
    masked = (out == 0).all(1)
    assert masked.sum() <= 8
    dropped = (out[~masked] * 0.8 < 0.5).float().mean(0) > 0.5
    assert dropped.float().mean() == pytest.approx(0.2, abs=0.05)
    noise = out[~masked][:, ~dropped] - 1 / 0.8
    assert noise.std() == pytest.approx(0.1, rel=0.05)
    assert augmented.perturb(torch.ones(3, 500), "b").shape == (3, 500)  # shorter than the mask


@pytest.mark.parametrize("workers", [0, 1])
def test_every_epoch_of_a_training_run_draws_anew(augmented, workers):
    """As the Trainer does it: a loader out of accelerate, told the epoch before each."""
    augmented.serve_encoded({f"clip{i}": torch.ones(20, 32) for i in range(12)})
    sampler = LengthBatchSampler([e.duration for e in augmented.examples], 6.0)
    loader = Accelerator(cpu=True).prepare(
        DataLoader(
            augmented, batch_sampler=sampler, collate_fn=augmented.collate, num_workers=workers
        )
    )
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        clips = {}
        for batch in loader:
            clips |= dict(zip(batch["ids"], batch["input_features"], strict=True))
        epochs.append(clips["clip5"][:20])
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1]), "the dataset was not told of the new epoch"


def test_cached_frames_of_clips_with_one_id_are_not_mixed_up(tmp_path, build, processor):
    """Two corpora number their clips from 0: each clip must keep its own frames."""
    sources = []
    for corpus, seconds in (("a", 0.8), ("b", 1.6)):
        write_audio(tmp_path / f"{corpus}.wav", babble(seconds, len(sources)), 16_000, "pcm_s16le")
        row = {"id": "000000", "audio": f"{corpus}.wav", "text": "the cat", "duration": seconds}
        sources.append({"path": str(write_manifest(tmp_path / f"{corpus}.jsonl", [row]))})
    _, model = build("whisper", ctc=False)
    dropped = Dropped()
    data = SpeechDataset(sources, processor, dropped)
    try:
        cache_frames(model, data, tmp_path)
    except DataError:
        return  # refusing ids that occur twice is as good
    assert len(data) == 2
    assert [len(data[i]["features"]) for i in range(2)] == [40, 80]


def glob_frames(parent):
    """Whole folders of frames."""
    return [path for path in parent.glob("encoder_frames-*") if path.suffix != ".tmp"]


def test_frames_are_whole_or_not_there(tmp_path, build, corpus, processor, monkeypatch):
    """Stopped at half, then run again: every clip has the frames that the encoder gives."""
    _, model = build("whisper", ctc=False)
    data = SpeechDataset([{"path": str(corpus)}], processor, Dropped())
    encode, calls = model.encode, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(model, "encode", stopped)
    monkeypatch.setattr(frames, "BATCH_SECONDS", 0.1)  # a batch for each clip
    with pytest.raises(KeyboardInterrupt):
        cache_frames(model, data, tmp_path)
    assert not glob_frames(tmp_path), "half of it looks whole"
    plain = {example.id: data[i]["features"] for i, example in enumerate(data.examples)}
    cache_frames(model, data, tmp_path)
    (folder,) = glob_frames(tmp_path)
    for clip, features in plain.items():
        inputs = processor.collate([features])
        with torch.no_grad():
            expected, _ = encode(inputs["input_features"], inputs["input_features_mask"])
        assert torch.equal(Frames(folder)[clip], expected[0].half())
    assert "no such clip" not in Frames(folder)


def test_frames_made_in_bfloat16_are_nearly_the_same(tmp_path, build, corpus):
    processor, model = build("whisper", ctc=False)
    made = {}
    for bf16 in (False, True):
        data = SpeechDataset([{"path": str(corpus)}], processor, Dropped())
        cache_frames(model, data, tmp_path, bf16)
        (folder,) = {*glob_frames(tmp_path)} - {*made.values()}
        made[bf16] = folder
    for example in data.examples:
        exact, rounded = (Frames(made[bf16])[example.id].float() for bf16 in (False, True))
        assert not torch.equal(exact, rounded)
        assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_a_corrected_duration_is_read_again(tmp_path, build, processor):
    _, model = build("whisper", ctc=False)
    write_audio(tmp_path / "a.wav", babble(1.0, 1), 16_000, "pcm_s16le")
    row = {"id": "a", "audio": "a.wav", "text": "the cat"}
    for stated, there in ((9.0, 0), (1.0, 1)):
        manifest = write_manifest(tmp_path / "m.jsonl", [row | {"duration": stated}])
        data = SpeechDataset([{"path": str(manifest)}], processor, Dropped())
        cache_frames(model, data, tmp_path)
        assert len(data) == there


def test_why_a_clip_has_no_cached_frames_is_told_to_every_stage(tmp_path, build, processor):
    """The second stage finds the cache made, and still says what was wrong with the file."""
    _, model = build("whisper", ctc=False)
    rows = []
    for name, samples in (("good", babble(1.0, 1)), ("silent", np.zeros(16_000, np.float32))):
        write_audio(tmp_path / f"{name}.wav", samples, 16_000, "pcm_s16le")
        rows.append({"id": name, "audio": f"{name}.wav", "text": "the cat", "duration": 1.0})
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    for stage in ("first", "second"):
        dropped = Dropped(tmp_path / f"{stage}.jsonl", allowed=0.5)
        data = SpeechDataset([{"path": str(manifest)}], processor, dropped)
        cache_frames(model, data, tmp_path)
        assert [example.id for example in data.examples] == ["good"]
        (row,) = read_log(tmp_path / f"{stage}.jsonl")
        assert row == {"id": "silent", "reason": "silent", "detail": "every sample is zero"}


def test_threads_do_not_take_each_others_lengths(tmp_path, build, corpus, monkeypatch):
    """The group norm of the smaller HuBERT models keeps the lengths of the batch at hand."""
    processor, model = build("hubert-group", ctc=False)
    data = SpeechDataset([{"path": str(corpus)}], processor, Dropped())
    plain = {example.id: data[i]["features"] for i, example in enumerate(data.examples)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(frames, "CLIPS_PER_TASK", 1)
    cache_frames(model, data, tmp_path)
    (folder,) = glob_frames(tmp_path)
    for clip, features in plain.items():
        inputs = processor.collate([features])
        with torch.no_grad():
            expected, _ = model.encode(inputs["input_features"], inputs["input_features_mask"])
        assert torch.allclose(Frames(folder)[clip].float(), expected[0], atol=2e-3)


def test_another_limit_of_disturbed_clips_is_encoded_anew(tmp_path, build, corpus, processor):
    """Disturbances that make a clip too long are not applied, so the limit decides its frames."""
    _, model = build("whisper", ctc=False)
    for longest in (4.0, 30.0):
        options = {"max_seconds": longest, "disturb": 1.0}
        data = SpeechDataset([{"path": str(corpus)}], processor, Dropped(allowed=1.0), **options)
        cache_frames(model, data, tmp_path)
    assert len(glob_frames(tmp_path)) == 2


def test_a_file_that_was_replaced_is_encoded_anew(tmp_path, build, processor):
    """Another recording of the same name and length."""
    _, model = build("whisper", ctc=False)
    row = {"id": "a", "audio": "a.wav", "text": "the cat", "duration": 1.0}
    manifest = write_manifest(tmp_path / "m.jsonl", [row])
    heard = []
    for seed in (1, 2):
        path = write_audio(tmp_path / "a.wav", babble(1.0, seed), 16_000, "pcm_s16le")
        os.utime(path, (1, 1))  # nor does the time tell
        data = SpeechDataset([{"path": str(manifest)}], processor, Dropped())
        cache_frames(model, data, tmp_path)
        heard.append(data[0]["features"])
    assert not torch.equal(*heard)


def test_other_weights_of_the_encoder_are_encoded_anew(tmp_path, build, corpus, processor):
    """Also where the encoder is a folder of the same name."""
    _, model = build("whisper", ctc=False)
    for scale in (1.0, 1.0, 1.5):
        with torch.no_grad():
            model.encoder.layers[0].fc1.weight.mul_(scale)
        data = SpeechDataset([{"path": str(corpus)}], processor, Dropped())
        cache_frames(model, data, tmp_path)
    assert len(glob_frames(tmp_path)) == 2


def test_cached_frames_are_without_dropout(tmp_path, build, corpus, processor):
    _, model = build("whisper", ctc=False)
    model.encoder.dropout = 0.5
    data = SpeechDataset([{"path": str(corpus)}], processor, Dropped())
    inputs = processor.collate([data[0]["features"]])
    cache_frames(model.train(), data, tmp_path)
    with torch.no_grad():
        expected, _ = model.eval().encode(inputs["input_features"], inputs["input_features_mask"])
    assert torch.allclose(data.encoded["clip0"].float(), expected[0], atol=2e-3)


def test_an_error_ends_encoding_at_once(tmp_path, build, corpus, processor, monkeypatch):
    """Ctrl-C and a full disk too: the clips that are left are not encoded first."""
    _, model = build("whisper", ctc=False)
    begun = []

    def fail(*_):
        begun.append(1)
        time.sleep(0.2)
        raise OSError("No space left on device")

    monkeypatch.setattr(frames, "CLIPS_PER_TASK", 1)
    monkeypatch.setattr(frames, "encode_some", fail)
    data = SpeechDataset([{"path": str(corpus)}], processor, Dropped())
    with pytest.raises(OSError, match="No space left"):
        cache_frames(model, data, tmp_path)
    assert len(begun) < len(data) / 2


def whisper_clips(folder, seconds):
    text = "there are many words in this one"
    rows = []
    for i, length in enumerate(seconds):
        audio = write_audio(folder / f"{i}.wav", babble(length, i), 16_000, "pcm_s16le")
        rows.append({"id": f"c{i}", "audio": audio.name, "text": text, "duration": length})
    return write_manifest(folder / "m.jsonl", rows)


@pytest.mark.parametrize("disturb", [0.0, 1.0])
def test_no_clip_is_too_long_for_whisper(tmp_path, build, disturb):
    """Whisper has positions for 30 s, which the silence behind each clip shares."""
    like, model = build("whisper", ctc=False)
    processor = ASRProcessor(like.feature_extractor, like.tokenizer, like.encoder, tail_seconds=0.2)
    assert processor.max_seconds == 29.8
    manifest, dropped = whisper_clips(tmp_path, (29.75, 29.9)), Dropped()
    data = SpeechDataset([{"path": str(manifest)}], processor, dropped, disturb=disturb)
    assert [example.id for example in data.examples] == ["c0"]
    assert dropped.counts == {"over max_seconds": 1}
    for data.epoch in range(20):
        assert data.lengths(data.epoch)[0] <= 30.0
        inputs = processor.collate([data[0]["features"]])
        assert inputs["input_features"].shape[-1] <= 3000
    with torch.no_grad():
        model.encode(inputs["input_features"], inputs["input_features_mask"])


def test_a_clip_of_which_half_is_missing_is_dropped(tmp_path, processor):
    """The header of an MP3 file states the length of the whole, wherever the file ends."""
    path = write_audio(tmp_path / "a.mp3", babble(12.0, 1), 16_000, "libmp3lame")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = [{"id": "half", "audio": "a.mp3", "text": "there are many words", "duration": 12.0}]
    data = SpeechDataset([{"path": str(write_manifest(tmp_path / "m.jsonl", rows))}], processor,
                         Dropped())  # fmt: skip
    assert data[0]["reason"] == "not as long as stated"


def test_tokens_may_outnumber_frames_without_a_token_head(tmp_path, processor):
    manifest = whisper_clips(tmp_path, (2.0,))
    rows = [json.loads(manifest.read_text()) | {"text": "สวัสดีครับ ผมชื่อสมชาย"}]
    source = {"path": str(write_manifest(manifest, rows))}
    with pytest.raises(DataError, match="more tokens than frames"):
        SpeechDataset([source], processor, Dropped())
    assert len(SpeechDataset([source], processor, Dropped(), token_head=False)) == 1


@pytest.mark.parametrize("kind", [SpeechDataset, SpeechStream])
def test_copies_of_a_clip_are_disturbed_each_in_its_own_way(kind, corpus, processor):
    most = (60.0,) if kind is SpeechStream else ()
    source = {"path": str(corpus), "repeat": 2}
    data = kind([source], processor, Dropped(), *most, disturb=1.0, max_seconds=20.0)
    batch = next(iter(data)) if most else data.collate([data[i] for i in range(len(data))])
    pairs = [(id, f"{id}#1") for id in batch["ids"] if f"{id}#1" in batch["ids"]]
    for pair in pairs:
        first, copy = (batch["input_features"][batch["ids"].index(id)] for id in pair)
        assert not torch.equal(first, copy)
    assert pairs


def test_a_letter_that_occurs_only_as_a_capital_is_learned():
    texts = [Example("a", None, text, 1.0) for text in ("Åse og Øystein", "Ål")]
    _, alphabet = ctc_vocabulary(texts)
    assert {*"åse og øystein ål".encode()} == {*alphabet}


def test_capitals_in_a_list_of_words_are_words(tmp_path, build):
    (tmp_path / "w.tsv").write_text("Cat\t50\ncat\t7\n")
    assert read_counts(tmp_path / "w.tsv") == {"cat": 57.0}


def test_a_text_with_a_comma_needs_quotes(tmp_path):
    """Otherwise pandas takes the first column for an index and shifts the others."""
    path = tmp_path / "m.csv"
    path.write_text("audio,text\na.wav,hello, world\nb.wav,well\n")
    with pytest.raises(DataError, match="line 2 has more fields than the header"):
        rows_of({"path": str(path)})
