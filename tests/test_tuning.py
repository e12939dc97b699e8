"""The weights of decoding are those that cost the fewest expected errors."""

import json

import numpy as np
import pytest
from conftest import TEXTS, babble, write_audio, write_manifest

from tiny_audio.asr.asr_decoding import Candidate, choose
from tiny_audio.asr.asr_processing import SAMPLE_RATE
from tiny_audio.asr.asr_search import Proposal
from tiny_audio.training.data import Dropped, SpeechDataset
from tiny_audio.training.tuning import FIRST_PASS, SECOND_PASS, expected, tune

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


def test_tuning_never_costs_more_than_the_search_alone(build, tmp_path):
    processor, model = build("whisper", bridge="posteriors", lora="decoder")
    rows = []
    for i, text in enumerate(TEXTS[:4]):
        write_audio(tmp_path / f"{i}.wav", babble(1.0 + i / 4, i), SAMPLE_RATE, "pcm_s16le")
        rows.append({"audio": f"{i}.wav", "text": text.lower(), "duration": 1.0 + i / 4})
    source = {"path": str(write_manifest(tmp_path / "m.jsonl", rows))}
    data = SpeechDataset([source], processor, Dropped(), lowercase=True)
    before = dict(model.config.decoding)
    found = tune(model, processor, data)
    assert found.keys() == {"first_pass", "language_model", "decoder", "both"}
    costs = {name: choice["expected_wer"] for name, choice in found.items()}
    assert costs["both"] <= min(costs["language_model"], costs["decoder"]) + 1e-9
    settings = model.config.decoding
    for name, values in FIRST_PASS.items() | SECOND_PASS.items():
        assert settings[name] in (*values, before[name])
    assert not found["language_model"]["decoder"] and not found["decoder"]["language_model"]
    json.dumps(found)
