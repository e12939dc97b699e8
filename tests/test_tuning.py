"""The weights of decoding are those that cost the fewest expected errors."""

import json

import numpy as np
import pytest
from conftest import TEXTS, babble, write_audio, write_manifest

from tiny_audio.asr.asr_audio import SAMPLE_RATE
from tiny_audio.asr.asr_decoding import Candidate, choose
from tiny_audio.asr.asr_search import Proposal
from tiny_audio.training.checks import Dropped
from tiny_audio.training.data import SpeechDataset
from tiny_audio.training.tuning import TRIED, expected, tune

NEUTRAL = {"prior": 1.0, "decoder": 0.0, "language_model": 0.0, "decoder_word": 0.0}


def test_expected_errors_by_hand():
    scores, errors = np.log([0.5, 0.3, 0.2]), np.array([0, 1, 5])
    assert expected(scores + 7, errors) == pytest.approx(0.3 + 1.0)
    assert expected(np.array([-3.0]), np.array([2])) == 2.0


def test_parts_add_up_to_the_score():
    some = [
        Candidate(Proposal("go on", -3.0, -7.0), -5.0, -11.0),
        Candidate(Proposal("gone", -2.0, -9.0), -6.0, -8.0),
    ]
    weights = {"prior": 0.4, "decoder": 0.3, "language_model": 0.6, "decoder_word": 1.5}
    assert some[0].score(weights) == pytest.approx(-3 - 0.4 * 7 - 0.3 * 5 - 0.6 * 11 + 1.5 * 2)
    assert some[1].score(weights) == pytest.approx(-2 - 0.4 * 9 - 0.3 * 6 - 0.6 * 8 + 1.5)
    assert choose(some, NEUTRAL) == "go on"
    assert choose(some, {**NEUTRAL, "language_model": 2.0}) == "gone"


def test_tuning_takes_the_weights_of_the_better_decoder(build, tmp_path):
    processor, model = build("whisper", bridge="posteriors", lora="decoder")
    rows = []
    for i, text in enumerate(TEXTS[:4]):
        write_audio(tmp_path / f"{i}.wav", babble(1.0 + i / 4, i), SAMPLE_RATE, "pcm_s16le")
        rows.append({"audio": f"{i}.wav", "text": text.lower(), "duration": 1.0 + i / 4})
    source = {"path": str(write_manifest(tmp_path / "m.jsonl", rows))}
    data = SpeechDataset([source], processor, Dropped(), lowercase=True)
    before = dict(model.config.decoding)
    found = tune(model, processor, data)
    assert found.keys() == {"language_model", "decoder"}
    best = min(found["language_model"], found["decoder"], key=lambda way: way["expected_wer"])
    settings = model.config.decoding
    assert settings == {**before, **{name: best[name] for name in TRIED}}
    for name, values in TRIED.items():
        assert best[name] in (0.0, *values)
    assert not found["language_model"]["decoder"] and not found["decoder"]["language_model"]
    json.dumps(found)
