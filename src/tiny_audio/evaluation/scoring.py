"""Word error rate with error types and bootstrap interval, and a test for a difference."""

from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

import jiwer
import numpy as np

RESAMPLES = 2000


@cache
def normalizer(language: str = "en") -> Any:
    """The Whisper text normaliser (Radford et al. 2022, appendix C).

    Returns the English one for "en", otherwise the basic one, which keeps combining vowel signs.
    """
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer() if language == "en" else BasicTextNormalizer(preserve_marks=True)


def align(reference: str, hypothesis: str) -> list[tuple[str, str]]:
    """Align the words with minimal edits; return (reference, hypothesis) pairs, "" for no word."""
    ref, hyp = reference.split(), hypothesis.split()
    pairs: list[tuple[str, str]] = []
    for chunk in jiwer.process_words(" ".join(ref), " ".join(hyp)).alignments[0]:
        left = ref[chunk.ref_start_idx : chunk.ref_end_idx]
        right = hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
        pairs += zip_longest(left, right, fillvalue="")
    return pairs


def count(reference: str, hypothesis: str) -> tuple[int, int]:
    """Count the word errors of a hypothesis and the words of its reference, both normalised.

    Errors are substitutions, deletions and insertions. If the reference is empty, every word of the
    hypothesis is an insertion.
    """
    found = jiwer.process_words(" ".join(reference.split()), " ".join(hypothesis.split()))
    errors = found.substitutions + found.deletions + found.insertions
    return errors, found.hits + found.substitutions + found.deletions


def resample(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bootstrap column sums (RESAMPLES, k) of `values` (n, k): draw n rows with replacement."""
    rng, n = np.random.default_rng(seed), len(values)
    return np.stack([values[rng.integers(0, n, n)].sum(0) for _ in range(RESAMPLES)])


def interval(errors: Sequence[int], words: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the corpus WER over utterances, in percent.

    Takes percentiles of 2,000 resamples (Bisani & Ney 2004, "Bootstrap estimates for confidence
    intervals in ASR performance evaluation"). Assumes independent utterances: if few speakers
    produced them all, the interval over speakers is wider.
    """
    sums = resample(np.stack([errors, words], 1), seed)
    low, high = np.percentile(100 * sums[:, 0] / np.maximum(sums[:, 1], 1), [2.5, 97.5])
    return float(low), float(high)


def difference(
    errors_a: Sequence[int], errors_b: Sequence[int], words: Sequence[int], seed: int = 0
) -> tuple[float, float, float]:
    """Paired bootstrap (Bisani & Ney 2004) of two systems on the same utterances.

    Returns:
        Both ends of the 95 % interval of (WER of B - WER of A) in percentage points, and the
        two-sided p-value: twice the share of resamples below zero or above zero, whichever is
        smaller (those at zero count half on each side), and at least 1 / RESAMPLES.
    """
    sums = resample(np.stack([np.subtract(errors_b, errors_a), words], 1), seed)
    rates = 100 * sums[:, 0] / np.maximum(sums[:, 1], 1)
    below = float((rates < 0).mean() + (rates == 0).mean() / 2)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high), max(2 * min(below, 1 - below), 1 / RESAMPLES)


def score(
    references: Sequence[str], hypotheses: Sequence[str], language: str = "en"
) -> dict[str, Any]:
    """Normalise texts and compute the error rates of the corpus.

    Returns:
        `wer`, `wer_low`, `wer_high` and `cer` in percent; `wer_raw`, the WER without normalisation;
        and counts of error types, words and utterances. Words of hypotheses whose normalised
        reference is empty count as insertions, and also as `hallucinated` words on
        `empty_references` utterances.

    Raises:
        ValueError: if there is nothing to score.
    """
    if not references:
        raise ValueError("no utterance was scored")
    normal = normalizer(language)
    refs, hyps = ([" ".join(normal(t).split()) for t in ts] for ts in (references, hypotheses))
    errors, words = zip(*map(count, refs, hyps), strict=True)
    raw_errors, raw_words = zip(*map(count, references, hypotheses), strict=True)
    low, high = interval(errors, words)
    kinds = jiwer.process_words(refs, hyps)
    letters = jiwer.process_characters(refs, hyps)
    wrong_letters = letters.substitutions + letters.deletions + letters.insertions
    hallucinations = [h for r, h in zip(refs, hyps, strict=True) if not r]
    return {
        "wer": 100 * sum(errors) / max(1, sum(words)),
        "wer_low": low,
        "wer_high": high,
        "cer": 100 * wrong_letters / max(1, sum(map(len, refs))),
        "wer_raw": 100 * sum(raw_errors) / max(1, sum(raw_words)),
        "substitutions": kinds.substitutions,
        "deletions": kinds.deletions,
        "insertions": kinds.insertions,
        "hallucinated": sum(len(h.split()) for h in hallucinations),
        "empty_references": len(hallucinations),
        "words": sum(words),
        "utterances": len(references),
    }
