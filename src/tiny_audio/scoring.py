"""Word error rate with its error types and a bootstrap interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jiwer
import numpy as np

RESAMPLES = 2000


@cache
def normalizer() -> Any:
    """The Whisper English normaliser (Radford et al. 2022, appendix C)."""
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


@dataclass(frozen=True)
class Counts:
    """Word errors of one utterance, or of many when added up."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0

    @property
    def errors(self) -> int:
        """All word errors."""
        return self.substitutions + self.deletions + self.insertions


def count(reference: str, hypothesis: str) -> Counts:
    """Word errors of normalised texts; every word against an empty reference is an insertion."""
    if not reference.split():
        return Counts(insertions=len(hypothesis.split()))
    out = jiwer.process_words(reference, hypothesis)
    words = out.hits + out.substitutions + out.deletions
    return Counts(out.substitutions, out.deletions, out.insertions, words)


def interval(errors: Sequence[int], words: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval over utterances of the corpus WER, in percent.

    Percentiles of 2,000 resamples (Bisani & Ney 2004, "Bootstrap estimates for confidence
    intervals in ASR performance evaluation").
    """
    e, w = np.asarray(errors, float), np.asarray(words, float)
    rows = np.random.default_rng(seed).integers(0, len(e), (RESAMPLES, len(e)))
    rates = 100 * e[rows].sum(1) / np.maximum(w[rows].sum(1), 1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def score(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, Any]:
    """Corpus figures of raw texts after normalisation: `wer`, `wer_low`, `wer_high` and `cer` in
    percent, counts of error types, words and utterances, and `wer_raw` without normalisation.

    Raises:
        ValueError: when there is nothing to score.
    """
    if not references:
        raise ValueError("no utterance was scored")
    refs = [normalizer()(text) for text in references]
    hyps = [normalizer()(text) for text in hypotheses]
    counts = [count(r, h) for r, h in zip(refs, hyps, strict=True)]
    raw = [count(r, h) for r, h in zip(references, hypotheses, strict=True)]
    errors, words = [c.errors for c in counts], [c.words for c in counts]
    low, high = interval(errors, words)
    letters = [(r, h) for r, h in zip(refs, hyps, strict=True) if r]
    return {
        "wer": 100 * sum(errors) / max(1, sum(words)),
        "wer_low": low,
        "wer_high": high,
        "cer": 100 * jiwer.cer([r for r, _ in letters], [h for _, h in letters])
        if letters
        else 0.0,
        "wer_raw": 100 * sum(c.errors for c in raw) / max(1, sum(c.words for c in raw)),
        "substitutions": sum(c.substitutions for c in counts),
        "deletions": sum(c.deletions for c in counts),
        "insertions": sum(c.insertions for c in counts),
        "words": sum(words),
        "utterances": len(references),
    }
