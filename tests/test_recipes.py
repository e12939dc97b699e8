"""The shipped recipes: exact sizes of the big one, every preset and override that is promised."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer

from tiny_audio.asr.asr_config import ASRConfig
from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.training.build import build_processor, model_config
from tiny_audio.training.recipe import compose_recipe, stage_configs

FIXTURES = Path(__file__).parent / "fixtures"
GUIDE = (Path(__file__).parents[1] / "docs/train.md").read_text()


def composed(*overrides: str):
    return compose_recipe(overrides)


def base_config(name: str) -> dict:
    return {k: v for k, v in json.loads((FIXTURES / name).read_text()).items() if k[0] != "_"}


def config_of(cfg, **more) -> ASRConfig:
    """The model's config at the real sizes of HuBERT-XLarge and SmolLM3-3B."""
    sizes = {
        "audio_config": base_config("hubert-xlarge-ls960-ft.json"),
        "text_config": base_config("SmolLM3-3B.json"),
    }
    return model_config(cfg, [], [], **sizes, **more)


def on_meta(cfg) -> ASRModel:
    """The model of a config at those sizes, without weights."""
    with torch.device("meta"):
        return ASRModel(config_of(cfg, audio_token_id=1, end_token_id=2))


def count(model: ASRModel, part: str, lora: bool = False) -> int:
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith(part + ".") and (".lora_" in name) == lora
    )


def test_the_big_recipe_has_the_sizes_that_it_promises():
    cfg = composed("+experiments=stage1")
    model = on_meta(cfg)
    assert cfg.model.encoder_model_name == "facebook/hubert-xlarge-ls960-ft"
    assert cfg.model.decoder_model_name == "HuggingFaceTB/SmolLM3-3B"
    assert count(model, "encoder") == 962_497_408
    assert count(model, "decoder") == 3_075_098_624
    assert count(model, "projector") == 2 * 6400 * 8192 + 8192 * 2048 + 6400 + 2048 == 121_643_264
    assert count(model, "encoder", lora=True) == 48 * 2 * 8 * 2 * 1280 == 1_966_080
    assert count(model, "decoder", lora=True) == 36 * 64 * (2 * 2048 + 2048 + 512) == 15_335_424
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 121_643_264 + 1_966_080 + 15_335_424
    for said in ("962.5M", "3,075.1M", "121.6M", "1.97M", "15.34M"):
        assert said in GUIDE, said


@pytest.mark.parametrize(
    ("overrides", "encoder", "decoder"),
    [
        (["encoder_lora.r=8", "peft.r=64"], 1_966_080, 15_335_424),
        (["encoder_lora.r=0"], 0, 15_335_424),
        (["peft.r=0"], 1_966_080, 0),
        (["encoder_lora.r=0", "peft.r=0"], 0, 0),
        (["encoder_lora.target_modules=[q_proj,v_proj]"], 1_966_080, 15_335_424),
        (
            ["peft.target_modules=[q_proj,k_proj,v_proj,o_proj]"],
            1_966_080,
            36 * 64 * 2 * (2048 + 2048 + 2048 + 512),
        ),
        (["encoder_lora.r=16"], 2 * 1_966_080, 15_335_424),
    ],
    ids=str,
)
def test_lora_overrides_have_their_effect(overrides, encoder, decoder):
    model = on_meta(composed("+experiments=stage1", *overrides))
    assert count(model, "encoder", lora=True) == encoder
    assert count(model, "decoder", lora=True) == decoder
    if "encoder_lora.target_modules=[q_proj,v_proj]" in overrides:
        names = {n.split(".lora_")[0].rsplit(".", 1)[1] for n, _ in model.encoder.named_parameters()
                 if ".lora_" in n}  # fmt: skip
        assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_lora_alpha_scales_the_update(part):
    group = "encoder_lora" if part == "encoder" else "peft"
    scale = {}
    for alpha in (16, 32):
        model = on_meta(composed("+experiments=stage1", f"{group}.lora_alpha={alpha}"))
        layers = [m for m in getattr(model, part).modules() if hasattr(m, "lora_A")]
        scale[alpha] = {layer.scaling["default"] for layer in layers}
    assert scale[32] == {2 * scale[16].pop()}


def test_the_stages_of_the_big_recipe():
    cfg = composed("+experiments=stage1")
    first, second = cfg.stages
    assert first.training.encoder_learning_rate == first.training.decoder_learning_rate == 0
    assert second.training.encoder_learning_rate > 0 < second.training.decoder_learning_rate
    assert cfg.training.bf16 and cfg.training.gradient_checkpointing
    assert cfg.data.train[0].path == "speechbrain/LoquaciousSet"
    assert cfg.data.train[0].audio_column == "wav" and cfg.data.train[0].text_column == "text"


def test_the_plain_run_is_the_minimal_one():
    plain, minimal = composed(), composed("+experiments=mac_minimal")
    assert plain.training.max_steps == 20
    for group in ("model", "data", "training", "stages", "encoder_lora", "peft"):
        assert plain[group] == minimal[group], group
    assert "3B" not in OmegaConf.to_yaml(plain) and "xlarge" not in OmegaConf.to_yaml(plain)


def test_the_other_presets():
    frozen = composed("+experiments=archive/lora_decoder")
    assert frozen.encoder_lora.r == 0 and frozen.peft.r == 64
    assert frozen.stages == composed("+experiments=stage1").stages
    modern = composed("+experiments=parakeet")
    assert modern.model.encoder_model_name == "nvidia/parakeet-ctc-1.1b"
    assert modern.model.stack == 1 and modern.training.bf16
    assert modern.run.output_dir == "outputs/parakeet"
    dutch, english = composed("+experiments=dutch"), composed("+experiments=quickstart")
    assert dutch.training.language == "nl" and english.training.language == "en"
    assert [source.path.rsplit("/", 2)[1:] for source in dutch.data.train] == [
        ["dutch", "train.jsonl"]
    ]
    own = {"ctc": True, "bridge": "posteriors", "decoding": None, "tune": True}
    assert {**dutch.model, **own} == english.model
    characters, encoder = stage_configs(dutch)
    assert characters.training.cache_encoder and not characters.training.encoder_learning_rate
    assert encoder.training.encoder_learning_rate and not encoder.training.cache_encoder


@pytest.mark.parametrize("name", ["adapt", "hour"])
def test_the_presets_that_go_on_train_the_encoder_and_the_character_head(name):
    cfg = composed(f"+experiments={name}")
    stage = stage_configs(cfg)[0].training
    assert cfg.encoder_lora.r and stage.encoder_learning_rate
    assert not stage.cache_encoder and not stage.decoder_learning_rate
    assert stage.character_loss_weight and not stage.decoder_loss_weight


def test_the_preset_hour_ends_with_the_decoder():
    encoder, decoder = (stage.training for stage in stage_configs(composed("+experiments=hour")))
    assert encoder.ctc_loss_weight  # the decoder is to hear by this head
    assert decoder.decoder_loss_weight and decoder.decoder_learning_rate
    assert not decoder.encoder_learning_rate and not decoder.cache_encoder


@pytest.mark.parametrize("name", ["dutch", "mac_minimal", "parakeet", "quickstart", "stage1"])
def test_the_best_checkpoint_can_be_kept(name):
    """A checkpoint is written at an evaluation, or transformers refuses load_best_model_at_end."""
    cfg = compose_recipe([f"+experiments={name}", "training.load_best_model_at_end=true"])
    for stage in stage_configs(cfg):
        assert stage.training.save_steps % stage.training.eval_steps == 0, stage.training


def test_values_that_are_given_reach_the_trainer():
    cfg = composed(
        "training.learning_rate=1e-4", "training.per_device_train_batch_size=5",
        "data.max_train_samples=1000", "training.max_steps=20",
        "model.encoder_model_name=facebook/hubert-large-ls960-ft",
    )  # fmt: skip
    assert cfg.training.learning_rate == 1e-4 and cfg.training.max_steps == 20
    assert cfg.data.max_train_samples == 1000
    assert cfg.model.encoder_model_name == "facebook/hubert-large-ls960-ft"


def test_a_stage_without_evaluation_has_no_best_checkpoint():
    cfg = composed("+experiments=quickstart", "training.load_best_model_at_end=true",
                   "training.early_stopping_patience=3")  # fmt: skip
    kept = [stage.training.load_best_model_at_end for stage in stage_configs(cfg)]
    patience = [stage.training.early_stopping_patience for stage in stage_configs(cfg)]
    assert kept == [True, False, True] and patience == [3, None, 3]


@pytest.mark.parametrize("stages", ["null", "[]", "[{name: a}, {name: a}]", "[{training: {}}]"])
def test_every_stage_has_a_name_of_its_own(stages):
    with pytest.raises(ValueError, match="a name each"):
        composed(f"stages={stages}")


def test_a_part_of_what_a_stage_sets_cannot_be_overridden():
    with pytest.raises(ValueError, match="overridden by stage only"):
        composed("stages=[{name: only, data: {train: [{path: a}]}}]", "data.train.0.path=b")


def test_a_pinned_revision_holds_for_everything_that_is_read(monkeypatch):
    pinned = {}

    def recorded(kind, real):
        def read(name, **options):
            pinned[kind.__name__] = options.get("revision")
            return real(name)

        return read

    cfg = composed("model.encoder_revision=abc", "model.decoder_revision=def")
    for kind in (AutoConfig, AutoFeatureExtractor, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", recorded(kind, kind.from_pretrained))
    with contextlib.suppress(ValueError):
        build_processor(cfg)
    assert pinned.items() <= {"AutoConfig": "abc", "AutoFeatureExtractor": "abc",
                              "AutoTokenizer": "def"}.items() and pinned  # fmt: skip
