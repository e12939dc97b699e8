"""Choose the weights of decoding on clips that the model was not trained on.

The softmax of the candidates' scores gives each candidate of a clip a probability. The cost of a
setting is the expected number of word errors (minimum word error rate, Prabhavalkar et al. 2018,
arXiv 1712.01818). It varies less by chance than the errors of the best candidates, which depend on
few clips.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..asr.asr_decoding import TERMS, Candidate, rescore
from ..evaluation.scoring import count, normalizer
from .batches import LengthBatchSampler
from .data import SpeechDataset

# The values to try: first for the search alone, then for the decoder that rescores its proposals.
FIRST_PASS = {
    "temperature": (1.0, 1.5, 2.0),
    "ngram": (0.3, 0.5, 0.7),
    "word": (0.0, 0.5, 1.0),
    "open_character": (2.5, 4.0, 8.0),
}
SECOND_PASS = {
    "prior": (0.2, 0.4, 0.6, 0.8, 1.0),
    "decoder": (0.0, 0.15, 0.3, 0.5, 0.75, 1.0),
    "language_model": (0.0, 0.15, 0.3, 0.5, 0.75, 1.0),
    "decoder_word": (0.0, 0.5, 1.0, 1.5, 2.0),
}
TUNED = (*FIRST_PASS, *SECOND_PASS)
MIN_GAIN = 0.1  # points of expected WER; smaller gains are within chance
MIN_GAIN_BOTH = 0.75  # points of expected WER that justify two passes of the decoder


def tune(
    model: Any, processor: Any, data: SpeechDataset, language: str = "en", batch_seconds: float = 60
) -> dict[str, dict[str, float]]:
    """Choose the weights in `model.config.decoding`, in place.

    Args:
        model, processor: a trained model with a character head, and its processor.
        data: clips with transcripts, not from the training set.
        language: language of the text normalizer.
        batch_seconds: padded audio in a batch of the encoder.

    Returns:
        `expected_wer` in percent and the best weights for each way to rescore the search's
        proposals: not at all ("first_pass"), with the untrained decoder ("language_model"), with
        the trained one ("decoder"), or with "both". "both" is chosen only if it gains
        `MIN_GAIN_BOTH` points.
    """
    settings, normal = model.config.decoding, normalizer(language)
    clips = list(encoded(model, data, batch_seconds))
    references = [normal(example.text) for example in data.examples]
    total = max(1, sum(len(text.split()) for text in references))

    def errors(row: int, text: str) -> int:
        return count(references[row], normal(text)).errors

    def search(trial: dict[str, Any]) -> float:
        found = 0.0
        for rows, hidden, steps in clips:
            texts = model.search(trial)(model.characters(hidden), steps)
            for row, proposals in zip(rows, texts, strict=True):
                near = proposals[: trial["proposals"]]
                wrong = np.array([errors(row, p.text) for p in near])
                found += expected(np.array([p.score for p in near]), wrong)
        return 100 * found / total

    with torch.inference_mode():
        best = search(settings)
        for name, values in FIRST_PASS.items():  # one setting at a time
            for value in sorted({*values} - {settings[name]}):
                cost = search({**settings, name: value})
                if cost < best - MIN_GAIN:
                    best, settings[name] = cost, value
        scored = list(candidates(model, processor, clips, settings))
    wrong = [np.array([errors(row, c.proposal.text) for c in some]) for row, some in scored]
    parts = [np.array([c.parts() for c in some]) for _, some in scored]
    costs = {}
    for weights in product(*(SECOND_PASS[name] for name in TERMS)):
        by_weight = np.array([1.0, *weights])
        found = sum(expected(x @ by_weight, w) for x, w in zip(parts, wrong, strict=True))
        costs[weights] = 100 * found / total
    choices = {"first_pass": {"expected_wer": best}}
    for name, ruled_out in (("language_model", 1), ("decoder", 2), ("both", None)):
        allowed = [w for w in costs if ruled_out is None or not w[ruled_out]]
        weights = min(allowed, key=costs.__getitem__)
        choices[name] = dict(zip(TERMS, weights, strict=True))
        choices[name]["expected_wer"] = costs[weights]
    order = sorted(("language_model", "decoder"), key=lambda n: choices[n]["expected_wer"])
    gain = choices[order[0]]["expected_wer"] - choices["both"]["expected_wer"]
    chosen = choices["both" if gain > MIN_GAIN_BOTH else order[0]]
    settings.update({name: chosen[name] for name in SECOND_PASS})
    return choices


def expected(scores: np.ndarray, errors: np.ndarray) -> float:
    """Expected word errors of a clip: `errors` (n,) weighted by the softmax of `scores` (n,)."""
    shares = np.exp(scores - scores.max())
    return float(shares @ errors / shares.sum())


def encoded(
    model: Any, data: SpeechDataset, batch_seconds: float
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield batches of row numbers with their encoder frames (b, t, d) and lengths (b,)."""
    lengths = [example.duration for example in data.examples]
    for rows in LengthBatchSampler(lengths, max(batch_seconds, *lengths), shuffle=False):
        items = [data[row] for row in rows]
        rows = [row for row, item in zip(rows, items, strict=True) if "features" in item]
        features = [item["features"] for item in items if "features" in item]
        if not rows:
            continue
        batch: Any = data.processor.collate(features).to(model.device)
        with torch.inference_mode():
            yield rows, *model.encode(batch["input_features"], batch["input_features_mask"])


def candidates(
    model: Any, processor: Any, clips: list[Any], settings: dict[str, Any]
) -> Iterator[tuple[int, list[Candidate]]]:
    """Yield each row number with its proposals, as scored by both decoders.

    The trained decoder scores them given the audio, the untrained one as text alone.
    """
    both = {**settings, "decoder": 1.0, "language_model": 1.0}
    for rows, hidden, steps in clips:
        found = model.search(settings)(model.characters(hidden), steps)
        yield from zip(rows, rescore(model, processor, hidden, steps, found, both), strict=True)
