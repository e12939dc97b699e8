"""Using a model: any length, damage, guards, word times, the command line, handler and formats."""

import io
import json
import subprocess
import sys
import time
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import babble, split_at_pauses, tone, write_audio
from transformers import TextIteratorStreamer

from tiny_audio.asr.asr_audio import SAMPLE_RATE, AudioError, load_audio, read_audio, split_blocks
from tiny_audio.asr.asr_ctc import LAG, align, frames_needed, letter_support
from tiny_audio.asr.asr_pipeline import LEAST_FILLED, LOOP, ASRPipeline, Piece, Recording, chunks
from tiny_audio.asr.handler import EndpointHandler
from tiny_audio.commands import transcribe
from tiny_audio.commands.formats import render
from tiny_audio.errors import UserError
from tiny_audio.progress import progress_bar

# -- reading in blocks, damage -------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "codec"), [("mp3", "libmp3lame"), ("flac", "flac")])
def test_damage_in_the_middle_is_said_and_the_rest_is_read(tmp_path, pipe, suffix, codec):
    path = write_audio(tmp_path / f"a.{suffix}", babble(8.0, 1), 16_000, codec)
    whole = load_audio(path)
    data = bytearray(path.read_bytes())
    middle, many = len(data) // 2, len(data) // 20
    data[middle : middle + many] = bytes(b ^ 0x5A for b in data[middle : middle + many])
    path.write_bytes(data)
    missing: list[str] = []
    read = np.concatenate(list(read_audio(path, missing=missing)))
    assert missing and any("s" in line for line in missing)
    assert abs(len(read) - len(whole)) < 0.6 * SAMPLE_RATE  # what is lost is silence: times hold
    result = pipe(str(path))
    assert result["text"] and result["missing"] == missing


def test_a_file_that_ends_early_says_so(tmp_path, pipe):
    path = write_audio(tmp_path / "a.flac", babble(6.0, 1), 16_000, "flac")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    result = pipe(str(path))
    assert result["text"] and "6.0" in result["missing"][-1]


def test_a_file_of_which_only_the_container_states_the_length(tmp_path, pipe):
    path = write_audio(tmp_path / "a.mka", babble(12.0, 1), 16_000, "aac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "ends at 6.0 s of 12." in pipe(str(path))["missing"][-1]


@pytest.mark.parametrize("late", [0.0, 3.0])
def test_the_sound_of_a_video(tmp_path, pipe, late):
    """Where it begins later than the picture, times count from the picture all the same."""
    path = tmp_path / "film.mp4"
    samples = babble(2.0, 5)
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width = video.height = 32
        sound = out.add_stream("aac", rate=16_000, layout="mono")
        for _ in range(20):
            image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            out.mux(video.encode(image))
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = 16_000
        frame.pts, frame.time_base = round(late * 16_000), Fraction(1, 16_000)
        for packet in (*sound.encode(frame), *video.encode(None), *sound.encode(None)):
            out.mux(packet)
    assert len(load_audio(path)) == pytest.approx(2.0 * SAMPLE_RATE, abs=2048)
    result = pipe(str(path), return_timestamps="word")
    assert result["text"] and "missing" not in result
    assert result["duration"] == pytest.approx(late + 2.0, abs=0.15)


def test_blocks_of_any_size_give_the_same_pieces():
    samples = np.concatenate([babble(9.0, 2), np.zeros(8000, np.float32), babble(11.3, 3)])
    for limit in (2.0, 5.5):
        whole = split_at_pauses(samples, limit)
        for size in (160, 4_001, 70_000):
            blocks = (samples[i : i + size] for i in range(0, len(samples), size))
            parts = list(split_blocks(blocks, limit))
            assert [(at, at + len(part)) for at, part in parts] == whole
            assert np.array_equal(np.concatenate([part for _, part in parts]), samples)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_pieces_of_an_array_keep_no_copies_of_it_alive(kind):
    """Half an hour as one array took 7 GB: each piece was a view of all that came after it."""
    samples = np.tile(babble(10.0, 2), 30)
    for _, part in split_blocks(read_audio(kind(samples)), 20.0):
        owner = part if part.base is None else part.base
        assert owner.nbytes <= 22 * SAMPLE_RATE * part.itemsize


# -- forced alignment ----------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[1], [1, 2], [1, 1], [2, 1, 2], [2, 2, 1]])
@pytest.mark.parametrize("frames", [3, 5, 6])
def test_alignment_is_the_best_of_all_paths(targets, frames):
    targets = np.array(targets)
    log_probs = torch.randn(frames, 3, generator=torch.Generator().manual_seed(frames))
    log_probs = log_probs.log_softmax(-1).numpy()
    found = {}
    for path in product(range(3), repeat=frames):
        runs = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
        if [c for c in runs if c] == targets.tolist():
            found[path] = sum(log_probs[i, c] for i, c in enumerate(path))
    if frames_needed(targets) > frames:
        assert not found
        return
    best = max(found, key=found.__getitem__)
    spans, scores = align(log_probs, targets)
    said = np.zeros(frames, int)
    for (start, end), target in zip(spans, targets, strict=True):
        said[start:end] = target
    assert tuple(said) == best
    for (start, end), target, score in zip(spans, targets, scores, strict=True):
        assert score == log_probs[start:end, target].max()


def test_letters_are_heard_apart_from_the_words():
    """A misread word keeps its sure letters; noise has few and unsure ones."""
    space, rows = 4, [0, 1, 1, 0, 4, 2, 0, 2]  # the best path: 1, 2 and 2, around a space
    chances = np.full((len(rows), 5), 0.01)
    chances[np.arange(len(rows)), rows] = 0.96
    chances[1, [0, 1]] = 0.46, 0.51  # less sure than the frame after it
    chances[5, [0, 2]] = 0.47, 0.5
    log_probs, sure = np.log(chances), (0.96 * 0.5 * 0.96) ** (1 / 3)
    assert letter_support(log_probs, 3, space) == pytest.approx(sure)
    assert letter_support(log_probs, 2, space) == pytest.approx(sure)  # more than there are
    assert letter_support(log_probs, 6, space) == pytest.approx(sure / 2)
    assert letter_support(log_probs[:1], 2, space) == 0.0  # only a blank
    assert letter_support(log_probs, 3, 0) == pytest.approx((0.96**3 * 0.5) ** (1 / 4))


def test_thirty_seconds_are_aligned_in_less_than_50_ms():
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(30), 1500)).astype(np.float32)
    targets = rng.integers(1, 30, 450)
    spent = []
    for _ in range(5):
        began = time.process_time()
        align(log_probs, targets)
        spent.append(time.process_time() - began)
    assert min(spent) < 0.05


def emissions(pipe, said: list[tuple[str, int, int]], frames: int) -> np.ndarray:
    """Log-probabilities that spell words evenly from a frame to another."""
    alphabet = pipe.model.config.ctc_alphabet
    out = np.full((frames, len(alphabet) + 1), 0.01)
    out[:, 0] = 1.0
    for word, start, end in said:
        for i, letter in enumerate(word):
            at = start + i * (end - 1 - start) // max(1, len(word) - 1)
            out[at] = 0.01
            out[at, alphabet.index(ord(letter)) + 1] = 1.0
    return np.log(out / out.sum(1, keepdims=True)).astype(np.float32)


def test_word_times(pipe):
    said = [("the", 10, 20), ("red", 30, 42), ("dog", 90, 99)]
    piece = Piece(5.0, np.zeros(3 * SAMPLE_RATE, np.float32), text="the red 42 , dog 7")
    pipe._time(piece, emissions(pipe, said, 150), 0, len(piece.samples))
    assert [w["text"] for w in piece.words] == ["the", "red", "42", ",", "dog", "7"]
    by = {w["text"]: w["timestamp"] for w in piece.words}
    for word, start, end in said:
        assert by[word] == pytest.approx((5 + 0.02 * start, 5 + 0.02 * end + LAG), abs=0.021)
    assert by["red"][1] < by["42"][0] < by["42"][1] < by[","][1] < by["dog"][0] < by["7"][1] <= 8.0
    times = [t for w in piece.words for t in w["timestamp"]]
    assert times == sorted(times)
    sure = {w["text"]: w["confidence"] for w in piece.words}
    assert sure["42"] is None and sure["the"] > 0.5


@pytest.mark.parametrize("encoder", ["whisper", "hubert", "parakeet"])
@pytest.mark.parametrize("head", ["characters", "tokens", "none"])
def test_times_with_any_encoder_and_head(build, clips, encoder, head):
    processor, model = build(encoder, ctc=head != "none")
    if head == "tokens":
        model.characters = None
    elif head == "characters":
        model.ctc = None
    pipe = ASRPipeline(model=model, processor=processor)
    long = np.concatenate([np.zeros(3200, np.float32), *clips])
    if head == "none":
        with pytest.raises(ValueError, match="CTC head"):
            pipe(long, return_timestamps="word")
    result = pipe(long, return_timestamps="word" if head != "none" else True)
    times = [t for chunk in result["chunks"] for t in chunk["timestamp"]]
    assert times == sorted(times) and times[-1] <= result["duration"] + 1e-3
    assert result["duration"] == pytest.approx(len(long) / SAMPLE_RATE, abs=1e-3)
    joined = " ".join(chunk["text"] for chunk in result["chunks"])
    assert joined.split() == result["text"].split() == pipe(long)["text"].split()


def test_segments_break_at_pauses_sentences_and_length():
    def word(text, start, end):
        return {"text": text, "timestamp": (start, end), "confidence": 0.5}

    piece = Piece(0.0, np.zeros(0, np.float32))
    piece.words = [word("One", 0, 1), word("two.", 1, 2), word("Three", 2, 3), word("four", 4, 5)]
    piece.words += [word(f"w{i}", 5 + i, 6 + i) for i in range(8)]
    got = chunks([piece])
    assert [c["text"] for c in got] == ["One two.", "Three", "four w0 w1 w2 w3 w4", "w5 w6 w7"]
    assert got[0]["timestamp"] == (0, 2)
    for a, b in pairwise(got):
        assert a["timestamp"][1] <= b["timestamp"][0]


# -- guards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["okay okay okay okay okay", "I see the cat. I see the cat. I see the cat. I see the cat."],
)
def test_loops_are_found(text):
    assert LOOP.search(text)


@pytest.mark.parametrize("text", ["no no no", "the cat and the dog and the cow", "seven seven two"])
def test_what_people_say_is_no_loop(text):
    assert not LOOP.search(text)


def test_silence_is_not_decoded_and_said(pipe):
    said = {"text": "", "silent": True, "warnings": ["0.0-3.0 s: is silent and was not decoded"]}
    assert pipe(np.zeros(3 * SAMPLE_RATE, np.float32)) == said
    assert pipe(1e-6 * babble(1.0, 0), return_timestamps=True)["chunks"] == []
    assert pipe(np.zeros(160, np.float32))["silent"]  # 10 ms
    assert isinstance(pipe(tone(0.01))["text"], str)


def test_silence_around_speech_changes_only_the_times(pipe):
    """It is cut off before the encoder: digital silence, and what a 16-bit recording has of it."""
    clip, seconds = babble(1.5, 8), 1.0
    edge = np.zeros(SAMPLE_RATE // 4, np.float32)
    alone = pipe(np.concatenate([edge, clip, edge]), return_timestamps="word")
    rng = np.random.default_rng(0)
    for level in (0.0, 1e-5):
        silence = level * rng.standard_normal(round(seconds * SAMPLE_RATE)).astype(np.float32)
        around = pipe(np.concatenate([silence, clip, silence]), return_timestamps="word")
        assert around["text"] == alone["text"]
        for a, b in zip(alone["chunks"], around["chunks"], strict=True):
            shift = np.subtract(b["timestamp"], a["timestamp"])
            assert shift == pytest.approx(seconds - 0.25, abs=0.03)


def test_a_pause_within_speech_is_said_and_no_flag(pipe):
    """Only a recording without any speech is one of silence."""
    recording = Recording(None)
    recording.pieces = [Piece(0.0, np.zeros(16_000)), Piece(1.0, np.zeros(16_000), text="hello")]
    recording.pieces[0].flags = ["silent"]
    said = ["0.0-1.0 s: is silent and was not decoded"]
    assert pipe.postprocess(recording) == {"text": "hello", "warnings": said}
    recording.pieces[1].flags = ["no_speech"]  # a text that the audio does not support
    assert pipe.postprocess(recording).keys() == {"text", "warnings", "no_speech"}


def test_what_the_audio_does_not_support_is_flagged(pipe, monkeypatch):
    """Every guard speaks where the letters are hardly heard, and not where they are."""
    loops, both = ("okay okay okay okay", "say hehehehehehe"), {"repetition", "no_speech"}
    cases = [(text, *case) for text in loops for case in ((0.01, both), (0.9, set()))]
    cases += [(loops[0], 0.4, {"repetition"}), ("okay then", 0.4, set())]
    cases += [("it costs 1000000", 0.4, set()), ("दादा दादा", 0.4, set())]  # no loops
    for said, confidence, flags in cases:

        def timed(piece, *args, text=said, sure=confidence):
            piece.text, piece.confidence, piece.support = text, sure, 0.9 if sure > 0.1 else 0.1

        monkeypatch.setattr(pipe, "_time", timed)
        result = pipe(babble(1.5, 3))
        assert both & result.keys() == flags
        assert bool(flags) == any("over and over" in line for line in result.get("warnings", []))


def test_the_level_does_not_matter(pipe):
    """Down to -70 dBFS: what is faint is decoded like the rest."""
    clip = babble(2.0, 5)
    whole = pipe(clip)
    assert whole["text"]
    for gain in (1e-3, 0.03, 3.0):
        assert pipe(gain * clip)["text"] == whole["text"]


def test_a_limit_of_tokens_is_flagged_where_it_cuts(pipe, monkeypatch):
    clip, alone = babble(1.5, 4), {"decode": "generate"}
    whole = pipe(clip, **alone)["text"]
    cut = pipe(clip, **alone, generate_kwargs={"max_new_tokens": 2})
    assert cut["truncated"] and whole.startswith(cut["text"]) and cut["text"] != whole
    monkeypatch.setattr(pipe.model.generation_config, "max_new_tokens", 2)
    assert pipe(clip, **alone) == cut
    with pytest.raises(ValueError, match="generate_kwargs need decode='generate'"):
        pipe(clip, generate_kwargs={"max_new_tokens": 2})


def test_clips_are_encoded_with_little_padding_on_a_cpu(pipe, monkeypatch):
    groups, encode = [], type(pipe.model).encode

    def watched(self, input_features, input_features_mask, encoded=False):
        groups.append(input_features_mask.sum(1).tolist())
        return encode(self, input_features, input_features_mask, encoded)

    monkeypatch.setattr(type(pipe.model), "encode", watched)
    clips = [babble(seconds, 3) for seconds in (0.5, 2.0, 0.6, 1.9, 0.55, 1.2, 1.8)]
    together = pipe(clips)
    assert sorted(len(group) for group in groups) == [1, 3, 3]
    assert all(min(group) >= LEAST_FILLED * max(group) for group in groups)
    assert together == [pipe(clip) for clip in clips]


def test_out_of_memory_makes_batches_smaller(pipe, monkeypatch, caplog):
    encode, limit = type(pipe.model).encode, 2.5

    def small(self, input_features, input_features_mask, encoded=False):
        if not encoded and input_features_mask.numel() > limit * 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, input_features, input_features_mask, encoded)

    monkeypatch.setattr(type(pipe.model), "encode", small)
    alone = pipe(babble(1.1, 4))
    assert pipe([babble(1.1, 4)] * 5, batch_seconds=60.0) == [alone] * 5
    assert "batches have" in caplog.text
    too_long = r"a piece of 3\.5 s does not fit; lower max_seconds"
    with pytest.raises(torch.OutOfMemoryError, match=too_long):
        pipe(babble(3.5, 4))


# -- the pipeline's calls ------------------------------------------------------------------------


def test_pieces_stream_and_call_agree(pipe):
    long = np.concatenate([babble(5.0, 1), np.zeros(9000, np.float32), babble(6.0, 2)])
    whole = pipe(long)["text"]
    assert " ".join(p.text for p in pipe.pieces(long) if p.text) == whole
    seconds: list[float] = []
    several = pipe([long, tone(1.0), long], progress=seconds.append)
    assert [several[0]["text"], several[2]["text"]] == [whole, whole]
    assert sum(seconds) == pytest.approx((2 * len(long) + SAMPLE_RATE) / SAMPLE_RATE)


def test_unknown_call_arguments_are_refused(pipe):
    with pytest.raises(ValueError, match="return_timestamps"):
        pipe(tone(1.0), return_timestamp=True)
    with pytest.raises(ValueError, match="'word'"):
        pipe(tone(1.0), return_timestamps="char")


def test_a_limit_of_length(pipe):
    with pytest.raises(AudioError, match="limit of 5 s"):
        pipe(babble(9.0, 0), limit_seconds=5)


def test_words_appear_as_they_are_decoded(pipe, clips):
    inputs = pipe.processor(clips[1])
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, timeout=30)
    ids = pipe.model.generate(**inputs, streamer=streamer, min_new_tokens=9)
    words = list(streamer)
    assert len(words) > 3
    assert pipe.processor.tokenizer.decode(ids[0]) == "".join(words)


def test_rounds_do_not_change_the_text(pipe, monkeypatch, clips):
    expected = [r["text"] for r in pipe(clips)]
    monkeypatch.setattr("tiny_audio.asr.asr_pipeline.READ_AHEAD", 3)
    assert [r["text"] for r in pipe(clips)] == expected
    monkeypatch.setattr("tiny_audio.asr.asr_pipeline.READ_AHEAD", 1)
    mixed = pipe([clips[0], b"junk", clips[1]], skip_errors=True)
    assert not list(pipe.pieces(b"junk", skip_errors=True))
    assert [r["text"] for r in mixed] == [expected[0], "", expected[1]] and "error" in mixed[1]


# -- files of transcripts, command line ----------------------------------------------------------


def test_formats():
    result = {
        "text": "hello there",
        "chunks": [
            {"text": "hello", "timestamp": (0.0, 1.5)},
            {"text": "there", "timestamp": (3661.25, 3662.0)},
        ],
    }
    assert render(result, "txt") == "hello there\n"
    assert render(result, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\nhello\n\n2\n01:01:01,250 --> 01:01:02,000\nthere\n"
    )
    assert render(result, "vtt").startswith(
        "WEBVTT\n\n1\n00:00:00.000 --> 00:00:01.500\nhello\n\n2\n01:01"
    )
    assert json.loads(render(result, "json"))["chunks"][1]["text"] == "there"
    with pytest.raises(ValueError, match="one of txt, srt, vtt, json, not 'lrc'"):
        render(result, "lrc")


@pytest.fixture
def files(tmp_path) -> list[str]:
    paths = [
        write_audio(tmp_path / "talk.mp3", babble(1.2, 1), 44_100, "libmp3lame"),
        write_audio(tmp_path / "meeting.m4a", babble(1.4, 2), 22_050, "aac"),
    ]
    return list(map(str, paths))


def test_command_line_writes_subtitles_and_continues(model_folder, files, tmp_path, capsys, pipe):
    out = tmp_path / "out"
    run = [*files, "--model", str(model_folder), "--format", "srt", "--output-dir", str(out)]
    (tmp_path / "broken.wav").write_text("no audio")
    assert transcribe.main([str(tmp_path / "broken.wav"), *run]) == 1
    assert "broken.wav: not readable" in capsys.readouterr().err
    expected = pipe(files, return_timestamps=True)
    assert [(out / f"{n}.srt").read_text() for n in ("talk", "meeting")] == [
        render(result, "srt") for result in expected
    ]
    (out / "talk.srt").write_text("kept")
    (out / "meeting.srt").unlink()
    assert transcribe.main(run) == 0
    assert "1 of 2 already done" in capsys.readouterr().err
    assert (out / "talk.srt").read_text() == "kept" and (out / "meeting.srt").exists()
    assert sorted(p.name for p in out.iterdir()) == ["meeting.srt", "talk.srt"]


def test_several_files_as_json_are_json_lines(model_folder, files, tmp_path, capsys, pipe):
    (tmp_path / "broken.wav").write_text("no audio")
    names = [*files, str(tmp_path / "broken.wav")]
    assert transcribe.main([*names, "--model", str(model_folder), "--format", "json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.pop("file") for row in rows] == names
    assert [row["text"] for row in rows[:2]] == [result["text"] for result in pipe(files)]
    assert "not readable" in rows[2]["error"]


def test_channels_that_cancel_are_said(tmp_path, pipe, caplog):
    clip = babble(2.0, 5)
    expected = pipe(clip)["text"]
    path = tmp_path / "inverted.wav"
    soundfile.write(path, np.stack([clip, -clip], 1), SAMPLE_RATE, subtype="FLOAT")
    for source in (str(path), np.stack([clip, -clip])):
        result = pipe(source)
        assert result["text"] == expected
        assert "the channels cancel each other: the louder one is used" in result["warnings"]
    assert np.abs(load_audio(path) - clip).max() < 1e-6
    assert f"{path}: the channels cancel" in caplog.text
    beside = pipe(np.stack([clip, np.zeros_like(clip)]))
    assert beside["text"] == expected and "warnings" not in beside


def test_command_line_refuses_two_inputs_for_one_output(files, tmp_path, capsys):
    other = str(Path(files[0]).with_suffix(".wav"))
    for run, says in (
        ([files[0], other, "--output-dir", str(tmp_path)], "the same output file"),
        ([*files, "--format", "srt"], "--output-dir"),
    ):
        with pytest.raises(SystemExit, match="2"):
            transcribe.main(run)
        assert says in capsys.readouterr().err


def test_command_line_reads_stdin(model_folder, files, capsys, monkeypatch, pipe):
    data = io.BytesIO(Path(files[1]).read_bytes())
    monkeypatch.setattr("sys.stdin", type("", (), {"buffer": data}))
    assert transcribe.main(["-", "--model", str(model_folder), "--format", "json", "--words"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(json.dumps(pipe(files[1], return_timestamps="word")))


def test_a_wrong_model_folder_is_named(tmp_path, files):
    with pytest.raises(UserError, match=r"config\.json"):
        transcribe.main([files[0], "--model", str(tmp_path)])


def test_words_to_prefer_are_a_list(pipe, caplog):
    clip = babble(1.1, 4)
    assert pipe(clip, decoding={"words": None}) == pipe(clip)
    with pytest.raises(ValueError, match="words must be a list, not 'Agent'"):
        pipe(clip, decoding={"words": "Agent"})
    pipe(clip, decoding={"words": ["cat"]}, decode="generate")
    assert "no words are preferred" in caplog.text


def test_terms_of_a_windows_editor(tmp_path, monkeypatch):
    (tmp_path / "terms.txt").write_bytes("\ufeffDashwood\r\nJean-Luc\r\n".encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert transcribe.read_terms("~/terms.txt") == ["Dashwood", "Jean-Luc"]


def test_a_model_of_another_kind_is_named(tiny_bases, files):
    with pytest.raises(UserError, match="is a hubert model, which only `tiny-audio eval` takes"):
        transcribe.main([files[0], "--model", str(tiny_bases / "hubert")])


def test_a_long_task_logs_a_line_now_and_then(capsys):
    with progress_bar(total=10_000, desc="encoding", unit="clip") as bar:
        for _ in range(10_000):
            bar.update(1)
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) <= 4 and "encoding: 100 %, 10000 of 10000" in "".join(lines)


# -- the Hub endpoint's handler ------------------------------------------------------------------


def test_handler_gives_the_pipelines_result(model_folder, files, pipe):
    handler = EndpointHandler(str(model_folder))
    expected = pipe(files[0])
    data = Path(files[0]).read_bytes()
    assert handler({"inputs": data}) == expected
    words = handler({"inputs": data, "parameters": {"return_timestamps": "word"}})
    assert words["chunks"] == pipe(files[0], return_timestamps="word")["chunks"]
    with pytest.raises(ValueError):
        handler({"inputs": "/etc/passwd"})
    with pytest.raises(ValueError, match="unknown key"):
        handler({"inputs": data, "parameters": {"num_beam": 2}})


def test_handler_runs_from_its_folder_without_this_package(model_folder, files, pipe):
    code = "import sys, runpy; sys.modules['tiny_audio'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    run = [sys.executable, "-c", code, str(model_folder / "handler.py"), files[0]]
    done = subprocess.run(run, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["text"] == pipe(files[0])["text"]
