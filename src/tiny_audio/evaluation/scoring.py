"""Word error rate with its error types and a bootstrap interval, and the test of a difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import jiwer
import numpy as np

RESAMPLES = 2000


@cache
def normalizer(language: str = "en") -> Any:
    """The Whisper normaliser (Radford et al. 2022, appendix C): the English one, or the basic one
    for other languages, which keeps the vowel signs of scripts that have them.
    """
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer() if language == "en" else BasicTextNormalizer(preserve_marks=True)


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


def align(reference: str, hypothesis: str) -> list[tuple[str, str]]:
    """Words said and heard, in pairs, by a minimal alignment; "" stands for no word."""
    said, heard = reference.split(), hypothesis.split()
    pairs: list[tuple[str, str]] = []
    for chunk in jiwer.process_words(" ".join(said), " ".join(heard)).alignments[0]:
        ours = said[chunk.ref_start_idx : chunk.ref_end_idx]
        theirs = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        pairs += zip_longest(ours, theirs, fillvalue="")
    return pairs


def count(reference: str, hypothesis: str) -> Counts:
    """Word errors of normalised texts; every word against an empty reference is an insertion."""
    pairs = align(reference, hypothesis)
    deletions = sum(not heard for _, heard in pairs)
    insertions = sum(not said for said, _ in pairs)
    wrong = sum(said != heard for said, heard in pairs)
    return Counts(wrong - deletions - insertions, deletions, insertions, len(pairs) - insertions)


def resample(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Column sums (RESAMPLES, k) of `values` (n, k) over n rows drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(values)
    return np.stack([values[rng.integers(0, n, n)].sum(0) for _ in range(RESAMPLES)])


def interval(errors: Sequence[int], words: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval over utterances of the corpus WER, in percent.

    Percentiles of 2,000 resamples (Bisani & Ney 2004, "Bootstrap estimates for confidence
    intervals in ASR performance evaluation"). Utterances are taken as independent: where a few
    speakers said them all, the true interval over speakers is wider.
    """
    sums = resample(np.stack([errors, words], 1), seed)
    low, high = np.percentile(100 * sums[:, 0] / np.maximum(sums[:, 1], 1), [2.5, 97.5])
    return float(low), float(high)


def difference(
    errors_a: Sequence[int], errors_b: Sequence[int], words: Sequence[int], seed: int = 0
) -> tuple[float, float, float]:
    """Paired bootstrap (Bisani & Ney 2004) of two systems on the same utterances.

    Returns:
        The ends of the 95 % interval of WER of B minus WER of A, in points of percent, and the
        two-sided p-value: twice the share of resamples on the rarer side of zero, those at zero
        counted half; not below 1 / RESAMPLES.
    """
    sums = resample(np.stack([np.subtract(errors_b, errors_a), words], 1), seed)
    rates = 100 * sums[:, 0] / np.maximum(sums[:, 1], 1)
    below = float((rates < 0).mean() + (rates == 0).mean() / 2)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high), max(2 * min(below, 1 - below), 1 / RESAMPLES)


def score(
    references: Sequence[str], hypotheses: Sequence[str], language: str = "en"
) -> dict[str, Any]:
    """Corpus figures of raw texts after normalisation: `wer`, `wer_low`, `wer_high` and `cer` in
    percent, counts of error types, words and utterances, and `wer_raw` without normalisation.

    What is heard where the normalised reference is empty counts as inserted, and once more by
    itself: `hallucinated` words on `empty_references` utterances.

    Raises:
        ValueError: when there is nothing to score.
    """
    if not references:
        raise ValueError("no utterance was scored")
    normal = normalizer(language)
    refs, hyps = ([" ".join(normal(t).split()) for t in ts] for ts in (references, hypotheses))
    counts = [count(r, h) for r, h in zip(refs, hyps, strict=True)]
    raw = [count(r, h) for r, h in zip(references, hypotheses, strict=True)]
    errors, words = [c.errors for c in counts], [c.words for c in counts]
    low, high = interval(errors, words)
    letters = jiwer.process_characters(refs, hyps)
    spelled = letters.substitutions + letters.deletions + letters.insertions
    heard = [h for r, h in zip(refs, hyps, strict=True) if not r]
    return {
        "wer": 100 * sum(errors) / max(1, sum(words)),
        "wer_low": low,
        "wer_high": high,
        "cer": 100 * spelled / max(1, sum(map(len, refs))),
        "wer_raw": 100 * sum(c.errors for c in raw) / max(1, sum(c.words for c in raw)),
        "substitutions": sum(c.substitutions for c in counts),
        "deletions": sum(c.deletions for c in counts),
        "insertions": sum(c.insertions for c in counts),
        "hallucinated": sum(len(h.split()) for h in heard),
        "empty_references": len(heard),
        "words": sum(words),
        "utterances": len(references),
    }
