"""Data read as a stream: every example once an epoch, resumable at any batch, and real kills."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from functools import cache
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import numpy as np
import psutil
import pytest
import torch
from conftest import TEXTS, babble, write_audio, write_manifest
from datasets import load_dataset
from safetensors.torch import load_file

from tiny_audio.asr.asr_saving import WEIGHTS
from tiny_audio.training import train as runner
from tiny_audio.training.checks import Dropped, read_log
from tiny_audio.training.manifests import DataError, mix_shards
from tiny_audio.training.run_log import LOG
from tiny_audio.training.stream import SpeechStream


@pytest.fixture(scope="module")
def processor(build):
    return build("whisper")[0]


@pytest.fixture(scope="module")
def two_sources(corpus, tmp_path_factory):
    """Manifests of 12 and of 5 clips; one of the five cannot be read."""
    folder = tmp_path_factory.mktemp("second")
    rows = []
    for i in range(5):
        path = write_audio(folder / f"{i}.wav", babble(1 + i / 5, i), 16_000, "pcm_s16le")
        rows.append(
            {"id": f"other{i}", "audio": path.name, "text": TEXTS[i], "duration": 1 + i / 5}
        )
    (folder / "4.wav").write_text("no audio")
    return [{"path": str(corpus)}, {"path": str(write_manifest(folder / "m.jsonl", rows))}]


def stream_of(sources, processor, **options):
    return SpeechStream(sources, processor, Dropped(), 6.0, max_seconds=6.0, **options)


def one_epoch(stream):
    """Batches of the first epoch."""
    found = []
    for batch in stream:
        found.append(batch)
        if batch["position"]["epoch"] == 1:
            return found


@pytest.mark.parametrize("block", [4, 7, 2000])
@pytest.mark.parametrize("weight", [1.0, 20.0])
def test_every_example_once_an_epoch(two_sources, processor, block, weight):
    sources = [two_sources[0], {**two_sources[1], "weight": weight}]
    stream = stream_of(sources, processor, block=block)
    batches = one_epoch(stream)
    ids = Counter(id for batch in batches for id in batch["ids"])
    assert ids == {**{f"clip{i}": 1 for i in range(12)}, **{f"other{i}@1": 1 for i in range(4)}}
    assert [item["id"] for batch in batches for item in batch["dropped"]] == ["other4@1"]
    for batch in batches:
        assert batch["input_features"].shape[-1] / 100 * len(batch["ids"]) <= 6.0 + 0.1 * 12


def test_weights_mix_the_sources(two_sources, processor):
    sources = [{**two_sources[0], "weight": 1.0}, {**two_sources[1], "weight": 1000.0}]
    first = next(iter(stream_of(sources, processor, block=4)))
    ids = [*first["ids"], *(item["id"] for item in first["dropped"])]
    assert all(id.startswith("other") for id in ids)


def test_epochs_differ_and_repeat_by_seed(two_sources, processor):
    def order(seed):
        batches = islice(stream_of(two_sources, processor, block=6, seed=seed), 14)
        return [batch["ids"] for batch in batches]

    first = order(0)
    assert first == order(0) != order(1)
    half = len(one_epoch(stream_of(two_sources, processor, block=6)))
    assert first[:half] != first[half : 2 * half]


@pytest.mark.parametrize("stop", [0, 1, 3, 6, 9])
def test_a_stream_goes_on_where_it_stopped(two_sources, processor, stop):
    """From the position that came with any batch, through a file as a checkpoint keeps it."""
    options = {"block": 6, "seed": 3, "disturb": 0.7}
    whole = list(islice(stream_of(two_sources, processor, **options), 14))
    stream = stream_of(two_sources, processor, **options)
    stream.start = json.loads(json.dumps(whole[stop]["position"]))
    for expected, batch in zip(whole[stop + 1 :], stream, strict=False):
        assert batch["ids"] == expected["ids"]
        assert torch.equal(batch["input_features"], expected["input_features"])
        assert batch["dropped"] == expected["dropped"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_vocabulary_of_a_stream_is_that_of_its_texts(processor, tmp_path, kind):
    """Not of the names of its columns, paths and ids."""
    rows = [{"id": f"Q{i}", "audio": "x.wav", "sentence": text} for i, text in enumerate(TEXTS)]
    if kind == "jsonl":
        path = write_manifest(tmp_path / "m.jsonl", rows)
        path.write_text(path.read_text().replace("\n", "\n\n", 1))  # an empty line
    else:
        path = tmp_path / "m.csv"
        lines = [",".join(row.values()) for row in rows]
        path.write_text("\n".join(["id,audio,sentence", *lines]) + "\n")
    stream = stream_of([{"path": str(path)}], processor)
    assert [example.text for example in stream.texts(100)] == list(TEXTS)


def test_a_broken_line_of_a_stream_is_named_when_the_vocabulary_is_read(processor, tmp_path):
    rows = [{"id": f"{i}", "audio": "x.wav", "text": text} for i, text in enumerate(TEXTS[:3])]
    path = write_manifest(tmp_path / "m.jsonl", rows)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match=r"m\.jsonl, row 4 .* is not a JSON object"):
        list(stream_of([{"path": str(path)}], processor).texts(100))


def test_processes_share_a_stream(two_sources, processor):
    """No example twice, none lost."""
    ids = Counter()
    for rank in range(3):
        for batch in one_epoch(stream_of(two_sources, processor, block=4, rank=rank, world=3)):
            ids.update(batch["ids"])
    assert ids == {**{f"clip{i}": 1 for i in range(12)}, **{f"other{i}@1": 1 for i in range(4)}}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A streaming dataset of 12 shards, each of a source of its own with 5 to 16 rows."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(12):
        rows = [{"source": i, "row": j} for j in range(5 + i)]
        (folder / f"{i:02}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = sorted(map(str, folder.iterdir()))
    return lambda: load_dataset("json", data_files=files, split="train", streaming=True)


def numbers(rows) -> list[tuple[int, int]]:
    return [(row["source"], row["row"]) for row in rows]


def test_shards_are_mixed_in_an_order_of_their_own_each_epoch(sharded):
    first, other, next_epoch = (
        numbers(mix_shards(sharded(), draw)) for draw in ((0, 0), (1, 0), (0, 1))
    )
    everything = sorted((i, j) for i in range(12) for j in range(5 + i))
    assert sorted(first) == sorted(other) == sorted(next_epoch) == everything
    assert first == numbers(mix_shards(sharded(), (0, 0)))
    assert first != other and first != next_epoch
    assert len({source for source, _ in first[:16]}) >= 8  # not one source after the other


@pytest.mark.parametrize("stop", [0, 1, 30, 77, 125])
def test_shards_go_on_where_they_stopped(sharded, stop):
    whole = numbers(mix_shards(sharded(), (3, 0)))
    stopped, resumed = mix_shards(sharded(), (3, 0)), mix_shards(sharded(), (3, 0))
    before = numbers(islice(stopped, stop))
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert before + numbers(resumed) == whole


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_shards(sharded, world):
    """Their own ones, or every world-th row where 12 cannot be shared evenly."""
    shares = [numbers(mix_shards(sharded(), (0, 0), rank, world)) for rank in range(world)]
    whole = numbers(mix_shards(sharded(), (0, 0)))
    assert sorted(row for share in shares for row in share) == sorted(whole)
    assert all(len(share) > len(whole) / world / 2 for share in shares)


def test_the_same_ids_in_two_sources_are_two_clips(two_sources, processor):
    batches = one_epoch(stream_of([two_sources[1], two_sources[1]], processor, block=4))
    assert sorted(id for batch in batches for id in batch["ids"]) == sorted(
        f"other{i}{source}" for i in range(4) for source in ("", "@1")
    )
    dropped = Dropped()
    for batch in batches:
        for item in batch["dropped"]:
            dropped.add(item["id"], item["reason"])
    assert dropped.counts.total() == 2


def test_max_train_samples_is_an_epoch(two_sources, processor):
    batches = one_epoch(stream_of(two_sources[:1], processor, max_train_samples=5))
    assert sorted(id for batch in batches for id in batch["ids"]) == [f"clip{i}" for i in range(5)]


def test_what_is_wrong_with_a_stream_is_said_at_once(two_sources, processor):
    with pytest.raises(DataError, match="no column 'words'"):
        stream_of([{**two_sources[0], "text_column": "words"}], processor)
    with pytest.raises(DataError, match="weight must be above 0"):
        stream_of([two_sources[0], {**two_sources[1], "weight": 0}], processor)
    with pytest.raises(DataError, match=r"batch_seconds=6\.0 is shorter than data\.max_seconds=30"):
        SpeechStream(two_sources, processor, Dropped(), 6.0)


def test_repeated_clips_count_as_often_as_they_are_dropped(two_sources, processor):
    """Disturbed repetitions have ids of their own, and so have their drops."""
    source = {**two_sources[1], "repeat": 4}
    batches = one_epoch(stream_of([source], processor, disturb=0.5))
    dropped = {item["id"] for batch in batches for item in batch["dropped"]}
    assert len(dropped) == 4  # one of five clips
    assert batches[-1]["position"]["seen"] == 20


@pytest.mark.parametrize("count", [3, 300])
def test_a_stream_of_which_nothing_can_be_read_ends(tmp_path, processor, count):
    rows = [{"id": f"{i}", "audio": "gone.wav", "text": "a b", "duration": 1} for i in range(count)]
    path = write_manifest(tmp_path / "m.jsonl", rows)
    with pytest.raises(DataError, match="no usable example"):
        next(iter(stream_of([{"path": str(path)}], processor)))


def test_a_stream_is_continued_by_as_many_processes(compose, tmp_path):
    """Each has read its own share: what another number of them read would be lost or come twice."""
    cfg = compose("data.streaming=true", "data.max_seconds=5.8", "training.cache_encoder=false",
                  steps=(4, 1), save_steps=2)  # fmt: skip
    runner.train(cfg)
    (tmp_path / "run/align/final/finished.json").unlink()
    (tmp_path / "run/finished.json").unlink()
    shares = tmp_path / "run/align/checkpoint-4"
    shutil.copy(shares / "stream-0.json", shares / "stream-1.json")
    with pytest.raises(ValueError, match=r"was saved by 2 process\(es\): continue it with as many"):
        runner.train(cfg)


def test_too_many_drops_end_a_streaming_run(compose, corpus, tmp_path):
    """Not the first one: when enough was read, or the first epoch is over."""
    good = [json.loads(line) for line in corpus.read_text().splitlines()]
    for row in good:
        row["audio"] = str(corpus.parent / row["audio"])
    bad = [{**good[0], "id": f"bad{i}", "audio": "gone.wav"} for i in range(2)]
    path = write_manifest(tmp_path / "m.jsonl", [*bad, *good])

    def run(allowed):
        cfg = compose("data.streaming=true", "data.max_seconds=5.8", "data.block=4",
                      "training.cache_encoder=false", f"data.max_dropped_fraction={allowed}",
                      "run.fresh=true", steps=(8, 1), manifest=path)  # fmt: skip
        return runner.train(cfg)

    with pytest.raises(DataError, match=r"2 of 14 examples .*=0\.1: 2 unreadable audio .*bad0"):
        run(0.1)
    losses = [row for row in read_log(tmp_path / "run/align" / LOG) if "loss" in row]
    assert 1 < len(losses) < 8
    run(0.15)


# -- runs, killed ----------------------------------------------------------------------------------


STEPS = 16


@pytest.fixture(scope="module")
def run_in(tiny_bases, corpus):
    """`run_in(folder, streaming)`: the process of a short run with everything random in it."""

    def start(folder: Path, streaming: bool, *overrides: str) -> BaseProcess:
        settings = [
            f"model.encoder_model_name={tiny_bases / 'whisper'}",
            f"model.decoder_model_name={tiny_bases / 'decoder'}",
            "model.projector_hidden=32",
            "encoder_lora.r=2", "encoder_lora.lora_dropout=0.1", "peft.r=2",
            "peft.lora_dropout=0.1",
            f"data.train=[{{path: {corpus}}}]", f"data.streaming={streaming}", "data.block=7",
            "data.max_seconds=4.8", "data.disturb=0.7", f"run.output_dir={folder}",
            f"training.max_steps={STEPS}",
            "training.eval_strategy=no", "training.logging_steps=1", "training.save_steps=4",
            "training.warmup_steps=2", "training.batch_seconds=5", "training.report_to=none",
            "training.gradient_accumulation_steps=2", "training.dataloader_num_workers=1",
        ]  # fmt: skip
        return forked.start([*settings, *overrides], said_in(folder))

    return start


def said_in(folder: Path) -> Path:
    """Where the output of the last run in a folder is."""
    return folder.with_name(folder.name + ".txt")


def finish(process: BaseProcess, folder: Path, code: int = 0) -> str:
    """Wait for a run; what it said."""
    process.join(300)
    said = said_in(folder).read_text()
    assert process.exitcode == code, said[-3000:]
    return said


@pytest.fixture(scope="module")
def uninterrupted(run_in, tmp_path_factory):
    """`uninterrupted(streaming)`: the folder of a finished run."""

    @cache
    def folder_of(streaming: bool) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        finish(run_in(folder, streaming), folder)
        return folder

    return folder_of


def steps_of(folder: Path) -> list[tuple]:
    rows = read_log(folder / "train" / LOG)
    return [(row["step"], row["loss"]) for row in rows]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Losses of every step, and the weights."""
    assert steps_of(folder) == steps_of(whole)
    assert [step for step, *_ in steps_of(folder)] == list(range(1, STEPS + 1))
    a, b = load_file(folder / WEIGHTS), load_file(whole / WEIGHTS)
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def wait_for(process: BaseProcess, folder: Path, step: int) -> None:
    """Until the log has that step, or the process has ended."""
    while process.is_alive() and not any(row[0] >= step for row in steps_of(folder)):
        time.sleep(0.005)


def kill_in_checkpoint(process: BaseProcess, folder: Path, step: int) -> bool:
    """Kill while the checkpoint of that step is being written; whether it was in time."""
    path = folder / f"train/checkpoint-{step}"
    while process.is_alive() and not path.exists():
        time.sleep(0.0005)
    process.kill()
    process.join()
    return path.exists() and not (path / "trainer_state.json").exists()


def test_sigkill_at_any_moment_changes_nothing(run_in, uninterrupted, tmp_path):
    """Three kills, one of them while a checkpoint is being written."""
    folder = tmp_path / "run"
    for step in (1, 9, 12):
        process = run_in(folder, True)
        if step == 12:
            assert kill_in_checkpoint(process, folder, step)
        else:
            wait_for(process, folder, step)
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, said_in(folder).read_text()[-3000:]
    said = finish(run_in(folder, True), folder)
    assert "checkpoint-12: incomplete, removed" in said and "continuing from" in said
    assert_same_run(folder, uninterrupted(True))


@pytest.mark.long
@pytest.mark.parametrize("streaming", [False, True], ids=["all there", "stream"])
def test_fifty_kills_change_nothing(run_in, uninterrupted, streaming, tmp_path):
    """At moments drawn by seed, three a run; every third one in a checkpoint.

    KILLS=500 in the environment makes it five hundred.
    """
    rng, kills, torn, runs = np.random.default_rng(int(streaming)), 0, 0, 0
    while kills < int(os.environ.get("KILLS", "50")):
        folder, runs = tmp_path / f"run{runs}", runs + 1
        for i, step in enumerate(sorted(rng.choice(np.arange(1, 15), 3, replace=False))):
            process = run_in(folder, streaming)
            if i == runs % 3:
                torn += kill_in_checkpoint(process, folder, int(step) // 4 * 4 + 4)
            else:
                wait_for(process, folder, int(step))
                time.sleep(rng.uniform(0, 0.15))  # a step and its checkpoint take about as long
                process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        finish(run_in(folder, streaming), folder)
        assert_same_run(folder, uninterrupted(streaming))
        shutil.rmtree(folder)
    print(f"\nstreaming={streaming}: {runs} runs, {kills} kills, {torn} of them in a checkpoint")


def test_sigterm_saves_and_says_so_with_its_own_code(run_in, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = run_in(folder, True, "training.save_steps=1000")
    wait_for(process, folder, 5)
    process.terminate()
    assert "SIGTERM: saved" in finish(process, folder, 75)
    (checkpoint,) = (folder / "train").glob("checkpoint-*")
    assert int(checkpoint.name.split("-")[1]) >= 5
    finish(run_in(folder, True, "training.save_steps=1000"), folder)
    assert_same_run(folder, uninterrupted(True))


@pytest.mark.parametrize("streaming", [True, False])
def test_sigterm_to_all_processes_of_a_run_saves(run_in, uninterrupted, tmp_path, streaming):
    """Slurm and systemd send it to the readers of data, too."""
    folder = tmp_path / "run"
    process = run_in(folder, streaming, "training.save_steps=1000")
    wait_for(process, folder, 5)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.terminate()
    process.terminate()
    assert "SIGTERM: saved" in finish(process, folder, 75)
    finish(run_in(folder, streaming, "training.save_steps=1000"), folder)
    assert_same_run(folder, uninterrupted(streaming))
