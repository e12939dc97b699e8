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

from ..asr.asr_decoding import SCORE_WEIGHTS, Candidate, rescore
from ..evaluation.scoring import count, normalizer
from .data import SpeechDataset

# The values to try for each weight. The weights of the search are not tuned: values that improve
# its first proposal make the others worse.
TRIED = {
    "prior": (0.2, 0.4, 0.6, 0.8, 1.0),
    "decoder": (0.15, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5),
    "language_model": (0.15, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5),
    "decoder_word": (0.0, 0.5, 1.0, 1.5, 2.0),
}


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
        proposals: with the untrained decoder ("language_model") or with the trained one
        ("decoder"). The better one is chosen.
    """
    settings, normal = model.config.decoding, normalizer(language)
    references = [normal(example.text) for example in data.examples]
    total = max(1, sum(len(text.split()) for text in references))
    both = {**settings, "decoder": 1.0, "language_model": 1.0}  # each proposal gets both scores
    scored: list[tuple[int, list[Candidate]]] = []
    for rows, hidden, steps in encoded(model, data, batch_seconds):
        with torch.inference_mode():
            found = model.propose(model.characters(hidden), steps, settings)
            scored += zip(rows, rescore(model, processor, hidden, steps, found, both), strict=True)
    wrong = [
        np.array([count(references[row], normal(c.proposal.text))[0] for c in of_clip])
        for row, of_clip in scored
    ]
    parts = [np.array([c.parts() for c in of_clip]) for _, of_clip in scored]

    def with_cost(trial: tuple[float, ...]) -> dict[str, float]:
        weights = np.array([1.0, *trial])  # the CTC score always counts as it is
        found = sum(expected(x @ weights, w) for x, w in zip(parts, wrong, strict=True))
        return {**dict(zip(SCORE_WEIGHTS, trial, strict=True)), "expected_wer": 100 * found / total}

    choices = {}
    for name, ruled_out in (("language_model", "decoder"), ("decoder", "language_model")):
        values = {**TRIED, ruled_out: (0.0,)}
        trials = map(with_cost, product(*(values[term] for term in SCORE_WEIGHTS)))
        choices[name] = min(trials, key=lambda trial: trial["expected_wer"])
    chosen = min(choices.values(), key=lambda choice: choice["expected_wer"])
    settings.update({name: chosen[name] for name in SCORE_WEIGHTS})
    return choices


def expected(scores: np.ndarray, errors: np.ndarray) -> float:
    """Expected word errors of a clip: `errors` (n,) weighted by the softmax of `scores` (n,)."""
    shares = np.exp(scores - scores.max())
    return float(shares @ errors / shares.sum())


def encoded(
    model: Any, data: SpeechDataset, batch_seconds: float
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield batches of row numbers with their encoder frames (b, t, d) and lengths (b,)."""
    for items in data.batches(batch_seconds):
        features = [item["features"] for item in items.values()]
        batch: Any = data.processor.collate(features).to(model.device)
        with torch.inference_mode():
            yield [*items], *model.encode(batch["input_features"], batch["input_features_mask"])
