"""A trained model is adapted to clips of one's own, and measured before and after."""

import json
import shutil

import pytest
from conftest import TEXTS, babble, write_audio, write_manifest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_saving import WEIGHTS
from tiny_audio.commands import adapt
from tiny_audio.training import train as runner
from tiny_audio.training.manifests import DataError, Example

NEW_WORD = "adlerhorst"


@pytest.fixture(scope="module")
def trained(compose_in, tmp_path_factory):
    """The folder of a tiny trained model."""
    return runner.train(compose_in(tmp_path_factory.mktemp("trained"), steps=(2, 2)))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A manifest of 52 short clips of 13 texts, one of them with a word that is new."""
    folder, rows = tmp_path_factory.mktemp("own"), []
    for i, text in enumerate([*TEXTS, f"call {NEW_WORD}"] * 4):
        audio = write_audio(folder / f"{i}.wav", babble(2.0, i), 16_000, "pcm_s16le")
        rows.append({"id": f"c{i}", "audio": str(audio), "text": text, "duration": 2.0})
    return write_manifest(folder / "own.jsonl", rows)


def clips(speakers: list[str | None], texts: list[str]) -> list[Example]:
    return [
        Example(f"c{i}", "x.wav", text, 1.0, speaker=speaker)
        for i, (speaker, text) in enumerate(zip(speakers, texts, strict=True))
    ]


def test_the_model_is_measured_before_and_after(trained, own, tmp_path, capsys):
    out = tmp_path / "adapted"
    arguments = [str(trained), "--data", str(own), "--out", str(out), "--steps", "3"]
    assert adapt.main(arguments) == 0
    said = capsys.readouterr().out
    assert "your held-out clips" in said and "old clips" in said
    for when in ("before", "after"):
        assert json.loads((out / f"{when}0" / "summary.json").read_text())["utterances"] >= 10
    before, after = ASRModel.from_pretrained(trained), ASRModel.from_pretrained(out / "model")
    assert NEW_WORD not in before.ngram.words and NEW_WORD in after.ngram.words
    assert {*before.ngram.words} <= {*after.ngram.words}
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in {*old} & {*new} if not old[name].equal(new[name])}
    assert changed and all(name.startswith("characters.") for name in changed)
    learned = {name for name in {*new} - {*old} if "lora_B" in name and new[name].any()}
    assert learned and all(name.startswith("encoder.") for name in learned)
    assert adapt.main(arguments) == 0  # nothing is trained twice
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was made from other clips or options"):
        adapt.main([*arguments[:-1], "2"])


def test_no_text_and_no_speaker_is_on_both_sides():
    texts = [f"text {i % 40}" for i in range(120)]
    kept, held_out = adapt.hold_out(clips([None] * 120, texts), seed=0)
    assert not {c.text for c in kept} & {c.text for c in held_out} and len(held_out) >= 24
    speakers = [f"s{i % 6}" for i in range(120)]
    kept, held_out = adapt.hold_out(clips(speakers, texts), seed=0)
    assert not {c.speaker for c in kept} & {c.speaker for c in held_out}
    assert len(kept) + len(held_out) == 120


def test_one_who_speaks_most_of_the_clips_is_not_held_out():
    names = ["anna", "ben", "carl", "dora"]
    for main in ("aaron", "me", "zoe"):
        speakers = [main] * 200 + names * 5
        said = clips(speakers, [f"text {i}" for i in range(220)])
        kept, held_out = adapt.hold_out(said, seed=0)
        assert {c.speaker for c in kept} == {main} and {c.speaker for c in held_out} == {*names}


@pytest.mark.parametrize("texts", [["one", "two"], ["the same"] * 60])
def test_too_few_clips_are_refused(texts):
    with pytest.raises(DataError, match="too few to hold out 10: record more, or name"):
        adapt.hold_out(clips([None] * len(texts), texts), seed=0)


def test_a_folder_that_is_no_trained_model_is_one_line(own, tmp_path):
    with pytest.raises(SystemExit, match="holds no training_config"):
        adapt.main([str(tmp_path), "--data", str(own), "--out", str(tmp_path / "out")])


def test_a_command_that_failed_can_be_corrected(trained, own, tmp_path):
    out = tmp_path / "out"
    arguments = [str(trained), "--data", str(own), "--out", str(out), "--steps", "1"]
    for wrong, said in (
        (["--device", "cuda:99"], "no device"),
        (["--keep", str(tmp_path / "gone.jsonl")], "gone.jsonl"),
    ):
        with pytest.raises(SystemExit, match=said):
            adapt.main([*arguments, *wrong])
    with pytest.raises(SystemExit, match="holds no training_config"):
        adapt.main([str(tmp_path / "typo"), *arguments[1:]])
    assert adapt.main(arguments) == 0


def test_a_model_of_a_large_recipe_is_adapted(trained, own, tmp_path):
    """It was streamed and stopped early, and its list of words is on another machine."""
    model = shutil.copytree(trained, tmp_path / "large")
    recipe = OmegaConf.load(model / "training_config.yaml")
    recipe.training.update({"early_stopping_patience": 10, "load_best_model_at_end": True})
    recipe.data.update({"streaming": True, "words": str(tmp_path / "gone.tsv")})
    OmegaConf.save(recipe, model / "training_config.yaml")
    out = tmp_path / "adapted"
    arguments = [str(model), "--data", str(own), "--out", str(out), "--steps", "1"]
    assert adapt.main(arguments) == 0
    weights = load_file(model / WEIGHTS)
    weights["projector.input_norm.weight"] *= 2
    save_file(weights, model / WEIGHTS)  # the model was trained again
    with pytest.raises(SystemExit, match="was made from other clips or options"):
        adapt.main(arguments)


def test_clips_inside_a_table_are_refused(trained, own, tmp_path):
    audio = {"bytes": b"RIFF", "path": "a.wav"}
    with pytest.raises(DataError, match="needs a manifest of audio files"):
        adapt.write_clips([Example("a", audio, "the cat", 1.0)], tmp_path / "train.jsonl")
