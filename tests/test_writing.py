"""Texts are written as the training transcripts are: capitals, marks, forms of their own."""

import json
from itertools import pairwise, product

import numpy as np
import pytest
import torch

import tiny_audio.training.train as runner
from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_pipeline import ASRPipeline
from tiny_audio.asr.asr_processing import ASRProcessor
from tiny_audio.asr.asr_writing import END, START, Writing, in_style, style_of

WRITTEN = [
    "Please hold. I'm in London.",
    "Is London calling? Please wait.",
    "Hold on, please. The line is busy - Please wait.",
    "Call the USB radio.",
]


def spoken(text: str) -> str:
    """As the character head spells it."""
    kept = "".join(x for x in text.lower() if x in "abcdefghijklmnopqrstuvwxyz' ")
    return " ".join(kept.split())


def test_texts_are_written_as_the_transcripts_are():
    writing = Writing.learn(WRITTEN, spoken)
    assert writing.write("please hold i'm in london") == "Please hold. I'm in London."
    assert writing.write("hold on please") == "Hold on, please."
    assert writing.write("call the usb radio") == "Call the USB radio."
    assert writing.write("otter please wait").startswith("Otter")  # it is in no transcript
    assert writing.write("") == ""


@pytest.mark.parametrize("text", ["please hold", "london is busy", "hold on otter"])
def test_the_best_of_all_ways_to_write_is_found(text):
    writing = Writing.learn(WRITTEN, spoken)
    words = text.split()
    found = {}
    for way in product(*(writing.choices(word) for word in words)):
        styles = [START, *(style_of(form, w) for (form, _), w in zip(way, words, strict=True)), END]
        score = sum(own for _, own in way)
        score += sum(writing.after(a, b) for a, b in pairwise(styles))
        found[" ".join(form for form, _ in way)] = score
    best = max(found, key=found.__getitem__)
    assert writing.write(text) == best


def test_writing_changes_no_word():
    writing = Writing.learn(WRITTEN, spoken)
    known = [*writing.forms, "otter", "o'clock", "x"]
    rng = np.random.default_rng(0)
    for n in range(1, 30):
        text = " ".join(rng.choice(known, n))
        written = writing.write(text)
        assert spoken(written) == text and len(written.split()) == n


@pytest.mark.parametrize("form", ["London.", "(usb)", "USB", "'tis", "iPhone,", "I", "a", "McX?"])
def test_a_form_is_its_word_in_its_style(form):
    style = style_of(form, spoken(form))
    assert "??" in style or in_style(style, spoken(form)) == form


@pytest.mark.parametrize(
    ("form", "word"), [("'em,", "'em"), ("dogs'.", "dogs'"), ("है।", "है"), ("किताबें?", "किताबें")]
)
def test_vowel_signs_and_outer_apostrophes_are_part_of_a_word(form, word):
    style = style_of(form, word)
    assert "??" not in style and in_style(style, word) == form


def test_transcripts_in_lower_case_need_no_writing():
    assert Writing.learn(["please hold", "i'm in london"], spoken) is None


def test_more_transcripts_add_to_what_is_known(tmp_path):
    first = Writing.learn(WRITTEN, spoken)
    first.save(tmp_path / "writing.json")
    again = Writing.load(tmp_path / "writing.json")
    assert (again.forms, again.following) == (first.forms, first.following)
    both = Writing.learn(["Ask Otto."], spoken, known=again)
    assert both.write("please hold") == "Please hold." and both.write("ask otto") == "Ask Otto."
    assert first.forms == again.forms, "learning changed what was known"


@torch.no_grad()
def test_every_way_to_decode_with_the_search_writes(build, clips, tmp_path):
    processor, model = build("whisper")
    pipe = ASRPipeline(model=model, processor=processor)
    plain = [pipe(clip, decode="ctc")["text"] for clip in clips]
    model.writing = Writing.learn(["The Cat sat.", "On a red Mat."] * 3, processor.spoken)
    written = [pipe(clip, decode="ctc")["text"] for clip in clips]
    assert written == [model.writing.write(text) for text in plain] != plain
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = ASRPipeline(model=ASRModel.from_pretrained(tmp_path),
                        processor=ASRProcessor.from_pretrained(tmp_path))  # fmt: skip
    for clip in clips:
        result = saved(clip, return_timestamps="word")
        assert result["text"] == pipe(clip)["text"]
        assert [word["text"].strip() for word in result["chunks"]] == result["text"].split()


def test_a_model_learns_how_its_transcripts_are_written(compose, corpus):
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    cased = corpus.with_name("cased.jsonl")
    for row in rows:
        row["text"] = row["text"].capitalize() + "."
    cased.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = runner.train(compose("data.lowercase=false", manifest=cased, steps=(2, 2)))
    loaded = ASRModel.from_pretrained(model)
    assert loaded.writing.write(rows[0]["text"][:-1].lower()) == rows[0]["text"]
    lower = runner.train(compose(steps=(2, 2), output="lower"))
    assert ASRModel.from_pretrained(lower).writing is None
    assert not (lower / "writing.json").exists()
