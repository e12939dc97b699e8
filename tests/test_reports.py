"""What people report of other tools: each was wrong here once."""

import errno
import gzip
import io
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import babble, write_audio, write_manifest
from datasets import Dataset
from safetensors.torch import load_file
from transformers.pipelines.pt_utils import KeyDataset

from tiny_audio.asr.asr_audio import SAMPLE_RATE, AudioError, load_audio, read_audio
from tiny_audio.asr.asr_config import ASRConfig
from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_pipeline import ASRPipeline
from tiny_audio.asr.asr_saving import NGRAM, WEIGHTS
from tiny_audio.commands.formats import render
from tiny_audio.commands.transcribe import main as transcribe
from tiny_audio.errors import UserError
from tiny_audio.training import train as runner
from tiny_audio.training.checks import Dropped
from tiny_audio.training.data import Clips
from tiny_audio.training.manifests import DataError, Reader
from tiny_audio.training.run_folder import last_checkpoint, run_lock

# -- audio ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels", [8, *(pytest.param(n, marks=pytest.mark.long) for n in (9, 16))]
)
def test_recordings_of_many_channels(channels):
    """In a process of its own: it used to be a segmentation fault."""
    file = io.BytesIO()
    wave = 0.1 * np.arange(1, channels + 1)[None] / channels * np.ones((SAMPLE_RATE, 1))
    soundfile.write(file, wave, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    code = "import sys; from tiny_audio import load_audio; "
    code += "print(load_audio(sys.stdin.buffer.read()).mean())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=file.getvalue(), capture_output=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) == pytest.approx(wave.mean(), rel=1e-3)


def test_the_default_track_of_a_video_is_read(tmp_path):
    path = tmp_path / "two.mkv"
    times = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    with av.open(str(path), "w") as container:
        tracks = [container.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono")
                  for _ in range(2)]  # fmt: skip
        tracks[0].disposition = av.stream.Disposition(0)
        tracks[1].disposition = av.stream.Disposition.default
        for track, hertz in zip(tracks, (300, 900), strict=True):
            tone = (8000 * np.sin(2 * np.pi * hertz * times)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(tone[None], "s16", "mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, 0
            container.mux(track.encode(frame))
    notes: list[str] = []
    samples = np.concatenate(list(read_audio(str(path), notes=notes)))
    loudest = np.abs(np.fft.rfft(samples)).argmax() * SAMPLE_RATE / len(samples)
    assert loudest == pytest.approx(900, abs=5)
    assert notes == ["it has 2 audio tracks: one is used"]


def test_inputs_of_unusual_types(tmp_path):
    samples = babble(0.5, 0)
    wav = tmp_path / "a.wav"
    write_audio(wav, samples, SAMPLE_RATE, "pcm_s16le")
    data, same = wav.read_bytes(), load_audio(wav)
    for form in (bytearray(data), memoryview(data), io.BytesIO(data)):
        assert np.array_equal(load_audio(form), same)
    array = torch.from_numpy(samples)
    assert np.allclose(load_audio(array.bfloat16()), samples, atol=0.01)
    assert np.allclose(load_audio({"array": samples.tolist(), "sampling_rate": 16_000}), samples)
    for bad in ("16000", -1, 0):
        with pytest.raises(AudioError, match="sampling_rate must be a positive number"):
            load_audio({"array": samples, "sampling_rate": bad})
    with pytest.raises(AudioError, match="a float is not audio"):
        load_audio(0.5)


# -- the pipeline --------------------------------------------------------------------------------


def test_open_files_and_columns_are_inputs(pipe, tmp_path):
    paths = []
    for i in range(2):
        paths.append(str(tmp_path / f"{i}.wav"))
        write_audio(Path(paths[-1]), babble(0.8 + i, i), SAMPLE_RATE, "pcm_s16le")
    texts = [pipe(path)["text"] for path in paths]
    with Path(paths[0]).open("rb") as file:
        assert pipe(file)["text"] == texts[0]
    assert pipe(io.BytesIO(Path(paths[1]).read_bytes()))["text"] == texts[1]
    rows = Dataset.from_dict({"audio": paths})
    for column in (rows["audio"], KeyDataset(rows, "audio"), tuple(paths)):
        assert [result["text"] for result in pipe(column)] == texts


def test_threads_may_share_a_pipeline(build):
    """The decoder's LoRA is off while texts are scored without it: never under another thread."""
    processor, model = build("whisper")
    inside = threading.Semaphore(1)
    original = model.encode

    def encode(*args, **kwargs):
        assert inside.acquire(blocking=False), "two threads decode at once"
        threading.Event().wait(0.02)
        inside.release()
        return original(*args, **kwargs)

    model.encode = encode
    shared = ASRPipeline(model=model, processor=processor)
    clips = [babble(0.6 + i / 10, i) for i in range(6)]
    with ThreadPoolExecutor(3) as pool:
        many = [result["text"] for result in pool.map(shared, clips)]
    assert many == [shared(clip)["text"] for clip in clips]


def test_loading_arguments_of_other_models(model_folder):
    model = ASRModel.from_pretrained(
        model_folder, low_cpu_mem_usage=True, use_safetensors=True, device_map={"": "cpu"}
    )
    assert model.device.type == "cpu"


def test_device_0_is_not_the_cpu(model_folder):
    if torch.accelerator.is_available():
        assert ASRModel.from_pretrained(model_folder, device_map={"": 0}).device.type != "cpu"
    else:
        with pytest.raises((RuntimeError, AssertionError)):
            ASRModel.from_pretrained(model_folder, device_map={"": 0})


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_weights_are_one_line(model_folder, tmp_path, content, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(model_folder).iterdir():
        (folder / path.name).symlink_to(path)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(OSError, match=r"is not a valid weights file.*git lfs pull"):
        ASRModel.from_pretrained(folder)
    with pytest.raises(UserError, match="not a valid weights file"):
        transcribe(["a.wav", "--model", str(folder)])


# -- the command line ----------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_one_line(model_folder):
    for device in ("cuda", "gpu0"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(UserError, match=f"no device '{device}' here"):
            transcribe(["a.wav", "--model", str(model_folder), "--device", device])


def test_a_reader_that_leaves_is_no_stack(model_folder, tmp_path):
    path = tmp_path / "a.wav"
    write_audio(path, babble(0.8, 0), SAMPLE_RATE, "pcm_s16le")
    program = f"{sys.executable} -c 'from tiny_audio.commands.cli import main; exit(main())'"
    command = f"{program} transcribe {path} {path.name} --model {model_folder} | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_an_output_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit):
        transcribe(["a.wav", "--output-dir", str(tmp_path / "taken")])
    assert "File exists" in capsys.readouterr().err


def test_subtitles_keep_their_form():
    chunk = {"text": "a < b & c\n\nd --> e", "timestamp": (0.0, 360_001.5)}
    assert "a &lt; b &amp; c d -&gt; e" in render({"chunks": [chunk]}, "vtt")
    assert "a < b & c d -> e" in render({"chunks": [chunk]}, "srt")
    assert "100:00:01,500" in render({"chunks": [chunk]}, "srt")


# -- data ----------------------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path, build):
    processor, _ = build("whisper")
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": "none.wav", "text": "go"}])
    clips = Clips(processor, Dropped(tmp_path / "dropped.jsonl"))
    assert not list(clips.admitted({"path": str(manifest)}))
    assert f"{tmp_path}/none.wav" in (tmp_path / "dropped.jsonl").read_text()


@pytest.mark.parametrize("said", ["00:00:01", "nan", float("inf"), [1]])
def test_a_duration_that_is_no_number_names_its_row(tmp_path, said):
    rows = [{"audio": "a.wav", "text": "go", "duration": 1.0}]
    rows += [{"audio": "a.wav", "text": "go", "duration": said}]
    reader = Reader({"path": str(write_manifest(tmp_path / "m.jsonl", rows))})
    reader.read()
    with pytest.raises(DataError, match=r"m\.jsonl, row 2: duration .* is not a number of seconds"):
        reader.read()


def test_a_stretch_of_a_recording_is_no_clip(tmp_path):
    """The rows of NeMo's manifests may name a stretch by its offset."""
    rows = [{"audio_filepath": "a.wav", "text": "go", "offset": x, "duration": 1} for x in (0, 9.5)]
    reader = Reader({"path": str(write_manifest(tmp_path / "m.jsonl", rows))})
    assert reader.read().duration == 1.0
    with pytest.raises(DataError, match=r"m\.jsonl, row 2: offset is not supported"):
        reader.read()


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_other_encodings_name_the_file(tmp_path, encoding, suffix):
    text = "audio,text\na.wav,é\n" if suffix == "csv" else '{"audio": "a.wav", "text": "é"}\n'
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=rf"m\.{suffix}.*(UTF-8|utf-8)"):
        iter(Reader({"path": str(path)}).read, None).__next__()


def test_a_table_without_rows_is_named(tmp_path):
    (tmp_path / "empty.csv").write_text("audio,text\n")
    with pytest.raises(DataError, match=r"empty\.csv"):
        if Reader({"path": str(tmp_path / "empty.csv")}).read() is None:
            raise DataError("empty.csv: no rows")


def test_fewer_samples_than_one_are_refused(build):
    processor, _ = build("whisper")
    with pytest.raises(DataError, match="max_train_samples=-1"):
        Clips(processor, Dropped(), max_train_samples=-1)


# -- training ------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(compose, tmp_path):
    cfg = compose(steps=(1, 1))
    with run_lock(Path(cfg.run.output_dir)), pytest.raises(ValueError, match="another run"):
        runner.train(cfg)
    runner.train(cfg)  # it was let go


def test_a_checkpoint_that_cannot_be_read_now_is_not_deleted(tmp_path, monkeypatch):
    """A network disk may fail for a moment."""
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()  # not ours
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(Path, "read_text", fail)
        last_checkpoint(tmp_path)
    (tmp_path / "checkpoint-10/trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-10").exists()


def test_a_model_to_start_from_is_looked_for_before_anything_is_read(compose, tmp_path):
    cfg = compose(steps=(1, 1))
    cfg.model.pretrained_model_path = "~/none"
    with pytest.raises(ValueError, match=f"{Path.home()}/none: no trained model is there"):
        runner.train(cfg)
    assert not Path(cfg.run.output_dir).exists()


def test_a_home_in_the_output_folder(compose, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cfg = compose(steps=(1, 1))
    cfg.run.output_dir = "~/there"
    assert runner.train(cfg) == tmp_path / "there"
    assert not (tmp_path / "~").exists()


def test_a_tracker_that_is_not_installed_is_one_line(compose):
    with pytest.raises(ValueError, match=r"report_to.*comet_ml.*not installed"):
        runner.train(compose("training.report_to=comet_ml", steps=(1, 1)))


def test_transcripts_that_changed_under_a_run_are_refused(compose, corpus, tmp_path):
    """The rows of the character head would mean other letters."""
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for row in rows:
        row["audio"] = str(corpus.parent / row["audio"])
    manifest = write_manifest(tmp_path / "mine.jsonl", rows)
    output = runner.train(compose("training.save_steps=2", steps=(4, 1), manifest=manifest))
    stage = output / "align"
    for path in (output / "finished.json", stage / "final" / "finished.json"):
        path.unlink()
    ngram = gzip.decompress((stage / "checkpoint-4" / NGRAM).read_bytes())
    before = ASRConfig.from_pretrained(stage / "checkpoint-4")
    changed = [{**row, "text": row["text"].replace("o", "ž")} for row in rows]
    write_manifest(manifest, changed)
    with pytest.raises(ValueError, match=r"checkpoint-4 does not know: ž .*fresh=true"):
        runner.train(compose("training.save_steps=2", steps=(4, 1), manifest=manifest))
    fewer = [{**row, "text": row["text"].replace("o", "a")} for row in rows]
    write_manifest(manifest, fewer)
    runner.train(compose("training.save_steps=2", steps=(5, 1), manifest=manifest))
    after = ASRConfig.from_pretrained(stage / "final")
    assert before.ctc_alphabet == after.ctc_alphabet
    assert gzip.decompress((stage / "final" / NGRAM).read_bytes()) == ngram


def test_a_run_that_stopped_early_is_not_continued(compose):
    overrides = ["training.load_best_model_at_end=true", "training.early_stopping_patience=2",
                 "training.metric_for_best_model=loss", "training.eval_strategy=steps",
                 "training.eval_steps=1", "training.save_steps=1"]  # fmt: skip
    cfg = compose(*overrides, steps=(12, 1), learning_rate=0.5)
    cfg.stages = cfg.stages[:1]
    output = runner.train(cfg)
    stopped = json.loads((output / "align/final/finished.json").read_text())["steps"]
    assert stopped < 12
    weights = load_file(output / "align/final" / WEIGHTS)
    for path in (output / "finished.json", output / "align/final/finished.json"):
        path.unlink()
    runner.train(cfg)
    again = load_file(output / "align/final" / WEIGHTS)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
