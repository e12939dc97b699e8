"""Train a model stage by stage from a Hydra config.

`python src/train.py +experiments=quickstart peft.r=32` composes `configs/hydra`, refuses unknown
keys, and runs each of `stages` with the Hugging Face Trainer. Repeating the command continues an
interrupted run.
"""

import gc
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from accelerate import PartialState
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from transformers import TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback
from transformers.trainer_utils import set_seed

from ..asr.asr_decoding import SCORE_WEIGHTS
from ..asr.asr_modeling import ASRModel
from ..asr.asr_processing import ASRProcessor
from ..errors import clean_exit
from ..hub import HubPusher, git_hash, hub_target, model_card, push_folder
from ..progress import quiet_libraries
from . import recipe
from .build import build_processor, is_tuned, stage_model
from .checks import Dropped, read_log
from .data import SpeechDataset
from .frames import cache_frames, return_freed_memory
from .manifests import Reader
from .parts import average_with_start, freeze_idle
from .plan import describe, expected_cost
from .run_folder import changed_settings, explain_full_disk, keep_recipe, last_checkpoint, run_lock
from .run_log import StepLine, finish_trackers, start_trackers
from .stream import SpeechStream
from .trainer import ASRTrainer
from .tuning import tune

FINISHED, TUNING = "finished.json", "tuning.json"


def fit_device(training: DictConfig) -> None:
    """Turn off TF32 and dtype on a CPU, and bf16 on one without instructions for it; print them."""
    if torch.cuda.is_available():
        if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
            raise ValueError("several GPUs: see docs/price.md, or set CUDA_VISIBLE_DEVICES=0")
        return
    has_bf16 = any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16"))
    for key, instead in (("bf16", False), ("tf32", None), ("dtype", None)):
        if training.get(key) and not (key == "bf16" and has_bf16):
            print(f"training.{key}={training[key]} is off: this device does not have it")
            training[key] = instead


def read_data(
    cfg: DictConfig, settings: dict[str, Any], processor: ASRProcessor, dropped: Dropped
) -> tuple[Any, SpeechDataset | None]:
    """Read a stage's training data (SpeechDataset or SpeechStream) and its evaluation data."""
    place = PartialState()
    options = {key: value for key, value in cfg.data.items() if key not in recipe.OWN_DATA_KEYS}
    options |= {"seed": cfg.run.seed, **limits(cfg)}
    if cfg.data.streaming:
        data: Any = SpeechStream(
            cfg.data.train, processor, dropped, settings["batch_seconds"], cfg.data.block,
            settings["per_device_train_batch_size"], place.process_index, place.num_processes,
            **options,
        )  # fmt: skip
    else:
        data = SpeechDataset(cfg.data.train, processor, dropped, **options)
    if settings["eval_strategy"] == "no":
        return data, None
    if not cfg.data.eval:
        raise ValueError("data.eval names no clips: set it, or training.eval_strategy=no")
    unused = Dropped(dropped.path and dropped.path.with_name("dropped_eval.jsonl"))
    return data, SpeechDataset(cfg.data.eval, processor, unused, cfg.data.streaming, **limits(cfg))


def limits(cfg: DictConfig) -> dict[str, Any]:
    """The options of `Clips` for clips that are not augmented."""
    options = {key: cfg.data[key] for key in ("min_seconds", "max_seconds", "lowercase")}
    return {**options, "token_head": cfg.model.ctc, "character_head": cfg.model.ctc_characters}


def run_stage(cfg: DictConfig, folder: Path, start: str | None, hub_id: str | None = None) -> Path:
    """Train one stage in `folder` and return its `final` folder.

    Args:
        cfg: the stage's config.
        folder: where checkpoints and logs go.
        start: folder of a trained model to start from, if any.
        hub_id: Hub repository that each checkpoint is pushed to, if any.
    """
    final, place = folder / "final", PartialState(cpu=not torch.cuda.is_available())
    folder.mkdir(parents=True, exist_ok=True)
    if place.is_main_process:
        keep_recipe(cfg, folder)
    if (final / FINISHED).exists():
        print(f"{folder}: already finished, skipped")
        return final
    if cfg.training.start_share and not start:
        raise ValueError(
            "training.start_share averages with the weights that a stage starts from, and this one "
            "starts from none: set model.pretrained_model_path, or start_share in a later stage"
        )
    set_seed(cfg.run.seed)
    fit_device(cfg.training)
    settings: Any = OmegaConf.to_container(cfg.training, resolve=True)
    rank = f"-{place.process_index}" if place.process_index else ""
    dropped = Dropped(folder / f"dropped{rank}.jsonl", cfg.data.max_dropped_fraction)
    resume = settings["resume_from_checkpoint"] or last_checkpoint(folder)
    processor = build_processor(cfg)
    with place.main_process_first():  # the first process fills the cache of `datasets`
        data, evaluation = read_data(cfg, settings, processor, dropped)
    model = stage_model(cfg, processor, data, start, resume)
    freeze_idle(model, settings)
    print(describe(model))
    examples = getattr(data, "examples", [])  # a stream has none
    gflop, cost = expected_cost(model, settings, examples)
    print(cost)
    hours = sum(example.duration for example in examples) / 3600
    size = f"{len(examples)} clips, {hours:.2f} h an epoch" if examples else "a stream"
    print(f"{size}; {data.rewritten} texts changed by the text rules; dropped: {dropped}")
    args = training_arguments(cfg, settings, folder, isinstance(data, SpeechStream))
    if settings["cache_encoder"]:
        model.to(args.device)  # type: ignore[arg-type]  # the trainer does so too late
        with place.main_process_first():  # the main process computes the frames
            cache_frames(model, data, folder.parent, settings["bf16"])
        dropped.check(data.total)
    if resume:
        print(f"continuing from {resume}")
        restore_progress(data, dropped, Path(resume))
    trainer = ASRTrainer(settings, gflop, model=model, args=args, train_dataset=data,
                         eval_dataset=evaluation, processing_class=processor)  # fmt: skip
    trainer.add_callback(StepLine(folder, [s.name for s in cfg.stages], cfg.run.price_per_hour))
    trainer.remove_callback(PrinterCallback)
    if settings["early_stopping_patience"]:
        trainer.add_callback(EarlyStoppingCallback(settings["early_stopping_patience"]))
    if hub_id:
        trainer.add_callback(HubPusher(hub_id))
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    if isinstance(data, SpeechDataset):
        dropped.check(data.total)
    if start and settings["start_share"]:
        average_with_start(model, start, settings["start_share"])
    trainer.save_model(str(final))
    if place.is_main_process:
        summary = stage_summary(folder.name, trainer, data, hours, time.monotonic() - started)
        (final / FINISHED).write_text(json.dumps(summary) + "\n")
    place.wait_for_everyone()
    return final


def training_arguments(
    cfg: DictConfig, settings: dict[str, Any], folder: Path, streamed: bool
) -> TrainingArguments:
    """Build the Trainer's arguments: the recipe's, and those that are always the same.

    Raises:
        ValueError: for conflicting settings.
    """
    arguments = {k: v for k, v in settings.items() if k not in recipe.OWN_TRAINING_KEYS}
    # transformers renamed this field; our configs keep the common name
    arguments["activation_checkpointing"] = arguments.pop("gradient_checkpointing")
    if settings["bf16"] and not torch.cuda.is_available():
        arguments["use_cpu"] = True  # without it, transformers refuses bf16 on a CPU
        # In bf16, oneDNN compiles code for each shape of a batch; by default it keeps gigabytes.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    whole: Any = OmegaConf.to_container(cfg, resolve=True)
    main = PartialState().is_main_process
    args = TrainingArguments(
        output_dir=str(folder),
        seed=cfg.run.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        report_to=start_trackers(settings["report_to"], folder, whole) if main else [],
        ignore_data_skip=streamed,  # a stream starts at its saved position
        accelerator_config={"even_batches": False},  # LengthBatchSampler evens them out
        **arguments,
    )
    if settings["early_stopping_patience"] and not args.load_best_model_at_end:
        raise ValueError("early_stopping_patience needs training.load_best_model_at_end=true")
    if settings["cache_encoder"] and streamed:
        raise ValueError("training.cache_encoder needs data.streaming=false")
    return args


def restore_progress(data: Any, dropped: Dropped, resume: Path) -> None:
    """Restore the dropped examples and the position in a stream from a checkpoint.

    Raises:
        ValueError: if the checkpoint was saved by a different number of processes.
    """
    place = PartialState()
    assert dropped.path is not None
    for row in read_log(resume / dropped.path.name):
        dropped.add(**row)
    if isinstance(data, SpeechStream):
        if (saved := len(list(resume.glob("stream-*.json")))) != place.num_processes:
            raise ValueError(f"{resume} was saved by {saved} process(es): continue it with as many")
        data.start = json.loads((resume / f"stream-{place.process_index}.json").read_text())


def stage_summary(
    name: str, trainer: ASRTrainer, data: Any, hours: float, seconds: float
) -> dict[str, Any]:
    """Figures of a finished stage for the model card; `hours` of audio in an epoch."""
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    return {
        "name": name,
        "steps": trainer.state.global_step,
        "clips": len(getattr(data, "examples", [])),
        "hours": hours,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }


def finish(cfg: DictConfig, start: str, output: Path) -> None:
    """Tune decoding on the evaluation clips and save the last stage's model in `output`."""
    dtype = cfg.training.dtype if torch.cuda.is_available() else None  # as in training
    model = ASRModel.from_pretrained(start, dtype=dtype)
    processor = ASRProcessor.from_pretrained(start)
    if is_tuned(cfg) and model.characters is not None:
        model.to(PartialState().device)  # type: ignore[arg-type]
        clips = SpeechDataset(
            cfg.data.eval, processor, Dropped(), cfg.data.streaming, **limits(cfg)
        )
        print(f"\n== tuning decoding on {len(clips)} clips")
        found = tune(model, processor, clips, cfg.training.language)
        for name, choice in found.items():
            print(f"{name}: expected WER {choice['expected_wer']:.2f} %")
        print({name: model.config.decoding[name] for name in SCORE_WEIGHTS})
        (output / TUNING).write_text(json.dumps(found, indent=2) + "\n")
    model.save_pretrained(output)
    processor.save_pretrained(output)


def train(cfg: DictConfig) -> Path:
    """Run every stage of a composed config and return the folder of the finished model.

    Raises:
        ValueError: for invalid settings, or if another run holds the folder.
        DataError: if the data cannot be used.
    """
    recipe.check_config(cfg)
    quiet_libraries()
    cfg.run.output_dir = str(Path(cfg.run.output_dir).expanduser())
    output, start = Path(cfg.run.output_dir), cfg.model.pretrained_model_path
    if start:
        cfg.model.pretrained_model_path = start = str(Path(start).expanduser())
        if not (Path(start) / "config.json").is_file():
            raise ValueError(f"model.pretrained_model_path={start}: no trained model is there")
    if cfg.training.resume_from_checkpoint and len(cfg.stages) > 1:
        raise ValueError("the run has several stages: set stages.N.training.resume_from_checkpoint")
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        if cfg.run.fresh and output.exists() and os.environ.get("RANK", "0") == "0":
            needed = start and Path(start).resolve().is_relative_to(output.resolve())
            if needed or not any((output / stage.name).exists() for stage in cfg.stages):
                raise ValueError(
                    f"run.fresh=true would delete {output}: it is not a run of this recipe, or "
                    "model.pretrained_model_path is inside; choose another run.output_dir"
                )
            for stage in recipe.stage_configs(cfg):  # check paths before deleting the old run
                for source in [*stage.data.train, *stage.data.eval]:
                    Reader(source, stage.data.streaming)
            with run_lock(output):
                shutil.rmtree(output)
    if (output / FINISHED).exists():
        changed = changed_settings(cfg, output / "training_config.yaml", r"run\.(?!seed)")
        others = f"; it was trained with other settings ({changed})" if changed else ""
        print(f"{output} is finished; run.fresh=true starts over{others}")
        return output
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = io.StringIO()  # only the main process prints
    hub_id = hub_target(cfg.training.hub_model_id) if cfg.training.push_to_hub else None
    started = time.monotonic()
    with explain_full_disk(output), run_lock(output):
        for stage, merged in zip(cfg.stages, recipe.stage_configs(cfg), strict=True):
            print(f"\n== stage {stage.name}")
            start = str(run_stage(merged, output / stage.name, start, hub_id))
            gc.collect()  # trainer and callbacks form reference cycles that keep the model alive
            return_freed_memory()
        if not PartialState().is_main_process:
            return output
        finish_trackers()
        finish(cfg, start, output)
    OmegaConf.save(cfg, output / "training_config.yaml")
    stages = [json.loads((output / s.name / "final" / FINISHED).read_text()) for s in cfg.stages]
    facts = {key: max(stage[key] for stage in stages) for key in ("parameters", "trained")}
    facts |= {"seconds": time.monotonic() - started, "stages": stages, "git_hash": git_hash()}
    facts["command"] = " ".join(["python", *sys.argv]).replace(" ++", " ")
    (output / "README.md").write_text(model_card(output, facts))
    (output / FINISHED).write_text(json.dumps(facts) + "\n")
    print(f"model saved in {output}")
    if hub_id:
        print(f"pushed to {push_folder(output, hub_id, 'the finished model')}")
    return output


def main() -> None:
    """Run Hydra's command line, as `python src/train.py` does."""
    sys.argv[1:] = recipe.allow_unknown_keys(sys.argv[1:])
    compose_and_train()


@hydra.main(config_path=str(recipe.CONFIGS), config_name="config", version_base=None)
def compose_and_train(cfg: DictConfig) -> None:
    """Train with the composed config; Hydra parses the command line."""
    with clean_exit():
        recipe.refuse_shadowed(cfg, HydraConfig.get().overrides.task)
        train(cfg)
