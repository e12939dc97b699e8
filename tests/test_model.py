"""ASRModel, its CTC head and its decoding: properties that hold for any weights."""

import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import LORAS, TEXTS, babble, build_asr
from transformers import (
    AutoConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    SequenceBiasLogitsProcessor,
    WhisperConfig,
    WhisperModel,
)

from tiny_audio.asr.asr_audio import SAMPLE_RATE
from tiny_audio.asr.asr_bases import add_lora
from tiny_audio.asr.asr_config import SPARE_TOKENS, ASRConfig
from tiny_audio.asr.asr_ctc import CharacterHead, CTCHead
from tiny_audio.asr.asr_encoder import WAVEFORM_ENCODERS
from tiny_audio.asr.asr_modeling import ASRModel

VOCAB, END = 12, 1


# -- batch = single ------------------------------------------------------------------------------


def compare_logits(processor, model, clips, texts, tolerance):
    """Logits of every clip alone and in a batch, at each of its own positions."""
    with torch.no_grad():
        batch = processor(clips, texts)
        labels = batch.pop("labels")
        together = model(**batch).logits
        loss = model(**batch, labels=labels).loss
        losses, counts = [], []
        for i, (clip, text) in enumerate(zip(clips, texts, strict=True)):
            one = processor(clip, text)
            own = one.pop("labels")
            alone = model(**one).logits[0]
            beside = together[i, -len(alone) :]
            assert beside.shape == alone.shape
            difference = (beside - alone).abs().max().item()
            assert difference < tolerance, f"clip {i}: logits differ by {difference:.2e}"
            losses.append(model(**one, labels=own).loss.item())
            counts.append(int((own != -100).sum()))
    mean = sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
    assert loss.item() == pytest.approx(mean, abs=tolerance)


def compare_texts(processor, model, clips, **options):
    """New tokens of every clip, which are the same alone and in a batch."""
    together = model.generate(**processor(clips), **options)
    said = []
    for row, clip in zip(together, clips, strict=True):
        alone = model.generate(**processor(clip), **options)[0]
        rows = [[t for t in ids.tolist() if t != processor.end_token_id] for ids in (row, alone)]
        assert rows[0] == rows[1]
        said.append(tuple(rows[0]))
    return said


def test_convolutions_with_lora_hear_no_padding(build, clips):
    processor, model = build("whisper")
    add_lora(model.encoder, {"r": 4, "target_modules": ["conv1", "conv2"]}, "encoder")
    for name, parameter in model.encoder.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter)
    hidden, steps = encode(processor, model.eval(), clips)
    for row, n, clip in zip(hidden, steps.tolist(), clips, strict=True):
        alone, _ = encode(processor, model, [clip])
        assert torch.allclose(row[:n], alone[0], atol=1e-5)


def encode(processor, model, clips):
    """Encoder frames (b, t, d) of clips, and their numbers (b,)."""
    batch = processor(clips)
    with torch.no_grad():
        return model.encode(batch["input_features"], batch["input_features_mask"])


@pytest.mark.parametrize("encoder", ["whisper", *WAVEFORM_ENCODERS, "hubert-group", "parakeet"])
def test_frames_have_the_seconds_of_the_audio(build, encoder):
    """Word times and the check for too much text depend on it."""
    processor, model = build(encoder)
    seconds = 8.0
    batch = processor.collate([processor.features(babble(seconds, 1))])
    _, steps = model.encode(batch["input_features"], batch["input_features_mask"])
    counted = processor.frames_for_seconds(seconds)
    assert int(steps) * processor.frame_seconds == pytest.approx(seconds, abs=0.1)
    assert counted == pytest.approx(int(steps), abs=1)


@pytest.mark.parametrize("bridge", ["frames", "posteriors"])
@pytest.mark.parametrize("encoder", ["whisper", *WAVEFORM_ENCODERS, "hubert-group", "parakeet"])
def test_batch_equals_single(build, clips, encoder, bridge):
    stack = 1 if encoder == "parakeet" else 4
    processor, model = build(encoder, bridge=bridge, lora="both", stack=stack)
    compare_logits(processor, model, clips, TEXTS[:4], 1e-4)
    said = set()
    for beams in (1, 2):
        said |= set(compare_texts(processor, model, clips, num_beams=beams))
    assert len(said) >= len(clips), "all clips gave the same tokens: this shows nothing"


@pytest.mark.parametrize("bridge", [pytest.param("frames", marks=pytest.mark.long), "posteriors"])
def test_batch_equals_single_on_real_weights(real_bases, real_rows, real_clips, bridge):
    texts = [row["text"] for row in real_rows]
    processor, model = build_asr(
        real_bases.whisper, real_bases.decoder, texts, bridge=bridge, hidden=64, fresh=True
    )
    # In fp32 logits of 44 round apart by up to 1.2e-4, as the CPU has it; padding adds nothing.
    compare_logits(processor, model.double(), real_clips, texts, 1e-4)
    model.float()
    said = set()
    for beams in (1, 2):
        # An untrained bridge makes the decoder say line ends alone; the next best words differ.
        options = {"num_beams": beams, "max_new_tokens": 4, "bad_words_ids": [[198]]}
        said |= set(compare_texts(processor, model, real_clips, **options))
    assert len(said) > 1, "all clips gave the same tokens: this shows nothing"


def test_ctc_transcript_does_not_depend_on_the_batch(build, clips):
    processor, model = build("hubert")
    audio = ("input_features", "input_features_mask")
    batch = processor(clips)
    together = model.ctc_greedy(*model.encode(*(batch[k] for k in audio)))
    alone = [model.ctc_greedy(*model.encode(*(processor(c)[k] for k in audio)))[0] for c in clips]
    assert together == alone
    assert any(together)


def test_every_row_stops_at_its_own_token_limit(build, clips):
    processor, model = build("whisper")
    batch = processor(clips)
    _, lengths = model.projector(
        *model.encode(batch["input_features"], batch["input_features_mask"])
    )
    # A decoder that never ends by itself: without a limit each row would run on.
    never_end = [lambda ids, scores: scores.index_fill(1, torch.tensor([processor.end_token_id]),
                                                       float("-inf"))]  # fmt: skip
    out = model.generate(**batch, logits_processor=never_end)
    for row, limit in zip(out, lengths + SPARE_TOKENS, strict=True):
        assert int((row != processor.end_token_id).sum()) == int(limit)


def test_what_the_decoder_s_authors_prefer_is_not_used(tiny_bases, clips, tmp_path):
    """Many decoders come with settings that sample; a transcript is the most likely text."""
    decoder = shutil.copytree(tiny_bases / "decoder", tmp_path / "decoder")
    GenerationConfig(do_sample=True, temperature=5.0).save_pretrained(decoder)
    processor, model = build_asr(tiny_bases / "whisper", decoder)
    batch = processor(clips)
    assert len({str(model.generate(**batch).tolist()) for _ in range(4)}) == 1


def test_a_generation_config_of_the_caller_ends_where_the_model_ends(build, clips):
    processor, model = build("whisper")
    batch = processor(clips[0])
    bias = SequenceBiasLogitsProcessor([[[processor.end_token_id], 100.0]])
    given = GenerationConfig(num_beams=1)
    out = model.generate(**batch, logits_processor=[bias], generation_config=given)
    assert out.tolist() == [[processor.end_token_id]]
    given = GenerationConfig(max_new_tokens=2, suppress_tokens=[processor.end_token_id])
    assert model.generate(**batch, generation_config=given).shape[1] == 2


def test_a_decoder_that_scales_its_embeddings_gets_frames_as_loud(tiny_bases, tmp_path):
    """Gemma's embedding layer multiplies its weights."""
    like = AutoConfig.from_pretrained(tiny_bases / "decoder")
    shape = {k: getattr(like, k) for k in ("vocab_size", "hidden_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "intermediate_size")}  # fmt: skip
    folder = shutil.copytree(tiny_bases / "decoder", tmp_path / "decoder")
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=8, layer_types=None))
    gemma.save_pretrained(folder)
    model = build_asr(tiny_bases / "whisper", folder, bridge="posteriors", fresh=True)[1]
    said = model.get_input_embeddings()(torch.arange(shape["vocab_size"]))
    assert model.config.projector_scale == pytest.approx(said.pow(2).mean().sqrt().item())
    weight = model.get_input_embeddings().weight
    assert model.config.projector_scale > 2 * weight.pow(2).mean().sqrt().item()
    hidden = (
        torch.randn(1, 400, model.config.text_config.hidden_size) * model.config.projector_scale
    )
    mixed, keep = model.bridge(hidden, torch.tensor([400]))
    assert mixed[keep].norm(dim=-1).mean() > 2 * weight.norm(dim=-1).mean() / len(weight) ** 0.5


# -- loss and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("bridge", ["frames", "posteriors"])
def test_label_only_loss_is_the_full_logits_loss(build, clips, bridge):
    processor, model = build("whisper", bridge=bridge)
    batch = processor(clips, TEXTS[:4])
    labels = batch["labels"]
    with torch.no_grad():
        lean = model(**batch)
        logits = model(**{key: batch[key] for key in batch if key != "labels"}).logits
    assert lean.logits.shape == (int((labels != -100).sum()), model.config.text_config.vocab_size)
    scored = logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(scored, labels[:, 1:].flatten())
    assert lean.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_loss_is_the_mean_over_accumulated_batches(build, clips):
    processor, model = build("whisper")
    whole = processor(clips, TEXTS[:4])
    count = int((whole["labels"] != -100).sum())
    weights = {"ctc_loss_weight": 0.3, "character_loss_weight": 0.4}
    with torch.no_grad():
        expected = model(**whole, **weights).loss
        parts = [
            model(**processor(clips[i : i + 2], TEXTS[i : i + 2]), num_items_in_batch=count,
                  **weights).loss
            for i in (0, 2)
        ]  # fmt: skip
    assert sum(parts).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
def test_gradient_reaches_what_is_trained_and_nothing_else(build, clips, encoder, lora):
    processor, model = build(encoder, lora=lora, bridge="posteriors")
    model.train()
    weights = {"ctc_loss_weight": 0.5, "character_loss_weight": 0.5}
    model(**processor(clips, TEXTS[:4]), **weights).loss.backward()
    parts = set()
    for name, parameter in model.named_parameters():
        heads = ("projector.", "ctc.", "characters.", "residual.")
        trained = name.startswith(heads) or ".lora_" in name
        assert parameter.requires_grad == trained, name
        if trained:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, f"no gradient reaches {name}"
            parts.add(name.split(".")[0])
        else:
            assert parameter.grad is None, name
    ranks = LORAS[lora]
    assert ("encoder" in parts, "decoder" in parts) == (ranks[0] > 0, ranks[1] > 0)
    assert {"projector", "ctc", "characters", "residual"} <= parts


def test_the_loss_is_the_sum_of_its_parts(build, clips):
    processor, model = build("whisper", lora="decoder", bridge="posteriors")
    batch = processor(clips, TEXTS[:4])
    together = model(**batch, ctc_loss_weight=0.5).loss
    decoder = model(**batch).loss
    ctc = model(**batch, ctc_loss_weight=0.5, decoder_loss_weight=0.0).loss
    assert together.item() == pytest.approx((decoder + ctc).item(), rel=1e-6)
    together.backward()
    shared = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (decoder + ctc).backward()
    apart = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert shared.keys() == apart.keys()
    for name, gradient in shared.items():
        assert torch.allclose(gradient, apart[name], rtol=1e-4, atol=1e-6), name


def test_alignment_stage_trains_without_the_decoder(build, clips):
    processor, model = build("whisper", lora="decoder")
    batch = processor(clips, TEXTS[:4])
    model.decoder.base_model.register_forward_hook(lambda *_: pytest.fail("the decoder was run"))
    model(**batch, decoder_loss_weight=0.0, ctc_loss_weight=1.0).loss.backward()
    assert model.projector.output_norm.weight.grad.abs().sum() > 0


def test_the_start_of_all_prompts_is_read_once_and_changes_no_gradient(build, clips, monkeypatch):
    processor, model = build("whisper", lora="both")
    silence_dropout(model)
    batch = processor(clips, TEXTS[:4])
    shapes, grads = [], []
    model.decoder.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    for share in (True, False):
        if not share:
            monkeypatch.setattr(model, "common_start", lambda ids, mask: 0)
        model.zero_grad()
        model.train()(**batch).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    once, each_time = shapes
    assert each_time == (1, once[1] + 3 * len(processor.prefix_ids))
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


def test_prompts_that_begin_differently_are_read_in_full(build, clips):
    processor, model = build("whisper", lora="both")
    batch = processor(clips, TEXTS[:4])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert model.common_start(ids, mask) == len(processor.prefix_ids)
    ids[2, (mask[2] == 0).sum()] += 1  # the first token of one prompt
    assert model.common_start(ids, mask) == 0


@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
def test_gradient_checkpointing_changes_no_gradient(build, clips, encoder):
    grads = []
    for checkpointing in (False, True):
        processor, model = build(encoder, lora="both")
        silence_dropout(model)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        calls = count_calls(model.encoder.layers[0] if encoder == "whisper"
                            else model.encoder.encoder.layers[0])  # fmt: skip
        model(**processor(clips, TEXTS[:4])).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert calls["n"] == (2 if checkpointing else 1), "checkpointing runs a layer twice"
    for name, grad in grads[0].items():
        if name.startswith(("ctc.", "characters.")):
            continue  # not part of this loss
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


def count_calls(layer):
    """Forward calls of a layer, recomputation included."""
    calls = {"n": 0}
    target = next(m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm))
    target.register_forward_hook(lambda *_: calls.__setitem__("n", calls["n"] + 1))
    return calls


def silence_dropout(model):
    """Set every random part of the base models to zero."""
    for module in model.modules():
        for name in ("dropout", "activation_dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.audio_config.apply_spec_augment = False
    model.config.audio_config.layerdrop = 0.0


def test_training_leaves_the_statistics_of_batch_norms_alone(build, clips):
    processor, model = build("parakeet", lora="both", stack=1)
    assert model.config.audio_config.layerdrop == 0
    before = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    model.train()
    model(**processor(clips, TEXTS[:4])).loss.backward()
    after = dict(model.named_buffers())
    assert before and all(torch.equal(before[n], after[n]) for n in before)


# -- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
def test_a_frozen_encoder_is_never_in_training_mode(build, clips, encoder):
    processor, model = build(encoder, lora="decoder")
    model.train()
    assert not any(m.training for m in model.encoder.modules())
    assert model.projector.training
    assert model.decoder.training
    batch = processor(clips, TEXTS[:4])
    with torch.no_grad():  # the base models' config has dropout; the frozen one must not use it
        assert torch.equal(model(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
def test_a_trained_encoder_is_in_training_mode(build, clips, encoder):
    processor, model = build(encoder, lora="both")
    model.train()
    for name, module in model.encoder.named_modules():  # frozen convolutions need no gradient
        assert module.training != name.startswith("feature_extractor"), name
    batch = processor(clips, TEXTS[:4])
    with torch.no_grad():
        assert not torch.equal(model(**batch).loss, model(**batch).loss), "its dropout is off"
        model.eval()
        assert torch.equal(model(**batch).loss, model(**batch).loss)
        silence_dropout(model.train())
        assert torch.equal(model(**batch).loss, model(**batch).loss)


def test_reading_as_a_plain_language_model_keeps_what_is_trained(build):
    """An evaluation in the middle of training does it."""
    model = build("whisper", lora="both")[1]
    first = next(name for name, p in model.decoder.named_parameters() if ".lora_A" in name)
    model.decoder.get_parameter(first).requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.decoder_without_lora():
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_projector_starts_as_loud_as_the_token_embeddings(build, clips, real_bases, real_clips):
    real = build_asr(real_bases.whisper, real_bases.decoder, hidden=64, ctc=False)
    for (processor, model), some in ((build("whisper"), clips), (real, real_clips)):
        batch = processor(some)
        with torch.no_grad():
            frames, lengths = model.projector(
                *model.encode(batch["input_features"], batch["input_features_mask"])
            )
        inside = torch.arange(frames.shape[1]) < lengths[:, None]
        loud = frames[inside].pow(2).mean().sqrt().item()
        expected = model.decoder.get_input_embeddings().weight.pow(2).mean().sqrt().item()
        assert loud == pytest.approx(expected, rel=0.2)


# -- the CTC head --------------------------------------------------------------------------------


def head(classes=3):
    """A CTC head over a few ids of a vocabulary of 12."""
    config = ASRConfig(
        audio_config=WhisperConfig(d_model=8),
        text_config=LlamaConfig(vocab_size=VOCAB, hidden_size=8, num_attention_heads=2),
        ctc_token_ids=[3, 5, 8, 9, 10][:classes],
    )
    return CTCHead(config)


def random_log_probs(clips, frames, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(clips, frames, classes, generator=generator)).log_softmax(-1)


def texts_by_brute_force(log_probs):
    """Probability of every text (classes 1..), over all alignments of log-probs (t, c)."""
    total = {}
    frames, classes = log_probs.shape
    for path in itertools.product(range(classes), repeat=frames):
        p = math.exp(sum(log_probs[t, k].item() for t, k in enumerate(path)))
        text = tuple(k for k, _ in itertools.groupby(path) if k)
        total[text] = total.get(text, 0.0) + p
    return total


def begins_with(total, prefix):
    return sum(p for text, p in total.items() if text[: len(prefix)] == prefix)


def test_the_character_loss_is_ctc_on_the_spelling():
    config = ASRConfig(
        audio_config=WhisperConfig(d_model=8), ctc_alphabet=list(b"abc"), ctc_hidden=8,
        text_config=LlamaConfig(vocab_size=VOCAB, hidden_size=8, num_attention_heads=2),
    )  # fmt: skip
    made = CharacterHead(config)
    torch.manual_seed(0)
    hidden, lengths = torch.randn(2, 9, 8), torch.tensor([9, 7])
    hidden[1, 7:] = 0
    labels = torch.tensor([[1, 2, 1, 1], [2, 2, 2, 0]])
    log_probs = made(hidden)
    expected = 0.0
    for i, text in enumerate([(1, 2, 1, 1), (2, 2, 2)]):
        total = torch.nn.functional.ctc_loss(
            log_probs[i, : lengths[i], None],
            torch.tensor([text]),
            lengths[i : i + 1],
            torch.tensor([len(text)]),
            reduction="sum",
        )
        expected += total.item()
    assert made.loss(hidden, lengths, labels).item() == pytest.approx(expected, rel=1e-6)


def test_greedy_merges_repeats_and_drops_blanks():
    ctc = head(3)
    a, b, c = ctc.token_ids.tolist()
    path = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 3, 0, 3], [2, 2, 2, 0, 0, 0, 1, 1, 1, 1]])
    log_probs = torch.nn.functional.one_hot(path, 4).float().log_softmax(-1)
    lengths = torch.tensor([10, 6])  # the second clip ends before its last ones
    assert ctc.greedy(log_probs, lengths) == [[a, a, b, c, c], [b]]
    assert ctc.greedy(log_probs, torch.tensor([1, 3])) == [[], [b]]


def ctc_case(seed=0):
    torch.manual_seed(seed)
    ctc = head(5)
    with torch.no_grad():
        ctc.blank.weight.normal_()
    frames, embedding = torch.randn(2, 6, 8), torch.randn(VOCAB, 8)
    labels = torch.tensor([[-100, 3, 5, 5, 1], [-100, -100, 10, 7, 1]])  # 1 and 7 are no classes
    return ctc, frames, torch.tensor([6, 4]), labels, embedding


def test_ctc_loss_is_minus_the_log_probability_of_the_text():
    ctc, frames, lengths, labels, embedding = ctc_case()
    log_probs = ctc(frames, embedding)
    texts = [(3, 5, 5), (10,)]  # what is left of the labels
    expected = 0.0
    for row, n, text in zip(log_probs, lengths.tolist(), texts, strict=True):
        total = texts_by_brute_force(row[:n].detach())
        expected -= math.log(total[tuple(ctc.class_of[list(text)].tolist())])
    assert ctc.loss(frames, lengths, labels, embedding).item() == pytest.approx(expected, abs=1e-4)


def test_sampled_ctc_loss():
    ctc, *case = ctc_case()
    full = ctc.loss(*case).item()
    for negatives in (5, 6, 100):  # as many as there are classes: nothing is left out
        assert ctc.loss(*case, negatives=negatives).item() == full
    for seed, negatives in itertools.product(range(5), (1, 2, 4)):
        torch.manual_seed(seed)
        sampled = ctc.loss(*case, negatives=negatives).item()
        # Fewer rivals can only make the text likelier; its own tokens are always among them.
        assert 0 < sampled <= full + 1e-5
    ctc.loss(*case, negatives=2).backward()
    assert math.isfinite(ctc.log_scale.grad.item())


def test_a_target_that_does_not_fit_adds_nothing():
    ctc, frames, _, labels, embedding = ctc_case()
    both = ctc.loss(frames, torch.tensor([1, 4]), labels, embedding)  # 4 frames needed, 1 there
    second = ctc.loss(frames[1:], torch.tensor([4]), labels[1:], embedding)
    assert both.item() == pytest.approx(second.item(), abs=1e-5)


# -- refusals ------------------------------------------------------------------------------------


def test_lora_target_that_matches_nothing(tiny_bases):
    config = ASRConfig(
        encoder_name=str(tiny_bases / "whisper"),
        decoder_name=str(tiny_bases / "decoder"),
        decoder_lora={"r": 4, "target_modules": ["q_proj", "query"]},
    )
    with pytest.raises(ValueError, match=r"decoder.*'query'"):
        ASRModel.from_base(config)
    with pytest.raises(ValueError, match="target_modules"):
        ASRConfig(encoder_lora={"r": 4})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_lora": {"rank": 4}}, "unknown key 'rank' in LoRA settings"),
        ({"decoder_lora": {"r": 4, "target_module": ["q_proj"]}}, "did you mean 'target_modules'"),
        ({"projector_hiden": 3}, "did you mean 'projector_hidden'"),
        ({"stak": 3}, "did you mean 'stack'"),
        ({"bridge": "posterior"}, "bridge must be one of"),
        ({"stack": 0}, "stack must be at least 1"),
    ],
)
def test_config_refuses_what_it_does_not_know(settings, message):
    with pytest.raises(ValueError, match=message):
        ASRConfig(**settings)


def test_bridge_of_posteriors_needs_a_ctc_head(build):
    with pytest.raises(ValueError, match="needs a CTC head"):
        build("whisper", bridge="posteriors", ctc=False)
    processor, model = build("whisper", ctc=False)
    batch = processor(np.ones(16000, np.float32) * 0.1, "no no no")
    with pytest.raises(ValueError, match="no CTC head"):
        model(**batch, ctc_loss_weight=0.2)


@pytest.mark.parametrize("extra", [1, 7])
def test_more_placeholders_than_frames(build, clips, extra):
    processor, model = build("whisper")
    batch = processor(clips[0])
    more = torch.full((1, extra), processor.audio_token_id)
    batch["input_ids"] = torch.cat([more, batch["input_ids"]], 1)
    batch["attention_mask"] = torch.cat([torch.ones_like(more), batch["attention_mask"]], 1)
    with pytest.raises(ValueError, match="audio placeholders for"):
        model(**batch)


def test_a_row_with_more_placeholders_than_its_own_frames(build, clips):
    """Even where another row of the batch has so many frames."""
    processor, model = build("whisper")
    batch = processor(clips)
    batch["input_features_mask"][1, 50:] = False  # the longest clip is said to be half a second
    batch["input_features_mask"][0] = True  # and the first one to be as long as that was
    with pytest.raises(ValueError, match="audio placeholders for"):
        model(**batch)


def test_whisper_refuses_more_than_thirty_seconds(build):
    processor, model = build("whisper")
    limit = SAMPLE_RATE * 30
    with torch.no_grad():
        model.projector(*model.encode(**audio_of(processor, np.zeros(limit, np.float32))))
        with pytest.raises(ValueError, match="longer than 30 s"):
            model.projector(*model.encode(**audio_of(processor, np.zeros(limit + 400, np.float32))))


def audio_of(processor, samples):
    batch = processor(samples)
    return {k: batch[k] for k in ("input_features", "input_features_mask")}


# -- geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
@pytest.mark.parametrize("stack", [1, 3, 5])
def test_placeholders_are_projected_frames_at_any_length(build, encoder, stack):
    processor, model = build(encoder, stack=stack, ctc=False)
    rng = np.random.default_rng(0)
    for n in [1600, 1601, 4000, 8079, 8080, 8081, *rng.integers(1600, 30000, 6).tolist()]:
        audio = audio_of(processor, rng.standard_normal(n).astype(np.float32))
        with torch.no_grad():
            frames, lengths = model.projector(*model.encode(**audio))
        steps = audio["input_features_mask"].shape[1]
        expected = math.ceil(processor.encoder_steps(steps) / stack)
        assert frames.shape[1] == lengths.item() == expected


@pytest.mark.long
def test_real_length_whisper_features_are_close_to_padded_ones(real_bases, real_clips):
    processor, model = build_asr(real_bases.whisper, real_bases.decoder, hidden=8, ctc=False)
    reference = WhisperModel.from_pretrained(real_bases.whisper, dtype=torch.float32).get_encoder()
    means = []
    for clip in real_clips:
        batch = audio_of(processor, clip)
        full = processor.feature_extractor(clip, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        assert full["input_features"].shape[-1] == 3000
        with torch.no_grad():
            mine = model.family.run(model.encoder, *batch.values())
            theirs = reference(full["input_features"]).last_hidden_state[:, : mine.shape[1]]
            cosine = torch.nn.functional.cosine_similarity(mine, theirs, dim=-1)
            # And at the full length it is the same encoder.
            whole = model.family.run(
                model.encoder, full["input_features"], torch.ones(1, 3000, dtype=torch.bool)
            )
        means.append(cosine.mean().item())
        expected = reference(full["input_features"]).last_hidden_state
        assert torch.allclose(whole, expected, atol=2e-3)
    assert np.mean(means) > 0.9, means
    assert min(means) > 0.8, means  # the shortest clip moves most
