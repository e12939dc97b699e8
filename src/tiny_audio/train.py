"""The recipe: a Hydra config in, a trained model out, stage by stage.

`python src/train.py +experiments=quickstart training.learning_rate=1e-3` composes
`configs/hydra`, refuses unknown keys, and runs each of `stages` with the Hugging Face Trainer. The
same command again continues where it stopped.
"""

import json
import logging
import os
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from .asr_config import ASRConfig, check_keys
from .asr_modeling import WEIGHTS, ASRModel
from .asr_processing import ASRProcessor
from .data import DataError, Dropped, LengthBatchSampler, SpeechDataset

logger = logging.getLogger(__name__)
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "hydra"
FINISHED = "finished.json"
# Settings of the training group that are ours; every other one is a field of TrainingArguments.
OWN_TRAINING_KEYS = {
    "batch_seconds",
    "decoder_loss_weight",
    "ctc_loss_weight",
    "ctc_negatives",
    "encoder_learning_rate",
    "decoder_learning_rate",
    "cache_encoder",
    "resume_from_checkpoint",
    "dtype",
    "attn_implementation",
}


class ASRTrainer(Trainer):
    """The Hugging Face Trainer with length-budget batches and a learning rate for each part."""

    model: Any
    processing_class: Any

    def __init__(self, settings: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.settings = settings
        self.dropped: Dropped = kwargs["train_dataset"].dropped
        self.seconds = self.padded = 0.0  # audio since the last log line
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # `forward` takes num_items_in_batch

    def get_train_dataloader(self) -> DataLoader:
        """Batches within `training.batch_seconds`, in an order that (seed, epoch) fixes."""
        data: Any = self.train_dataset
        sampler = LengthBatchSampler(
            [example.duration for example in data.examples],
            self.settings["batch_seconds"],
            self.args.seed,
        )
        loader = DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=data.collate,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=False,  # workers must see the dataset's epoch
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a group for each part: projector and CTC head, encoder LoRA, decoder LoRA."""
        if self.optimizer is None:
            rates = part_rates(self.settings, self.args.learning_rate)
            groups: dict[str, list[Any]] = {part: [] for part in rates}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups[part_of(name)].append(parameter)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("lr")
            self.optimizer = optimizer(
                [{"params": ps, "lr": rates[part]} for part, ps in groups.items() if ps],
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                **options,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's loss; a loss that is not finite stops the run and names its clips."""
        inputs = dict(inputs)
        ids, seconds = inputs.pop("ids"), inputs.pop("seconds")
        for item in inputs.pop("dropped"):
            self.dropped.add(item["id"], item["reason"], item["detail"])
        outputs = model(
            **inputs,
            num_items_in_batch=num_items_in_batch,
            decoder_loss_weight=self.settings["decoder_loss_weight"],
            ctc_loss_weight=self.settings["ctc_loss_weight"],
            ctc_negatives=self.settings["ctc_negatives"],
        )
        if not torch.isfinite(outputs.loss):
            raise DataError(
                f"the loss is {outputs.loss.item()} at step {self.state.global_step}; clips of the "
                f"batch: {', '.join(ids)}. No update was made"
            )
        if model.training:
            mask = inputs["input_features_mask"]
            self.seconds += seconds
            self.padded += seconds * mask.numel() / int(mask.sum())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trained tensors, config, processor and code; base weights only in the final save."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, self_contained=False)
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS
        (model or self.model).load_tensors(load_file(path), str(path))


class StepLine(TrainerCallback):
    """Prints a line for each log, and appends it to `log.jsonl` in the run's folder."""

    def __init__(self, path: Path, trainer_of: dict[str, Any]) -> None:
        self.path, self.box = path, trainer_of
        self.started = self.last = time.monotonic()
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = self.last = time.monotonic()
        self.first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        """Loss, learning rate, audio-seconds/s, padding, dropped examples, ETA."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        trainer: ASRTrainer = self.box["trainer"]
        now = time.monotonic()
        speed = trainer.seconds / max(now - self.last, 1e-9)
        padding = 1 - trainer.seconds / max(trainer.padded, 1e-9)
        done = max(1, state.global_step - self.first_step)
        eta = (now - self.started) / done * (state.max_steps - state.global_step)
        dropped = sum(trainer.dropped.counts.values())
        trainer.seconds, trainer.padded, self.last = 0.0, 0.0, now
        row = {
            "step": state.global_step,
            **{k: float(v) for k, v in logs.items()},
            "audio_seconds_per_second": round(speed, 1),
            "padding": round(padding, 4),
            "dropped": dropped,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        loss, rate = float(logs["loss"]), float(logs["learning_rate"])
        print(
            f"step {state.global_step:>5}/{state.max_steps} "
            f"{100 * state.global_step / state.max_steps:3.0f} % | "
            f"loss {loss:.3f} | lr {rate:.1e} | {speed:.0f} s audio/s | "
            f"padding {100 * padding:.1f} % | dropped {dropped} | ETA {clock(eta)}",
            flush=True,
        )


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def part_of(name: str) -> str:
    """Which learning rate a parameter takes: projector (with the CTC head), encoder, decoder."""
    return name.split(".")[0] if name.startswith(("encoder.", "decoder.")) else "projector"


def part_rates(settings: dict[str, Any], default: float) -> dict[str, float]:
    """Learning rate of each part; one that is not set follows `learning_rate`, 0 freezes."""
    own = {p: settings[f"{p}_learning_rate"] for p in ("encoder", "decoder")}
    return {"projector": default, **{p: default if r is None else r for p, r in own.items()}}


def check_config(cfg: DictConfig) -> None:
    """Refuse keys that nothing reads, `+key=` additions included, with the nearest valid name.

    Raises:
        ValueError: naming the key.
    """
    known: Any = OmegaConf.load(CONFIGS / "config.yaml")
    known.model = OmegaConf.load(CONFIGS / "model/hubert_smollm3.yaml")
    known.data = OmegaConf.load(CONFIGS / "data/loquacious.yaml")
    training = OWN_TRAINING_KEYS | {field.name for field in fields(TrainingArguments)}
    check_keys(cfg, [*known, "training"], "the config")
    for group in ("run", "model", "encoder_lora", "peft", "data"):
        check_keys(cfg[group], known[group], group)
    check_keys(cfg.training, training, "training")
    for stage in cfg.stages:
        check_keys(stage, {"name", "training", "data"}, "a stage")
        check_keys(stage.get("training") or {}, training, f"stage {stage.name}: training")
        check_keys(stage.get("data") or {}, known.data, f"stage {stage.name}: data")


def build_processor(cfg: DictConfig, audio_config: Any) -> ASRProcessor:
    """The processor that `cfg` describes: the encoder's features, the decoder's tokens."""
    kept = ("model_type", "conv_kernel", "conv_stride")
    geometry = {k: v for k, v in audio_config.to_dict().items() if k in kept}
    return ASRProcessor(
        AutoFeatureExtractor.from_pretrained(cfg.model.encoder_model_name),
        AutoTokenizer.from_pretrained(cfg.model.decoder_model_name),
        encoder=geometry,
        stack=cfg.model.stack,
        prompt_prefix=cfg.model.prompt_prefix,
        prompt_suffix=cfg.model.prompt_suffix,
        end_token=cfg.model.end_token,
        tail_seconds=cfg.model.tail_seconds,
        max_seconds=cfg.model.max_seconds,
    )


def lora_from(group: DictConfig, method: str | None = "lora") -> dict[str, Any] | None:
    """LoRA settings of a config group; rank 0, null, or another method than lora mean none."""
    if method not in ("lora", None):
        raise ValueError(f"peft.peft_method must be lora or null, not {method!r}")
    if not group.r or method is None:
        return None
    settings: Any = OmegaConf.to_container(group)
    settings.pop("peft_method", None)
    return settings


def build_model(cfg: DictConfig, start: str | None, ctc_token_ids: list[int] | None) -> ASRModel:
    """A model on its base models, its trained parts fresh or from the folder `start`.

    Raises:
        ValueError: when `start` holds tensors that this config has no place for.
    """
    settings = cfg.model
    config = ASRConfig(
        encoder_name=settings.encoder_model_name,
        decoder_name=settings.decoder_model_name,
        encoder_revision=settings.encoder_revision,
        decoder_revision=settings.decoder_revision,
        stack=settings.stack,
        projector_hidden=settings.projector_hidden,
        projector_dropout=settings.projector_dropout,
        bridge=settings.bridge,
        encoder_lora=lora_from(cfg.encoder_lora),
        decoder_lora=lora_from(cfg.peft, cfg.peft.peft_method),
        ctc_token_ids=ctc_token_ids,
        ctc_decode_weight=settings.ctc_decode_weight,
        prompt_prefix=settings.prompt_prefix,
        prompt_suffix=settings.prompt_suffix,
    )
    dtype = cfg.training.dtype and getattr(torch, cfg.training.dtype)
    attention = cfg.training.attn_implementation
    model = ASRModel.from_base(config, dtype=dtype, attn_implementation=attention)
    if start:
        model.load_tensors(load_file(Path(start) / WEIGHTS), str(start), fresh_lora=True)
    return model


def ctc_vocabulary(data: SpeechDataset) -> list[int]:
    """Token ids that occur in the training transcripts, ascending."""
    return sorted({token for example in data.examples for token in example.target})


def describe(model: ASRModel) -> str:
    """A table of the parts: parameters in total and trained, dtype, mode."""
    lines = [f"{'part':<12}{'total':>16}{'trained':>14}  {'dtype':<10}mode"]
    for part in ("encoder", "projector", "ctc", "residual", "decoder"):
        module = getattr(model, part)
        if module is None:
            continue
        tensors = list(module.parameters())
        total = sum(p.numel() for p in tensors)
        trained = sum(p.numel() for p in tensors if p.requires_grad)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        mode = "trained" if trained else "frozen"
        lines.append(f"{part:<12}{total:>16,}{trained:>14,}  {dtype:<10}{mode}")
    return "\n".join(lines)


def cache_encoder_frames(model: ASRModel, data: SpeechDataset, path: Path, workers: int) -> None:
    """Run the frozen encoder once over `data`, into `path`, and have `data` serve its frames.

    A frozen encoder gives the same frames in every epoch; for a small recipe that trains many
    epochs they cost more than everything else. Kept in fp16, read from disk when asked for.
    """
    if model.encoder_is_trained:
        raise ValueError("training.cache_encoder needs a frozen encoder: set encoder_lora.r=0")
    if not path.exists():
        unique = {example.id: i for i, example in enumerate(data.examples)}
        order = sorted(unique.values(), key=lambda i: data.examples[i].duration)
        batches = [order[i : i + 16] for i in range(0, len(order), 16)]
        loader = DataLoader(
            data, batch_sampler=batches, collate_fn=data.collate, num_workers=workers
        )
        frames: dict[str, torch.Tensor] = {}
        with torch.inference_mode(), tqdm(total=len(order), desc="encoding", unit="clip") as bar:
            for batch in loader:
                for item in batch["dropped"]:
                    data.dropped.add(item["id"], item["reason"], item["detail"])
                audio = {
                    k: batch[k].to(model.device) for k in ("input_features", "input_features_mask")
                }
                hidden, lengths = model.encode(**audio)
                for clip, rows, n in zip(batch["ids"], hidden, lengths, strict=True):
                    frames[clip] = rows[:n].half().cpu().clone()
                bar.update(len(batch["ids"]))
        save_file(frames, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    data.serve_encoded(safe_open(path, "pt"))


def stage_config(cfg: DictConfig, stage: DictConfig) -> DictConfig:
    """The config with one stage's overrides of `training` and `data` merged in."""
    merged = OmegaConf.merge(cfg, {k: stage[k] for k in ("training", "data") if stage.get(k)})
    return merged  # type: ignore[return-value]


def run_stage(cfg: DictConfig, folder: Path, start: str | None) -> Path:
    """Train one stage in `folder`, from the trained folder `start`; returns its `final` folder."""
    final = folder / "final"
    if (final / FINISHED).exists():
        print(f"{folder}: finished before, kept")
        return final
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(cfg.run.seed)
    settings: dict[str, Any] = OmegaConf.to_container(cfg.training, resolve=True)  # type: ignore
    dropped = Dropped(folder / "dropped.jsonl")
    previous = ASRConfig.from_pretrained(start) if start else None
    audio_config = AutoConfig.from_pretrained(cfg.model.encoder_model_name)
    processor = build_processor(cfg, audio_config)
    data = SpeechDataset(
        cfg.data.train,
        processor,
        dropped,
        min_seconds=cfg.data.min_seconds,
        max_seconds=cfg.data.max_seconds,
        lowercase=cfg.data.lowercase,
        max_samples=cfg.data.max_train_samples,
        feature_noise=cfg.data.feature_noise,
        channel_drop=cfg.data.channel_drop,
        time_mask=cfg.data.time_mask,
        seed=cfg.run.seed,
    )
    dropped.check(data.total, cfg.data.max_dropped_fraction)
    uses_ctc = cfg.model.ctc
    vocabulary = (previous.ctc_token_ids if previous else ctc_vocabulary(data)) if uses_ctc else []
    model = build_model(cfg, start, vocabulary)
    model.config.audio_token_id = processor.audio_token_id
    model.config.end_token_id = processor.end_token_id
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = (
        processor.end_token_id
    )
    rates = part_rates(settings, settings["learning_rate"])
    for name, parameter in model.named_parameters():
        if not rates[part_of(name)]:
            parameter.requires_grad_(False)  # frozen in this stage
    hours = sum(example.duration for example in data.examples) / 3600
    print(describe(model))
    print(f"{len(data)} clips, {hours:.2f} h an epoch; dropped: {dropped}")
    if settings["cache_encoder"]:
        path = folder.parent / "encoder_frames.safetensors"
        cache_encoder_frames(model, data, path, settings["dataloader_num_workers"])
    arguments = {k: v for k, v in settings.items() if k not in OWN_TRAINING_KEYS}
    box: dict[str, Any] = {}
    trainer = ASRTrainer(
        settings,
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            seed=cfg.run.seed,
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            **arguments,
        ),
        train_dataset=data,
        processing_class=processor,
        callbacks=[StepLine(folder / "log.jsonl", box)],
    )
    box["trainer"] = trainer
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    resume = settings["resume_from_checkpoint"] or get_last_checkpoint(str(folder))
    if resume:
        print(f"continuing from {resume}")
    trainer.train(resume_from_checkpoint=resume)
    dropped.check(data.total, cfg.data.max_dropped_fraction)
    trainer.save_model(str(final))
    summary = {"steps": trainer.state.global_step, "seconds": time.monotonic() - started}
    (final / FINISHED).write_text(json.dumps(summary) + "\n")
    return final


def train(cfg: DictConfig) -> Path:
    """Run every stage of a composed config; returns the folder of the finished model."""
    check_config(cfg)
    output = Path(cfg.run.output_dir)
    if cfg.run.fresh and output.exists():
        shutil.rmtree(output)
    if (output / FINISHED).exists():
        print(f"{output} is finished; run.fresh=true starts anew")
        return output
    started = time.monotonic()
    start = cfg.model.pretrained_model_path
    for stage in cfg.stages:
        print(f"\n== stage {stage.name}")
        final = run_stage(stage_config(cfg, stage), output / stage.name, start)
        start = str(final)
    model = ASRModel.from_pretrained(start)
    model.save_pretrained(output)
    processor = ASRProcessor.from_pretrained(start)
    processor.save_pretrained(output)
    OmegaConf.save(cfg, output / "training_config.yaml")
    (output / FINISHED).write_text(json.dumps({"seconds": time.monotonic() - started}) + "\n")
    print(f"model saved in {output}")
    return output


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base=None)
def main(cfg: DictConfig) -> None:
    """Train what the composed config describes; errors are one line, not a stack."""
    try:
        train(cfg)
    except (ValueError, OSError, DataError) as error:
        if os.environ.get("TINY_AUDIO_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from the last checkpoint")
