"""The recipe: a Hydra config in, a trained model out, stage by stage.

`python src/train.py +experiments=quickstart peft.r=32` composes
`configs/hydra`, refuses unknown keys, and runs each of `stages` with the Hugging Face Trainer. The
same command again continues where it stopped.
"""

import ctypes
import hashlib
import json
import logging
import os
import shutil
import string
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
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

from .asr_config import ASRConfig, check_keys
from .asr_ctc import spell
from .asr_modeling import WEIGHTS, ASRModel
from .asr_processing import ASRProcessor
from .data import DataError, Dropped, Frames, FrameWriter, LengthBatchSampler, SpeechDataset
from .hub import HubPusher, PushError, git_hash, hub_target, model_card, push_folder

logger = logging.getLogger(__name__)
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "hydra"
FINISHED = "finished.json"
# Settings of the training group that are ours; every other one is a field of TrainingArguments.
OWN_TRAINING_KEYS = set(
    "batch_seconds decoder_loss_weight ctc_loss_weight ctc_negatives character_loss_weight "
    "encoder_learning_rate decoder_learning_rate cache_encoder resume_from_checkpoint dtype "
    "attn_implementation per_device_train_batch_size push_to_hub hub_model_id".split()
)
# Passed to `forward`.
LOSS_KEYS = ("decoder_loss_weight", "ctc_loss_weight", "ctc_negatives", "character_loss_weight")


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
            most=self.settings["per_device_train_batch_size"],
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
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; a loss that is not finite stops the run and names its clips."""
        inputs = dict(inputs)
        ids, seconds = inputs.pop("ids"), inputs.pop("seconds")
        for item in inputs.pop("dropped"):
            self.dropped.add(item["id"], item["reason"], item["detail"])
        settings = {key: self.settings[key] for key in LOSS_KEYS}
        outputs = model(**inputs, **settings, num_items_in_batch=num_items_in_batch)
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

    def __init__(self, path: Path, trainer: ASRTrainer) -> None:
        self.path, self.trainer = path, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = self.last = time.monotonic()
        self.first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        """Loss, learning rate, audio-seconds/s, padding, dropped examples, ETA."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        trainer, now = self.trainer, time.monotonic()
        speed = trainer.seconds / max(now - self.last, 1e-9)
        padding = 1 - trainer.seconds / max(trainer.padded, 1e-9)
        done = max(1, state.global_step - self.first_step)
        eta = (now - self.started) / done * (state.max_steps - state.global_step)
        dropped = sum(trainer.dropped.counts.values())
        trainer.seconds, trainer.padded, self.last = 0.0, 0.0, now
        row = {"step": state.global_step, **{k: float(v) for k, v in logs.items()}}
        row |= {"audio_seconds_per_second": speed, "padding": padding, "dropped": dropped}
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


def refuse_shadowed(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse `training.x=...` on the command line where a stage would overrule it."""
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        group, _, name = key.partition(".")
        for i, stage in enumerate(cfg.stages):
            if name and name in (stage.get(group) or {}):
                raise ValueError(
                    f"{key} is overruled by stage {stage.name}: set stages.{i}.{key} instead"
                )


def build_processor(cfg: DictConfig) -> ASRProcessor:
    """The processor that `cfg` describes: the encoder's features, the decoder's tokens."""
    audio_config = AutoConfig.from_pretrained(cfg.model.encoder_model_name)
    audio_config = vars(audio_config).get("encoder_config", audio_config)  # of Parakeet's models
    geometry = ("model_type", "conv_kernel", "conv_stride", "subsampling_factor")
    own = ("stack", "prompt_prefix", "prompt_suffix", "end_token", "tail_seconds", "max_seconds")
    return ASRProcessor(
        AutoFeatureExtractor.from_pretrained(cfg.model.encoder_model_name),
        AutoTokenizer.from_pretrained(cfg.model.decoder_model_name),
        encoder={k: v for k, v in audio_config.to_dict().items() if k in geometry},
        **{key: cfg.model[key] for key in own},
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


def build_model(
    cfg: DictConfig,
    processor: ASRProcessor,
    ctc: tuple[list[int], list[int], set[int]] = ([], [], set()),
    start: str | None = None,
) -> ASRModel:
    """A model on its base models, its trained parts fresh or from the folder `start`.

    `ctc` is what `ctc_vocabulary` returns; an empty list leaves that head out.

    Raises:
        ValueError: when `start` holds tensors that this config has no place for.
    """
    own = "stack projector_hidden projector_dropout bridge encoder_revision decoder_revision "
    own += "ctc_decode_weight ctc_hidden prompt_prefix prompt_suffix"
    config = ASRConfig(
        encoder_name=cfg.model.encoder_model_name,
        decoder_name=cfg.model.decoder_model_name,
        encoder_lora=lora_from(cfg.encoder_lora),
        decoder_lora=lora_from(cfg.peft, cfg.peft.peft_method),
        ctc_token_ids=ctc[0],
        ctc_alphabet=ctc[1],
        audio_token_id=processor.audio_token_id,
        end_token_id=processor.end_token_id,
        **{key: cfg.model[key] for key in own.split()},
    )
    dtype = cfg.training.dtype and getattr(torch, cfg.training.dtype)
    attention = cfg.training.attn_implementation
    model = ASRModel.from_base(config, dtype=dtype, attn_implementation=attention)
    model.generation_config.num_beams = cfg.model.num_beams
    if model.characters is not None:
        spelling = model.characters.spelling
        spelling.copy_(spell(processor.tokenizer, ctc[1], len(spelling), ctc[2]))
    if start:
        model.load_tensors(load_file(Path(start) / WEIGHTS), str(start), fresh_lora=True)
    return model


def ctc_vocabulary(data: SpeechDataset) -> tuple[list[int], list[int], set[int]]:
    """What occurs in the training transcripts: token ids, lower-case bytes but punctuation (', the
    apostrophe, is a letter), and bytes as written."""
    tokens = {token for example in data.examples for token in example.target}
    written = {byte for example in data.examples for byte in f" {example.text}".encode()}
    spoken = set(bytes(written).lower()) - set(string.punctuation.encode())
    return sorted(tokens), sorted(spoken | (written & set(b"'"))), written


def describe(model: ASRModel) -> str:
    """A table of the parts: parameters in total and trained, dtype, mode."""
    lines = [f"{'part':<12}{'total':>16}{'trained':>14}  {'dtype':<10}mode"]
    for part, module in model.named_children():
        tensors = list(module.parameters())
        total = sum(p.numel() for p in tensors)
        trained = sum(p.numel() for p in tensors if p.requires_grad)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        mode = "trained" if trained else "frozen"
        lines.append(f"{part:<12}{total:>16,}{trained:>14,}  {dtype:<10}{mode}")
    return "\n".join(lines)


def fit_device(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what only a GPU has (bf16, TF32), each named where it is turned off."""
    fitted = dict(settings)
    if not torch.cuda.is_available():
        for key, instead in (("bf16", False), ("tf32", None), ("dtype", None)):
            if fitted.get(key):
                print(f"training.{key}={fitted[key]} is off: there is no CUDA device")
                fitted[key] = instead
    return fitted


def return_freed_memory() -> None:
    """Have glibc give back what tensors of ever new sizes left in its heap: 1.5 GB otherwise."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # not in musl
            libc.malloc_trim(0)


def cache_encoder_frames(model: ASRModel, data: SpeechDataset, path: Path, workers: int) -> None:
    """Run the frozen encoder once over `data`, into `path`, and have `data` serve its frames.

    A frozen encoder gives the same frames in every epoch; for a small recipe that trains many
    epochs they cost more than everything else. Kept in fp16, read from disk when asked for.
    """
    if model.encoder_is_trained:
        raise ValueError("training.cache_encoder needs a frozen encoder: set encoder_lora.r=0")
    if not path.exists():
        order = list({example.id: i for i, example in enumerate(data.examples)}.values())
        seconds = [data.examples[i].duration for i in order]
        # By length: a batch of long clips would need gigabytes for their attention scores.
        budget = LengthBatchSampler(seconds, max(64.0, *seconds), shuffle=False)
        batches = [[order[i] for i in batch] for batch in budget]
        loader = DataLoader(
            data, batch_sampler=batches, collate_fn=data.collate, num_workers=workers
        )
        writer, bar = FrameWriter(path), tqdm(total=len(order), desc="encoding", unit="clip")
        with torch.inference_mode(), writer, bar:
            for batch in loader:
                for item in batch["dropped"]:
                    data.dropped.add(item["id"], item["reason"], item["detail"])
                audio = {
                    k: batch[k].to(model.device) for k in ("input_features", "input_features_mask")
                }
                hidden, lengths = model.encode(**audio)
                for clip, rows, n in zip(batch["ids"], hidden, lengths, strict=True):
                    writer.add(clip, rows[:n].half().cpu().numpy())
                bar.update(len(batch["ids"]))
                return_freed_memory()
    data.serve_encoded(Frames(path))


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; one that a kill cut short is removed. The state comes last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            print(f"{path}: was cut short, removed")
            shutil.rmtree(path)
    return None


def run_stage(cfg: DictConfig, folder: Path, start: str | None, hub_id: str | None = None) -> Path:
    """Train one stage in `folder`, from the trained folder `start`; returns its `final` folder.

    Each checkpoint is pushed to `hub_id`, if there is one.
    """
    final = folder / "final"
    if (final / FINISHED).exists():
        print(f"{folder}: finished before, kept")
        return final
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(cfg.run.seed)
    settings = fit_device(OmegaConf.to_container(cfg.training, resolve=True))  # type: ignore
    cfg.training.dtype = settings["dtype"]
    dropped = Dropped(folder / "dropped.jsonl")
    previous = ASRConfig.from_pretrained(start) if start else None
    processor = build_processor(cfg)
    kept = {k: v for k, v in cfg.data.items() if k not in ("train", "max_dropped_fraction")}
    data = SpeechDataset(cfg.data.train, processor, dropped, seed=cfg.run.seed, **kept)
    dropped.check(data.total, cfg.data.max_dropped_fraction)
    tokens, alphabet, written = ctc_vocabulary(data)
    if previous:  # its own spelling comes with its weights
        tokens, alphabet = previous.ctc_token_ids, previous.ctc_alphabet
    heads = (tokens if cfg.model.ctc else [], alphabet if cfg.model.ctc_characters else [], written)
    model = build_model(cfg, processor, heads, start)
    rates = part_rates(settings, settings["learning_rate"])
    for name, parameter in model.named_parameters():
        if not rates[part_of(name)]:
            parameter.requires_grad_(False)  # frozen in this stage
    hours = sum(example.duration for example in data.examples) / 3600
    print(describe(model))
    print(f"{len(data)} clips, {hours:.2f} h an epoch; dropped: {dropped}")
    if settings["cache_encoder"]:
        made_of = [cfg.model.encoder_model_name, model.config.encoder_revision, settings["dtype"]]
        made_of += [processor.tail_seconds, processor.min_seconds]
        made_of += sorted({(e.id, str(e.audio)[:200], e.duration) for e in data.examples})
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
        path = folder.parent / f"encoder_frames-{digest}.json"
        cache_encoder_frames(model, data, path, workers=2)  # there are mel features to compute
        dropped.check(data.total, cfg.data.max_dropped_fraction)
    arguments = {k: v for k, v in settings.items() if k not in OWN_TRAINING_KEYS}
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
    )
    trainer.add_callback(StepLine(folder / "log.jsonl", trainer))
    trainer.remove_callback(PrinterCallback)
    if hub_id:
        trainer.add_callback(HubPusher(hub_id))
    started = time.monotonic()
    resume = settings["resume_from_checkpoint"] or last_checkpoint(folder)
    if resume:
        print(f"continuing from {resume}")
    trainer.train(resume_from_checkpoint=resume)
    dropped.check(data.total, cfg.data.max_dropped_fraction)
    trainer.save_model(str(final))
    parameters = list(model.parameters())
    summary = {
        "name": folder.name,
        "steps": trainer.state.global_step,
        "clips": len(data),
        "hours": hours,
        "seconds": time.monotonic() - started,
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }
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
    hub_id = hub_target(cfg.training.push_to_hub, cfg.training.hub_model_id)
    started = time.monotonic()
    start = cfg.model.pretrained_model_path
    for stage in cfg.stages:
        print(f"\n== stage {stage.name}")
        own = {k: stage[k] for k in ("training", "data") if stage.get(k)}
        merged: Any = OmegaConf.merge(cfg, own)
        start = str(run_stage(merged, output / stage.name, start, hub_id))
    ASRModel.from_pretrained(start).save_pretrained(output)
    ASRProcessor.from_pretrained(start).save_pretrained(output)
    OmegaConf.save(cfg, output / "training_config.yaml")
    stages = [json.loads((output / s.name / "final" / FINISHED).read_text()) for s in cfg.stages]
    facts = {key: max(stage[key] for stage in stages) for key in ("parameters", "trained")}
    facts |= {"seconds": time.monotonic() - started, "stages": stages, "git_hash": git_hash()}
    facts["command"] = " ".join(["python", *sys.argv])
    (output / "README.md").write_text(model_card(output, facts))
    (output / FINISHED).write_text(json.dumps(facts) + "\n")
    print(f"model saved in {output}")
    if hub_id:
        print(f"pushed to {push_folder(output, hub_id, 'the finished model')}")
    return output


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base=None)
def main(cfg: DictConfig) -> None:
    """Train what the composed config describes; errors are one line, not a stack."""
    try:
        refuse_shadowed(cfg, HydraConfig.get().overrides.task)
        train(cfg)
    except (ValueError, OSError, DataError, PushError) as error:
        if os.environ.get("TINY_AUDIO_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from the last checkpoint")
