"""The recipe `stage1` with random base models and clips of noise.

For measurements at full size on machines that cannot download anything.
"""

import gc
import json
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
)

from tiny_audio.asr.asr_audio import SAMPLE_RATE
from tiny_audio.commands.plan import recipe_stages
from tiny_audio.training.build import build_model, build_processor

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
SIZES = {"encoder": "hubert-xlarge-ls960-ft.json", "decoder": "SmolLM3-3B.json"}
TOY: dict[str, Row] = {
    "encoder": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "intermediate_size": 64, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16,
                "num_conv_pos_embedding_groups": 2},
    "decoder": {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
                "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 600,
                "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}  # fmt: skip
TOY_RECIPE = ["model.projector_hidden=32", "model.ctc_hidden=32", "encoder_lora.r=2", "peft.r=2",
              "data.max_seconds=4", "training.batch_seconds=6",
              "training.dataloader_num_workers=0"]  # fmt: skip
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "ai", "ou")]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
PROMPT_WORDS = ["user", "assistant", "Transcribe"]
ALPHABET = sorted(b"abcdefghijklmnopqrstuvwxyz '")
MEAN_SECONDS, WORDS_A_SECOND, TOKENS_A_SECOND = 8.4, 2.2, 3.0


@dataclass
class Bench:
    """Settings and state that the parts share.

    Attributes:
        work: folder of the base models, clips and runs.
        tiny: whether to use toy sizes.
        assets: the quickstart's cache folder, for `learning`.
        minutes: length of `learning` in minutes.
        device: "cuda" or "cpu".
        counted: results of `plan.expected_cost` by stage, see `train_stage`.
    """

    work: Path
    tiny: bool
    assets: str | None = None
    minutes: float = 3.0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    counted: dict[str, tuple[float, str]] = field(default_factory=dict)

    def size(self, real: Any, toy: Any) -> Any:
        """Return `toy` at toy sizes, otherwise `real`."""
        return toy if self.tiny else real

    @property
    def mean(self) -> float:
        """Average length of a clip in seconds."""
        return self.size(MEAN_SECONDS, 1.2)

    def overrides(self) -> list[str]:
        """Overrides for random base models and noise, without evaluation and checkpoints."""
        bases = [f"model.{part}_model_name={self.work / part}" for part in SIZES]
        bases += [f"model.{part}_revision=null" for part in SIZES]
        quiet = ["eval_strategy=no", "load_best_model_at_end=false", "save_strategy=no"]
        quiet += ["early_stopping_patience=null", "report_to=none", "push_to_hub=false"]
        quiet += ["warmup_steps=1", f"logging_steps={self.size(3, 1)}"]
        data = f"data.train=[{{path: {self.work / 'clips.jsonl'}}}]"
        ours = [*bases, data, "data.max_dropped_fraction=1", *(f"training.{q}" for q in quiet)]
        return ["+experiments=stage1", *ours, *(TOY_RECIPE if self.tiny else [])]

    def stage(self, name: str, *changes: str) -> Any:
        """The config of a stage of the recipe."""
        stages = recipe_stages([*self.overrides(), *changes])
        return next(cfg for cfg in stages if cfg.stages[0].name == name)

    def now(self) -> float:
        """The time in seconds, after waiting for the device to finish its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start_counting(self) -> None:
        """Free unused memory and reset the peak."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> Row:
        """Peak memory in GB; empty on a CPU."""
        if self.device != "cuda":
            return {}
        peaks = {"allocated": torch.cuda.max_memory_allocated()}
        peaks["reserved"] = torch.cuda.max_memory_reserved()
        return {f"{name} GB": peak / 1e9 for name, peak in peaks.items()}


def sentence(words: list[str], count: int, rng: np.random.Generator) -> str:
    """Draw words by Zipf's law: the r-th of the list with a probability proportional to 1 / r."""
    ranks = len(words) ** rng.random(count) - 1
    return " ".join(words[int(rank)] for rank in ranks)


def lexicon(bench: Bench) -> list[str]:
    """Make up words of one to three syllables, ordered by frequency rank."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 4, bench.size(20_000, 60))
    return list(dict.fromkeys("".join(rng.choice(SYLLABLES, count)) for count in counts))


def make_bases(bench: Bench) -> None:
    """Write the configs, feature extractor and tokenizer of the base models, but no weights."""
    for part, file in SIZES.items():
        known = json.loads((ROOT / "tests/fixtures" / file).read_text())
        sizes = {key: value for key, value in known.items() if key[0] != "_"}
        config: Any = AutoConfig.for_model(**sizes | bench.size({}, TOY[part]))
        config.save_pretrained(bench.work / part)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    extractor.save_pretrained(bench.work / "encoder")
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": letters, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=bench.size(6_000, 500), **options)
    known_words = [f" {word}" for word in lexicon(bench)]
    tokenizer.train_from_iterator([*PROMPT_WORDS * 99, *known_words], trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(bench.work / "decoder")


def make_clips(bench: Bench) -> None:
    """Write clips of noise, a manifest with random texts, and a list of words with counts."""
    lengths = np.random.default_rng(1).gamma(2.2, size=bench.size(480, 24))
    lengths = np.clip(lengths * bench.mean / lengths.mean(), 0.4, 3.5 * bench.mean).tolist()
    rows = []
    clips = zip(lengths, *noise_and_texts(bench, lengths, seed=1), strict=True)
    for i, (seconds, noise, text) in enumerate(clips):
        with wave.open(str(bench.work / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes((noise * 32767).clip(-32768, 32767).astype("<i2").tobytes())
        rows.append({"id": str(i), "audio": f"{i}.wav", "text": text, "duration": seconds})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (bench.work / "clips.jsonl").write_text(lines)
    words = enumerate(lexicon(bench), 1)
    counts = "".join(f"{word}\t{1_000_000 // rank}\n" for rank, word in words)
    (bench.work / "words.tsv").write_text(counts)


@contextmanager
def weights(device: str) -> Iterator[None]:
    """Within this context, base models get random weights on the device instead of being loaded."""

    def draw(kind: Any, name: str, dtype: Any = None, **_: Any) -> Any:
        with torch.device(device):
            made = kind.from_config(AutoConfig.from_pretrained(name), dtype=dtype)
        return made, {"missing_keys": []}

    kinds = (AutoModel, AutoModelForCausalLM)
    with (
        patch.object(kinds[0], "from_pretrained", partial(draw, kinds[0])),
        patch.object(kinds[1], "from_pretrained", partial(draw, kinds[1])),
    ):
        yield


def noise_and_texts(
    bench: Bench, seconds: list[float], seed: int
) -> tuple[list[np.ndarray], list[str]]:
    """Make clips (n,) of noise of these lengths, and a text for each."""
    rng, words = np.random.default_rng(seed), lexicon(bench)
    noise = [rng.standard_normal(int(s * SAMPLE_RATE)).astype(np.float32) / 10 for s in seconds]
    return noise, [sentence(words, max(1, round(WORDS_A_SECOND * s)), rng) for s in seconds]


def model(bench: Bench, cfg: Any) -> tuple[Any, Any]:
    """Build the processor and model of a stage as the recipe does, with both CTC heads."""
    processor = build_processor(cfg)
    with weights(bench.device):
        return processor, build_model(cfg, processor, (list(range(300, 400)), ALPHABET))


class FixedPosteriors(nn.Module):
    """A character head that returns given posteriors; random weights would output noise."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.log_probs = head, torch.empty(0)

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the head on (b, t, d) for its cost, but return the fixed posteriors (b, t, c)."""
        self.head(hidden)
        return self.log_probs


def posteriors(letters: list[int], frames: int, rng: np.random.Generator) -> Tensor:
    """Make log-probabilities (frames, classes) that resemble those of a trained head.

    Most frames are blank. Each letter is a spike of one frame, with one rival letter.
    """
    logits = rng.normal(0, 1, (frames, len(ALPHABET) + 1))
    logits[:, 0] += 16
    letters = letters[: frames // 2]
    at = np.linspace(0, frames - 2, len(letters)).astype(int)
    logits[at, 0] -= 16
    logits[at, letters] += rng.uniform(4, 8, len(letters))
    logits[at, rng.integers(1, len(ALPHABET) + 1, len(letters))] += rng.uniform(0, 6, len(letters))
    return torch.from_numpy(logits).log_softmax(-1)
