"""The Hugging Face Trainer with length-budget batches, a learning rate for each part, and WER.

A callback saves and stops when a signal comes.
"""

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState

from ..asr.asr_config import IGNORE
from ..asr.asr_decoding import transcribe
from ..asr.asr_saving import WEIGHTS
from ..errors import Preempted
from ..evaluation.scoring import score
from .batches import LengthBatchSampler
from .checks import Dropped
from .frames import return_freed_memory
from .manifests import DataError
from .parts import part_of, part_rates
from .plan import GPUS, gpu_of
from .stream import SpeechStream

# Settings that are passed to `ASRModel.forward`.
LOSS_KEYS = ("decoder_loss_weight", "ctc_loss_weight", "ctc_negatives", "character_loss_weight")
MIN_SEEN = 200  # examples of a stream to read before checking its share of dropped ones


class ASRTrainer(Trainer):
    """The Hugging Face Trainer with length-budget batches and a learning rate for each part.

    Args:
        settings: the training group of the config.
        gflop: GFLOP per second of audio, see `plan.expected_cost`.
        args, kwargs: arguments of `Trainer`.
    """

    model: Any
    processing_class: Any

    def __init__(self, settings: dict[str, Any], gflop: float, *args: Any, **kwargs: Any) -> None:
        self.settings, self.gflop = settings, gflop
        self.dropped: Dropped = kwargs["train_dataset"].dropped
        # Since the last log line:
        self.seconds = self.padded = 0.0  # seconds of audio, without and with padding
        self.waited = 0.0  # seconds spent waiting for batches
        self.position: Any = None  # in a stream, after the last batch
        gpu = gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.peak = GPUS[gpu]["tflops"] if gpu else None  # TFLOP/s
        self.logged_at = time.monotonic()
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # `forward` takes num_items_in_batch
        self.add_callback(Preemption(self))

    def get_train_dataloader(self) -> DataLoader:
        """Batches within `training.batch_seconds`; (seed, epoch) determines their order."""
        data: Any = self.train_dataset
        workers = self.args.dataloader_num_workers
        loading: dict[str, Any] = {
            # A separate generator, so that resuming does not consume the run's random numbers.
            "generator": torch.Generator().manual_seed(self.args.seed),
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "pin_memory": self.args.dataloader_pin_memory and torch.cuda.is_available(),
            "worker_init_fn": ignore_first_sigterm,
        }
        if isinstance(data, SpeechStream):  # one reader, which decodes in threads
            return DataLoader(data, batch_size=None, num_workers=min(1, workers), **loading)
        sampler = LengthBatchSampler(
            data.lengths,
            self.settings["batch_seconds"],
            self.args.seed,
            most=self.settings["per_device_train_batch_size"],
            multiple=self.args.world_size,
            largest_first=self.settings["largest_first"],
        )
        data.sampler = sampler  # a resumed process tells only its dataset the epoch
        # Workers do not persist: they must see the dataset's epoch.
        loader = DataLoader(
            data, batch_sampler=sampler, collate_fn=data.collate, num_workers=workers, **loading
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer with a group for each part, see `part_rates`."""
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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step; adds the time spent waiting for them to the log."""
        started = time.monotonic()
        batches = super().get_batch_samples(*args, **kwargs)
        self.waited += time.monotonic() - started
        return batches

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss; note the clips that could not be read, and the audio seen so far.

        Raises:
            DataError: if the loss is not finite, naming the clips of the batch; or if a stream
                dropped too many examples.
        """
        inputs = dict(inputs)
        ids, seconds = inputs.pop("ids"), inputs.pop("seconds")
        position, unread = inputs.pop("position", None), inputs.pop("dropped")
        for item in unread:
            self.dropped.add(item["id"], item["reason"], item["detail"])
        settings = {key: self.settings[key] for key in LOSS_KEYS}
        if not model.training:
            settings["ctc_negatives"] = 0  # use all classes, without sampling
        outputs = model(**inputs, **settings, num_items_in_batch=num_items_in_batch)
        if not torch.isfinite(outputs.loss):
            raise DataError(
                f"the loss is {outputs.loss.item()} at step {self.state.global_step}; the weights "
                f"were not updated. Clips of the batch: {', '.join(ids)}"
            )
        if model.training:
            mask = inputs["input_features_mask"]
            self.seconds += seconds
            self.padded += seconds * mask.numel() / int(mask.sum())
            self.position = position
            if position and (position["epoch"] or position["seen"] >= MIN_SEEN):
                self.dropped.check(position["seen"])
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                outputs.loss = outputs.loss * self.args.world_size  # DDP takes the mean
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @torch.no_grad()
    def evaluate(self, **_: Any) -> dict[str, float]:  # type: ignore[override]
        """Return loss and WER (percent) on the evaluation clips.

        A stage that trains the decoder also decodes with it; other stages use only the CTC search.
        Uses no random numbers, so training continues as if there had been no evaluation.

        Raises:
            DataError: if no clip can be read.
        """
        data: Any = self.eval_dataset
        model: Any = self.accelerator.unwrap_model(self.model)
        model.eval()
        loss, labels = 0.0, 0
        references: list[str] = []
        hypotheses: list[str] = []
        decode = None if self.settings["decoder_loss_weight"] else "ctc"
        for items in data.batches(self.settings["batch_seconds"]):
            batch: Any = self._prepare_inputs(data.collate([*items.values()]))
            n = int((batch["labels"] != IGNORE).sum())
            with self.compute_loss_context_manager():
                loss, labels = loss + n * float(self.compute_loss(model, batch)), labels + n
                hidden, steps = model.encode(batch["input_features"], batch["input_features_mask"])
                found = transcribe(model, self.processing_class, hidden, steps, decode)
            hypotheses += [transcript.text for transcript in found]
            references += [data.examples[row].text for row in items]
        model.train()
        if not references:
            raise DataError(f"no clip of data.eval can be read: {data.dropped}")
        wer = score(references, hypotheses, self.settings["language"])["wer"]
        metrics = {"eval_loss": loss / labels, "eval_wer": wer, "eval_clips": len(references)}
        self.log(metrics)
        self.logged_at = time.monotonic()  # exclude evaluation from the training speed
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed, padding, waiting and dropped examples to the logs.

        `waiting` is the share of the time spent waiting for batches.
        """
        if "loss" in logs:
            now = time.monotonic()
            logs["audio_seconds_per_second"] = self.seconds / max(now - self.logged_at, 1e-9)
            logs["padding"] = 1 - self.seconds / max(self.padded, 1e-9)
            logs["waiting"] = self.waited / max(now - self.logged_at, 1e-9)
            logs["dropped"] = sum(self.dropped.counts.values())
            if self.peak:
                rate = logs["audio_seconds_per_second"] * self.gflop / 1000
                logs["mfu"] = rate / self.peak  # of this process, like the audio
            self.seconds, self.padded, self.waited = 0.0, 0.0, 0.0
            self.logged_at = now
            return_freed_memory()  # batches of varying sizes fragment the heap
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what a run needs to continue, but no base weights.

        Beside tensors, config, processor and code: the position in a stream, and the dropped clips.
        """
        folder = str(output_dir or self.args.output_dir)
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.position is not None:  # every process saves its own
            path = Path(folder) / f"stream-{self.args.process_index}.json"
            path.write_text(json.dumps(self.position))
        if self.dropped.path and self.dropped.path.exists():
            shutil.copy(self.dropped.path, folder)
        model = self.accelerator.unwrap_model(self.model)
        tensors = model.checkpoint(self_contained=False)  # every process takes part
        if self.args.should_save:
            model.save_pretrained(folder, self_contained=False, state_dict=tensors)
            self.processing_class.save_pretrained(folder)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, but never past the last step.

        Trainer takes one step too many when it resumes from the checkpoint of the final step.
        """
        start = resume_from_checkpoint
        state = start and TrainerState.load_from_json(f"{start}/trainer_state.json")
        if state and (0 < self.args.max_steps <= state.global_step or stopped_early(state)):
            self.state = state
            best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
            return self._load_from_checkpoint(str(best or start))
        return super().train(start, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS
        (model or self.model).load_tensors(load_file(path), str(path))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        print(f"best: {best}, {self.args.metric_for_best_model} {self.state.best_metric:.2f}")
        self._load_from_checkpoint(str(best))


def stopped_early(state: Any) -> bool:
    """Whether early stopping had ended the run when it saved this TrainerState."""
    callback = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    patience = callback.get("args", {}).get("early_stopping_patience")
    waited = callback.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return patience is not None and waited >= patience


def ignore_first_sigterm(worker: int) -> None:
    """Keep a worker alive: Slurm, systemd and `timeout` send SIGTERM to all processes of a run.

    The main process needs the worker's batches until it has saved. A second signal ends the worker.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class Preemption(TrainerCallback):
    """Saves and stops after the current step on SIGTERM (spot preemption) or Ctrl-C.

    A second Ctrl-C stops at once. `received` is the number of the signal, or 0.
    """

    def __init__(self, trainer: ASRTrainer) -> None:
        self.trainer, self.received, self.before = trainer, 0, {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the signal handlers; refuse to train if FSDP was requested but not applied."""
        wrapped = self.trainer.model_wrapped
        if self.trainer.is_fsdp_enabled and not isinstance(wrapped, FSDPModule):
            kind = type(wrapped).__name__
            raise ValueError(f"FSDP was requested but not applied: the model is a {kind}")
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any process received a signal."""
        if args.world_size > 1:
            received = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received)
        if self.received:
            control.should_save = control.should_training_stop = True
            if args.save_total_limit == 1:  # at the end, Trainer would keep only the best one
                args.save_total_limit = 2

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the signal handlers; raise `Preempted` if a signal came."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received:
            raise Preempted(self.received)
