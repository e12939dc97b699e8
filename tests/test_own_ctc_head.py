"""A fine-tuned CTC encoder brings its own head: the model spells before its first step."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WAVEFORM_SHAPE, build_asr
from safetensors.torch import load_file, save_file
from transformers import (
    HubertConfig,
    HubertForCTC,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
)

from tiny_audio.asr.asr_decoding import transcribe
from tiny_audio.asr.asr_encoder import UNKNOWN_LOGIT, read_ctc_head
from tiny_audio.asr.asr_modeling import ASRModel

CLASSES = {
    "hubert": (HubertForCTC, HubertConfig),
    "wav2vec2": (Wav2Vec2ForCTC, Wav2Vec2Config),
    "wavlm": (WavLMForCTC, WavLMConfig),
}
SYMBOLS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVKXJQZ"]  # no apostrophe


@pytest.fixture(scope="module", params=list(CLASSES))
def base(request, tmp_path_factory) -> Path:
    """A tiny fine-tuned encoder with its vocabulary, as `facebook/hubert-xlarge-ls960-ft` is."""
    model_class, config_class = CLASSES[request.param]
    folder = tmp_path_factory.mktemp("ctc") / request.param
    torch.manual_seed(0)
    config = config_class(**WAVEFORM_SHAPE, vocab_size=len(SYMBOLS), pad_token_id=0)
    model = model_class(config)
    model.lm_head.weight.data.mul_(20)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(SYMBOLS)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    return folder


def own_text(base: Path, features: torch.Tensor) -> str:
    """What the base model itself reads, by its greatest logits."""
    model = CLASSES[base.name][0].from_pretrained(base).eval()
    with torch.no_grad():
        logits = model(features).logits
    logits[..., 1:4] = -1e9  # <s>, </s> and <unk> are no sounds
    return Wav2Vec2CTCTokenizer.from_pretrained(base).batch_decode(logits.argmax(-1))[0].lower()


def test_an_untrained_model_spells_as_its_encoder_did(base, tiny_bases, caplog):
    processor, model = build_asr(base, tiny_bases / "decoder", fresh=True)
    rng = np.random.default_rng(0)
    read = set()
    for seconds in (0.4, 1.0, 2.5):
        batch = processor(rng.standard_normal(int(16_000 * seconds)).astype(np.float32))
        hidden, steps = model.encode(batch.input_features, batch.input_features_mask)
        best = model.characters(hidden)[0].argmax(-1).unique_consecutive()
        text = bytes(model.config.ctc_alphabet[c - 1] for c in best if c).decode()
        assert " ".join(text.split()) == " ".join(own_text(base, batch.input_features).split())
        search = {"lexicon": False, "beams": 1, "temperature": 1.0}
        (found,) = transcribe(model, processor, hidden, steps, "ctc", search)
        assert found.text
        read.add(text)
    assert len(read) == 3
    assert 'lacks ["\'"]' in caplog.text  # it is learned from nothing


def test_the_head_is_saved_and_trained(base, tiny_bases, tmp_path):
    processor, model = build_asr(base, tiny_bases / "decoder", fresh=True)
    model.characters.direct.weight.data.mul_(0.5)
    model.save_pretrained(tmp_path)
    again = ASRModel.from_pretrained(tmp_path)
    assert torch.equal(again.characters.direct.weight, model.characters.direct.weight)
    assert again.characters.direct.weight.requires_grad
    batch = processor(np.random.default_rng(1).standard_normal(16_000).astype(np.float32))
    hidden, steps = model.encode(batch.input_features, batch.input_features_mask)
    labels = torch.tensor([processor.spell("go home")])
    model.characters.loss(hidden, steps, labels).backward()
    for part in (model.characters.direct, model.characters.output):
        assert part.weight.grad.abs().sum() > 0


def test_half_a_letter_is_not_taken_for_a_letter(base, tmp_path):
    """é is the bytes 195 and 169, and Latin-1 would read the first of them as Ã."""
    folder = shutil.copytree(base, tmp_path / base.name)
    symbols = [*SYMBOLS[:-2], "Ã", "©"]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    model = CLASSES[base.name][0].from_pretrained(folder)
    _, bias = read_ctc_head(model, [ord("a"), *"é".encode()], str(folder))
    assert bias[1] != UNKNOWN_LOGIT and (bias[2:] == UNKNOWN_LOGIT).all()


def test_a_checkpoint_may_lack_what_only_training_masks_with(base, tiny_bases, tmp_path):
    """That of facebook/wav2vec2-base-960h does."""
    folder = shutil.copytree(base, tmp_path / base.name)
    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if not name.endswith("masked_spec_embed")}
    assert len(kept) == len(weights) - 1
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    _, model = build_asr(folder, tiny_bases / "decoder", fresh=True)
    assert model.config.ctc_direct


def test_an_encoder_without_a_head_leaves_it_out(tiny_bases):
    _, model = build_asr(tiny_bases / "hubert", tiny_bases / "decoder", fresh=True)
    assert model.config.ctc_direct is False and model.characters.direct is None


def test_a_head_without_its_vocabulary_is_an_error(base, tiny_bases, tmp_path):
    folder = tmp_path / base.name
    shutil.copytree(base, folder)
    for name in ("vocab.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has a CTC head, but no vocabulary"):
        build_asr(folder, tiny_bases / "decoder", fresh=True)
