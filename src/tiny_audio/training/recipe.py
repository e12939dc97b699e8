"""Compose and validate the config of a recipe; refuse unknown keys."""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from transformers import TrainingArguments

from ..asr.asr_config import check_keys

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "hydra"
# Our own keys of the training group; all others are fields of TrainingArguments.
OWN_TRAINING_KEYS = set(
    "batch_seconds decoder_loss_weight ctc_loss_weight ctc_negatives character_loss_weight "
    "encoder_learning_rate decoder_learning_rate cache_encoder resume_from_checkpoint dtype "
    "attn_implementation per_device_train_batch_size push_to_hub hub_model_id report_to "
    "early_stopping_patience largest_first language start_share".split()
)
# TrainingArguments that a run may not set: fixed in train.py, renamed, or without effect.
FIXED_KEYS = (
    "output_dir seed remove_unused_columns disable_tqdm logging_nan_inf_filter ignore_data_skip "
    "accelerator_config activation_checkpointing label_smoothing_factor hub_private_repo "
    "dataloader_drop_last dataloader_persistent_workers dataloader_in_order "
    "dataloader_multiprocessing_context per_device_eval_batch_size eval_accumulation_steps "
    "prediction_loss_only data_seed train_sampling_strategy bf16_full_eval fp16_full_eval "
    "hub_strategy hub_token hub_always_push auto_find_batch_size"
)
# Keys of the data group that select the data; all others are options of `Clips`.
OWN_DATA_KEYS = set("train eval words streaming block vocabulary_rows max_dropped_fraction".split())


def check_config(cfg: DictConfig) -> None:
    """Refuse unknown keys, including `+key=` additions, and suggest the nearest valid name.

    Raises:
        ValueError: names the unknown key.
    """
    known: Any = OmegaConf.load(CONFIGS / "config.yaml")
    known.model = OmegaConf.load(CONFIGS / "model/hubert_smollm3.yaml")
    known.data = OmegaConf.load(CONFIGS / "data/loquacious.yaml")
    training = OWN_TRAINING_KEYS | {field.name for field in fields(TrainingArguments)}
    training -= {*FIXED_KEYS.split()}
    check_keys(cfg, [*known, "training"], "the config")
    for group in ("run", "model", "encoder_lora", "peft", "data"):
        check_keys(cfg[group], known[group], group)
    check_keys(cfg.training, training, "training")
    names = [stage.get("name") for stage in cfg.stages or ()]
    if not all(names) or len({*names}) != len(names) or not names:
        raise ValueError(f"stages need a name each, all different, not {names}")
    for settings in (cfg.training, *(stage.get("training") or {} for stage in cfg.stages)):
        if (dtype := settings.get("dtype")) not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"training.dtype={dtype}: not float32, bfloat16 or float16")
    for stage in cfg.stages:
        check_keys(stage, {"name", "training", "data"}, "a stage")
        check_keys(stage.get("training") or {}, training, f"stage {stage.name}: training")
        check_keys(stage.get("data") or {}, known.data, f"stage {stage.name}: data")


def stage_configs(cfg: DictConfig) -> list[Any]:
    """The config of each stage: the run's, updated by the stage's own `training` and `data`."""
    own = [{k: stage[k] for k in ("training", "data") if stage.get(k)} for stage in cfg.stages]
    merged = [OmegaConf.merge(cfg, part) for part in own]
    for stage in merged:
        if stage.training.eval_strategy == "no" and cfg.training.eval_strategy != "no":
            # Without evaluation, this stage has no best checkpoint.
            stage.training.update(load_best_model_at_end=False, early_stopping_patience=None)
    return merged


def refuse_shadowed(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse an override of `training.x` or `data.x` if a stage sets the same key."""
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        group, name = [*key.split("."), ""][:2]
        for i, stage in enumerate(cfg.stages):
            if name and name in (stage.get(group) or {}):
                raise ValueError(f"{key} is overridden by stage {stage.name}: set stages.{i}.{key}")


def allow_unknown_keys(overrides: Sequence[str]) -> list[str]:
    """Prefix overrides with `++`, so that `check_config` reports unknown keys instead of Hydra.

    Hydra's own message does not suggest the nearest valid key.
    """
    return [f"++{a}" if re.match(r"\w+\.[\w.]+=", a) else a for a in overrides]


def compose_recipe(overrides: Sequence[str]) -> DictConfig:
    """Compose and validate the config of `python src/train.py <overrides>` without starting a run.

    Raises:
        ValueError: for an override that is malformed, names an unknown key, or has no effect
            because a stage sets the same key.
    """
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
            cfg = hydra.compose("config", allow_unknown_keys(overrides))
    except HydraException as error:
        raise ValueError(" ".join(str(error).partition("Config search")[0].split())) from error
    check_config(cfg)
    refuse_shadowed(cfg, overrides)
    return cfg
