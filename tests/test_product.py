"""The product as a user runs it: a short real training run, and every command of the documents."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import split_at_pauses, write_audio
from safetensors.torch import load_file

from tiny_audio.asr.asr_audio import SAMPLE_RATE, load_audio
from tiny_audio.asr.asr_saving import WEIGHTS
from tiny_audio.commands import cli, dev, quickstart
from tiny_audio.commands.quickstart import ROWS
from tiny_audio.commands.speech import read_manifest
from tiny_audio.evaluation.scoring import score
from tiny_audio.loading import load_pipeline
from tiny_audio.training.checks import read_log
from tiny_audio.training.recipe import compose_recipe
from tiny_audio.training.run_log import LOG
from tiny_audio.training.train import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What a user reads; another_language.md has a test of its own.
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
DOCS = {
    path.stem: path.read_text() for path in PAGES if path.stem not in ("another_language", "log")
}
# Real weights and recorded clips, no synthetic speech, few steps: minutes become one.
SHORT = (
    "model.tune=false training.logging_steps=5 "
    "data.max_train_samples=60 'data.train=[{{path: {train}}}]' "
    "'data.eval=[{{path: {dev}, sample: 6}}]' stages.0.training.batch_seconds=32 "
    "stages.0.training.max_steps=30 stages.0.training.warmup_steps=5 "
    "stages.1.training.batch_seconds=32 stages.1.training.max_steps=5 "
    "stages.2.training.batch_seconds=28 stages.2.training.max_steps=2 "
)


def bash(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run as a user with the environment active does, from `cwd`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def workplace(real_bases, real_rows, tmp_path_factory) -> Path:
    """A folder like a clone in which the quickstart's recipe has run, only shorter."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("src", "configs"):
        (folder / name).symlink_to(ROOT / name)
    samples = load_audio(real_rows[0]["audio"])
    write_audio(folder / "talk.mp3", samples, 44_100, "libmp3lame")
    (folder / "talk.srt").write_text("1\n00:00:00,000 --> 00:00:02,000\nplease hold\n")
    write_audio(folder / "meeting.m4a", samples, 22_050, "aac")
    short = SHORT.format(train=real_bases.train, dev=real_bases.dev)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(compose_recipe(["+experiments=quickstart", *shlex.split(short)]))
    return folder


def logged(workplace: Path, stage: str) -> list[dict]:
    rows = read_log(workplace / "outputs/quickstart" / stage / LOG)
    return [row for row in rows if "loss" in row]


def test_short_run_learns(workplace):
    losses = [row["loss"] for row in logged(workplace, "characters")]
    assert losses[-1] < 0.7 * losses[0]
    for stage in ("characters", "align", "decoder"):
        for row in logged(workplace, stage):
            assert 0 < row["grad_norm"] < float("inf")
            assert 0 <= row["padding"] < 0.5


def test_same_text_everywhere(workplace, real_rows, capsys):
    """Pipeline in a process without this package, command line and evaluation: one text."""
    clips = [row["audio"] for row in real_rows[:3]]
    model = workplace / "outputs/quickstart"
    code = (
        "import sys, json; sys.modules['tiny_audio'] = None; from transformers import pipeline; "
        f"asr = pipeline('automatic-speech-recognition', {str(model)!r}, trust_remote_code=True); "
        "print('TEXTS', json.dumps([r['text'] for r in asr(sys.argv[1:])]))"
    )
    out = subprocess.run([sys.executable, "-c", code, *clips], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    remote = json.loads(out.stdout.split("TEXTS ")[1])
    capsys.readouterr()
    assert cli.main(["transcribe", *clips, "--model", str(model)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1] for line in said] == remote
    manifest = workplace / "three.jsonl"
    rows = [{**row, "audio": str(row["audio"])} for row in real_rows[:3]]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(workplace / "three")
    assert cli.main(["eval", str(model), "--dataset", str(manifest), "--out", out]) == 0
    results = [json.loads(s) for s in (workplace / "three/results.jsonl").read_text().splitlines()]
    by_id = {row["id"]: row["prediction"] for row in results}
    assert [by_id[row["id"]] for row in real_rows[:3]] == remote


def make_two_voices(path: Path, real_bases, seconds: float = 26.0) -> tuple[list, str]:
    """An MP3 (44.1 kHz, stereo) of two speakers in turn, 0.7 s apart; its pauses and its words."""
    prompts = [r for r in read_manifest(real_bases.dev) if 3 < r["duration"] < 9]
    novel = [r for r in read_manifest(real_bases.librivox) if r["duration"] < 18]
    parts, pauses, words, at = [], [], [], 0.0
    for i in range(1000):
        row = (novel if i % 3 == 2 else prompts)[i % len(novel if i % 3 == 2 else prompts)]
        samples = load_audio(real_bases.dev.parent / row["audio"])
        parts += [samples, np.zeros(round(0.7 * SAMPLE_RATE), np.float32)]
        at += len(samples) / SAMPLE_RATE
        pauses.append((at, at + 0.7))
        at += 0.7
        words.append(row["text"])
        if at > seconds:
            break
    frame = av.AudioFrame.from_ndarray(np.concatenate(parts)[None], format="flt", layout="mono")
    frame.sample_rate = SAMPLE_RATE
    resampler = av.AudioResampler(format="flt", layout="mono", rate=44_100)
    blocks = [b.to_ndarray()[0] for f in (frame, None) for b in resampler.resample(f)]
    write_audio(path, np.stack([np.concatenate(blocks)] * 2), 44_100, "libmp3lame")
    return pauses, " ".join(words)


def test_a_long_recording_of_two_voices_is_read_to_its_end(workplace, real_bases):
    pauses, _ = make_two_voices(workplace / "two.mp3", real_bases)
    samples = load_audio(workplace / "two.mp3")
    pipe = load_pipeline(str(workplace / "outputs/quickstart"))
    pieces = split_at_pauses(samples, pipe.processor.max_seconds)
    assert len(pieces) >= 2 and pieces[-1][1] == len(samples)
    for _, end in pieces[:-1]:  # an MP3 shifts its audio by some 50 ms
        assert any(a - 0.1 <= end / SAMPLE_RATE <= b + 0.1 for a, b in pauses), end / SAMPLE_RATE
    quick = {"decode": "ctc"}
    whole = pipe(str(workplace / "two.mp3"), **quick)
    parts = pipe([samples[start:end] for start, end in pieces], **quick)
    assert whole["text"].split() == " ".join(part["text"] for part in parts).split()
    assert whole["text"]
    assert ("truncated" in whole) == any("truncated" in part for part in parts)  # said, not hidden


def test_finished_run_is_kept(workplace, real_bases, monkeypatch, capsys):
    short = SHORT.format(train=real_bases.train, dev=real_bases.dev)
    monkeypatch.chdir(workplace)
    train(compose_recipe(["+experiments=quickstart", *shlex.split(short)]))
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("+training.lerning_rate=1", "learning_rate"),
        ("+data.minseconds=1", "min_seconds"),
        ("+modle.stack=2", "model"),
    ],
)
def test_unknown_keys_are_refused(override, hint):
    with pytest.raises(ValueError, match=f"unknown key .* did you mean '{hint}'"):
        compose_recipe([override])


# -- the documents -------------------------------------------------------------------------------


def commands() -> list[str]:
    blocks = [b for page in DOCS.values() for b in re.findall(r"```bash\n(.*?)```", page, re.S)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


# The only substitutions: a manifest of three clips where a whole test set is scored.
LONG = ("make quickstart", "+experiments=quickstart", "+experiments=hour", "tiny-audio adapt")
SERVERS = {"tiny-audio demo": 7860, "tiny-audio serve": 8000}  # they run until interrupted
APART = (*LONG, *SERVERS)


QUICK = [c for c in commands() if not any(x in c for x in APART)]


@pytest.mark.parametrize("command", [c for c in QUICK if re.fullmatch("tiny-audio [^|<>]*", c)])
def test_readme_verb(command, workplace, monkeypatch):
    """In this process; `test_readme_command` runs the command itself."""
    monkeypatch.chdir(workplace)
    others = [c for c in QUICK if "--out " in c and c != command]
    needs = [c for c in others if c.split("--out ")[1].split()[0] in command]
    for line in (*needs, command):  # `compare` reads what two other commands write
        words = shlex.split(line.replace("/test.jsonl", "/librivox.jsonl"))[1:]
        assert cli.main([word.replace("~", str(Path.home())) for word in words]) == 0


@pytest.mark.parametrize("command", [
    c if c.startswith("make") else pytest.param(c, marks=pytest.mark.long) for c in QUICK
])  # fmt: skip
def test_readme_command(command, workplace):
    if command.startswith("make "):  # `make test` is what runs this
        done = bash(f"{command.replace('make', 'make -n')}", ROOT)
    else:
        done = bash(command.replace("/test.jsonl", "/librivox.jsonl"), workplace)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("command", [
    c if "serve" in c else pytest.param(c, marks=pytest.mark.long)
    for c in commands() if c.startswith(tuple(SERVERS))
])  # fmt: skip
def test_readme_server(command, workplace):
    """It answers, OpenAI's client as the README has it gets its text, and Ctrl-C ends it."""
    port = next(p for name, p in SERVERS.items() if command.startswith(name))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # A job in the background of a shell ignores Ctrl-C, and so would what it starts.
    run = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=workplace,
                           env={**os.environ, "PATH": path}, stderr=subprocess.PIPE,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                           )  # fmt: skip
    try:
        for _ in range(600):  # long enough for a machine that is busy with other work
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.5)
        page = "docs" if port == 8000 else ""
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}").status == 200
        if "serve" in command:
            (code,) = re.findall(r"```python\n(.*?)```", DOCS["use"], re.S)
            done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True)
            assert done.returncode == 0 and done.stdout.strip(), done.stderr[-3000:]
        run.send_signal(signal.SIGINT)
        assert run.wait(300) in (0, 130)
    finally:
        run.kill()
        run.wait()


def test_readme_remote_overrides_are_accepted():
    """What the rented machine is told passes the check that is made before it is paid for."""
    config, override = re.findall(r"^remote-train .*--config (\S+) (\S+)$", DOCS["price"], re.M)[0]
    compose_recipe([f"+experiments={config}", override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=1", "overridden by stage characters: set stages.0.training"),
        ("training.lerning_rate=1", "did you mean 'learning_rate'"),
    ],
)
def test_the_quickstart_says_what_is_wrong_before_it_fetches(
    override, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TINY_AUDIO_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match=re.escape(message)) as stopped:
        quickstart.main([override])
    assert str(stopped.value).startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("early_stopping_patience=2", "needs training.load_best_model_at_end=true"),
        ("load_best_model_at_end=true stages.0.training.save_steps=250", "saving steps"),
    ],
)
def test_what_does_not_fit_is_said_before_the_encoding(override, message, real_bases, tmp_path):
    overrides = [f"data.train=[{{path: {real_bases.train}}}]", f"run.output_dir={tmp_path}"]
    cfg = compose_recipe(["+experiments=quickstart", *overrides, *f"training.{override}".split()])
    with pytest.raises(ValueError, match=message):
        train(cfg)
    assert not list(tmp_path.rglob("encoder_frames-*"))


@pytest.mark.long
@pytest.mark.parametrize(("name", "stages"), [("adapt", 1), ("hour", 2)])
def test_a_preset_goes_on_from_the_quickstarts_model(name, stages, workplace, real_bases):
    few = f"'data.train=[{{path: {real_bases.train}, sample: 20}}]' model.tune=false"
    few += f" 'data.eval=[{{path: {real_bases.dev}, sample: 2}}]'"
    few += "".join(f" stages.{i}.training.max_steps=2" for i in range(stages))
    start = "model.pretrained_model_path=outputs/quickstart"
    options = f"{start} {few} run.output_dir=outputs/{name}"
    done = bash(f"python src/train.py +experiments={name} {options}", workplace)
    assert done.returncode == 0, done.stderr[-3000:]
    tensors = load_file(workplace / "outputs" / name / WEIGHTS)
    learned = [key for key, tensor in tensors.items() if "lora_B" in key and tensor.any()]
    assert any(key.startswith("encoder.") for key in learned)


@pytest.mark.long
def test_the_quickstart_is_told_to_stop_and_saves(workplace, real_bases, tmp_path):
    """SIGTERM ends it with the code of a run that can be continued, and no stack."""
    short = (
        SHORT.format(train=real_bases.train, dev=real_bases.dev)
        + f"run.output_dir={tmp_path / 'run'}"
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.Popen(["bash", "-c", f"exec tiny-audio quickstart {short}"], text=True,
                           env={**os.environ, "PATH": path}, cwd=workplace,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    for line in run.stdout:
        if line.startswith("step     5/30"):
            break
    run.terminate()
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 75, said[-2000:]
    assert "SIGTERM: saved; the same command continues" in said and "Traceback" not in said
    assert not re.search("Loading weights|new PAD/BOS/EOS", said)  # this is not a terminal
    assert list((tmp_path / "run/characters").glob("checkpoint-*"))


def absolute(manifest: Path) -> list[dict]:
    """The rows of a manifest, with absolute paths."""
    rows = read_manifest(manifest)
    return [{**row, "audio": str(manifest.parent / row["audio"])} for row in rows]


@pytest.fixture(scope="session")
def long_run(real_bases, tmp_path_factory) -> Path:
    """A clone in which the whole `make quickstart` has run."""
    clone = tmp_path_factory.mktemp("long") / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    done = bash("make quickstart", clone)
    assert done.returncode == 0, done.stderr[-3000:]
    table = [f"{row['audio']},{row['text']}" for row in absolute(real_bases.dev)]
    (clone / "my.csv").write_text("\n".join(["audio,text", *table]) + "\n")
    return clone


@pytest.mark.long
@pytest.mark.parametrize("command", [c for c in commands() if any(x in c for x in LONG)])
def test_readme_long_command(command, long_run):
    done = bash(command, long_run)  # finished before: says so and goes on from there
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
def test_the_quickstart_recognises_speech(long_run, real_bases):
    summary = json.loads((long_run / "outputs/quickstart/summary.json").read_text())
    assert summary["wer"] < 25  # the figures: docs/log.md
    assert summary["wer"] < summary["greedy_wer"]
    assert summary["utterances"] == 110 and summary["errors"] == 0
    _, said = make_two_voices(long_run / "two.mp3", real_bases, seconds=120)
    heard = load_pipeline(str(long_run / "outputs/quickstart"))(str(long_run / "two.mp3"))
    assert "truncated" not in heard
    result = score([said], [heard["text"]])
    assert result["wer"] < summary["wer"] + 15  # a third of it is the other speaker
    assert abs(len(heard["text"].split()) / len(said.split()) - 1) < 0.15, "something is missing"


@pytest.mark.long
@pytest.mark.parametrize(("name", "code"), [("dutch", "nl"), ("czech", "cs")])
def test_another_language(tmp_path, name, code):
    """The guide's commands, one after the other; Czech is Dutch with other names."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)

    def renamed(text: str) -> str:
        text = text.replace("dutch", name).replace("Dutch", name.title())
        return re.sub(r"(?<![a-z])nl(?![a-z])", code, text)

    for group in ("data", "experiments"):
        preset = clone / f"configs/hydra/{group}/dutch.yaml"
        preset.with_stem(name).write_text(renamed(preset.read_text()))
    guide = renamed((clone / "docs/another_language.md").read_text())
    for block in re.findall(r"```bash\n(.*?)```", guide, re.S):
        done = bash(f"set -e\n{block}", clone)
        assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(next(clone.glob("outputs/eval_*/summary.json")).read_text())
    assert result["language"] == code and result["errors"] == 0 and result["utterances"] > 150
    assert result["wer"] < 50  # figures: docs/another_language.md


def test_readme_python(workplace):
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_troubleshooting_quotes_messages_that_exist():
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    rows = re.findall(r"^\| `([^`]+)` \|", DOCS["troubleshooting"], re.M)
    quoted = [part.strip() for row in rows for part in row.split("...") if " " in part.strip()]
    assert len(quoted) >= 8
    assert [part for part in quoted if part not in source] == []


@pytest.mark.long
def test_the_notebook_runs(workplace):
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True,
                          text=True, env={**os.environ, "MPLBACKEND": "agg"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hypothesis:" in done.stdout


def test_readme_quotes_the_runs_that_were_measured():
    """The table is the first run of docs/quickstart.json, the means are those of all of them."""
    runs = json.loads((ROOT / "docs/quickstart.json").read_text())["runs"]
    shown = README.split("<!-- quickstart:begin -->")[1].split("<!-- quickstart:end -->")[0]
    first, rows = runs[0], [line for line in shown.splitlines() if "[" in line]
    names = {"model": "wer", **{row: f"{row}_wer" for row in ROWS if row != "model"}}
    for row, (part, name) in zip(rows, names.items(), strict=True):
        librivox = f"librivox_{part}_wer"
        here, there = re.findall(r"([\d.]+)  \[", row)
        assert (here, there) == (f"{first[name]:.1f}", f"{first[librivox]:.1f}"), row
    low, high = (f"{first[key]:.1f}" for key in ("wer_low", "wer_high"))
    assert f"[{low}, {high}]" in rows[0]
    assert f"peak memory {first['peak_memory_gb']:.1f} GB" in shown
    after = README.split("<!-- quickstart:end -->")[1].split("## Use it")[0]
    for name in ("wer", "ngram_wer", "librivox_model_wer"):
        assert f"{sum(run[name] for run in runs) / len(runs):.1f}" in after, name


def test_console_scripts_are_verbs(monkeypatch, capsys):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    own = {"eval": "eval", "deploy-runpod": "remote deploy", "remote-train": "remote train"}
    assert set(scripts) == {"tiny-audio", *own, *dev.TASKS}
    for script in set(scripts) - {"tiny-audio"}:
        assert scripts[script] == "tiny_audio.commands.cli:alias"
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{script}", "--help"])
        with pytest.raises(SystemExit) as end:
            cli.alias()
        assert end.value.code == 0
        assert f"usage: tiny-audio {own.get(script, 'dev')}" in capsys.readouterr().out


def test_the_version_comes_from_one_place(capsys):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tiny-audio {version}\n"
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_docs_name_every_dev_task():
    for task in dev.TASKS:
        assert f"`{task}`" in DOCS["train"]
    assert cli.main(["--help"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_and_links_of_the_docs_exist(page):
    text = page.read_text()
    if page.stem != "log":  # it tells of files that are gone
        for path in re.findall(r"\b(?:docs|configs|bench|demo|src|tests)/[\w/.-]*\w", text):
            assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def test_the_figures_are_drawn_from_their_data(tmp_path):
    subprocess.run([sys.executable, "bench/figures.py", "--out", tmp_path], cwd=ROOT, check=True)
    figures = sorted((ROOT / "docs/figures").glob("*.svg"))
    assert [path.name for path in figures] == ["alignment.svg", "learning.svg"]
    for path in figures:
        assert path.read_text() == (tmp_path / path.name).read_text(), f"{path}: run `make docs`"


def test_the_site_holds_every_page_and_no_broken_link(tmp_path):
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    subprocess.run([sys.executable, "-m", "zensical", "build"], cwd=tmp_path, check=True)
    pages = {p: p.read_text() for p in (tmp_path / "site").rglob("*.html") if p.stem != "404"}
    built = {str(page.parent.relative_to(tmp_path / "site")) for page in pages}
    assert {f"docs/{page.stem}" for page in (ROOT / "docs").glob("*.md")} <= built
    for page, text in pages.items():
        for href in re.findall(r'(?:href|src)="?([^" >]+)', text):
            if not href.startswith(("http", "data:")):
                path, _, anchor = href.partition("#")
                there = (page.parent / path).resolve() if path else page
                there = there / "index.html" if there.is_dir() else there
                assert there.is_file(), f"{page}: {href}"
                assert not anchor or f'id="{anchor}"' in pages[there], f"{page}: {href}"


@pytest.mark.long
def test_poetry_installs_the_same_project(tmp_path):
    """`poetry check`, and the console scripts by `poetry run` in the environment that is active."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", "poetry>=2,<3"]
    subprocess.run(pip, check=True)
    poetry = tmp_path / "venv/bin/poetry"
    active = {"VIRTUAL_ENV": sys.prefix, "HOME": str(tmp_path)}
    assert bash(f"{poetry} check", ROOT, **active).stdout.strip().endswith("All set!")
    for script, said in (("eval", "word error rate"), ("check", "Run a task")):
        done = bash(f"{poetry} run {script} --help", ROOT, **active)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
