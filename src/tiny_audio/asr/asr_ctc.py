"""The two CTC heads, forced alignment, and the limit on new tokens.

Shapes: b clips, t encoder frames, f projected frames, d a hidden size, c CTC classes (class 0 is
the blank), rows hypotheses of a beam search.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import StoppingCriteria

from .asr_config import IGNORE, ASRConfig

CONTEXT = 9  # encoder frames that each output of the character head sees
LAG = 0.06  # measured seconds from the CTC peak of a last letter to the end of the word


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
    """Sum the CTC negative log-likelihood (Graves et al. 2006) of `targets` (b, n), padded with 0.

    A target that does not fit into its frames adds nothing to the loss; `data.py` drops such clips
    beforehand and names them.
    """
    present = targets > 0
    loss = nn.CTCLoss(reduction="sum", zero_infinity=True)
    return loss(log_probs.transpose(0, 1), targets[present], lengths, present.sum(1))


class CTCHead(nn.Module):
    """CTC over projected frames that classifies with the decoder's token embeddings.

    logit(token) = scale * cosine(frame - mean, embedding - mean), and the blank's logit is learned.
    Training moves the frames of a word close to the decoder's embedding of that word. Classes 1..
    are `ctc_token_ids`; class 0 is the blank.
    """

    token_ids: Tensor
    class_of: Tensor

    def __init__(self, config: ASRConfig) -> None:
        super().__init__()
        d = config.text_config.hidden_size
        ids = torch.tensor(config.ctc_token_ids)
        class_of = torch.zeros(config.text_config.vocab_size, dtype=torch.long)
        class_of[ids] = torch.arange(1, len(ids) + 1)
        self.register_buffer("token_ids", ids, persistent=False)
        self.register_buffer("class_of", class_of, persistent=False)  # 0: token without a class
        self.log_scale = nn.Parameter(torch.tensor([3.0]))  # a vector: FSDP2 cannot shard scalars
        self.blank = nn.Linear(d, 1)
        nn.init.zeros_(self.blank.weight)
        nn.init.zeros_(self.blank.bias)

    def forward(self, frames: Tensor, embedding: Tensor, classes: Tensor | None = None) -> Tensor:
        """Frames (b, f, d) and the embedding matrix (vocab, d) -> log-probabilities (b, f, c).

        `classes` (n,), a subset of 1.., limits the output to the blank and these: (b, f, n + 1).
        """
        rows = embedding.detach()[self.token_ids].to(frames.dtype)  # (c - 1, d)
        mean = rows.mean(0)
        rows = rows if classes is None else rows[classes - 1]
        cosine = F.normalize(frames - mean, dim=-1) @ F.normalize(rows - mean, dim=-1).T
        logits = torch.cat([self.blank(frames), self.log_scale.exp() * cosine], dim=-1)
        return logits.float().log_softmax(-1)

    def loss(
        self, frames: Tensor, lengths: Tensor, labels: Tensor, embedding: Tensor, negatives: int = 0
    ) -> Tensor:
        """Sum the CTC negative log-likelihood of `labels` (b, s).

        Labels of -100 and tokens without a class are skipped.

        Args:
            negatives: score the batch's own tokens against this number of others, drawn at random
                (a sampled softmax, 3x faster with 16,000 classes); 0 scores against all.
        """
        targets = self.class_of[labels.clamp(min=0)].masked_fill(labels == IGNORE, 0)
        chosen = None
        if 0 < negatives < len(self.token_ids):
            others = torch.randperm(len(self.token_ids), device=labels.device)[:negatives] + 1
            chosen = torch.cat([targets[targets > 0], others]).unique()
            targets = torch.where(targets > 0, torch.searchsorted(chosen, targets) + 1, 0)
        return ctc_loss(self(frames, embedding, chosen), lengths, targets)

    def greedy(self, log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        """Decode the best path of each clip to token ids, without repeats and blanks."""
        best = log_probs.argmax(-1)
        paths = [row[:n].unique_consecutive() for row, n in zip(best, lengths, strict=True)]
        return [self.token_ids[path[path > 0] - 1].tolist() for path in paths]

    def classes(self, ids: list[int]) -> list[int]:
        """Map token ids to classes, and skip tokens without a class."""
        return [c for c in self.class_of[ids].tolist() if c > 0]


class CharacterHead(nn.Module):
    """CTC over encoder frames whose classes are the bytes of lower-cased text.

    A few dozen classes need little speech to learn, so this head spells words that no training
    transcript contains. A head over tokens can output only tokens that occurred in its training.
    `asr_decoding` searches this head's output for words. Class 0 is the blank, classes 1.. are the
    bytes of `ctc_alphabet`.

    With `ctc_direct`, a linear layer over the frames is added to the logits; it starts as the
    encoder's own CTC head.
    """

    def __init__(self, config: ASRConfig) -> None:
        super().__init__()
        d, hidden = config.audio_config.hidden_size, config.ctc_hidden
        self.context = nn.Conv1d(d, d, CONTEXT, padding=CONTEXT // 2, groups=d)
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.output = nn.Linear(hidden, len(config.ctc_alphabet) + 1)
        self.direct = nn.Linear(d, len(config.ctc_alphabet) + 1) if config.ctc_direct else None

    def start_from(self, weight: Tensor, bias: Tensor) -> None:
        """Start as another head over the same frames and classes: (c, d) and (c,)."""
        assert self.direct is not None
        self.direct.load_state_dict({"weight": weight, "bias": bias})
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Encoder frames (b, t, d), zero beyond each clip -> log-probabilities (b, t, c)."""
        hidden = hidden.to(self.output.weight.dtype)
        x = self.norm(hidden + self.context(hidden.transpose(1, 2)).transpose(1, 2))
        logits = self.output(F.silu(self.gate_proj(x)) * self.up_proj(x))
        if self.direct is not None:
            logits = logits + self.direct(hidden)
        return logits.float().log_softmax(-1)

    def loss(self, hidden: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        """Sum the negative log-likelihood of `targets` (b, n), classes padded with 0."""
        return ctc_loss(self(hidden), lengths, targets)


class LengthLimit(StoppingCriteria):
    """Stop each row at its own number of new tokens, independent of the batch."""

    def __init__(self, limits: Tensor) -> None:
        self.limits = limits

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Tell which rows of `input_ids` (rows, n) have reached their limit."""
        rows = self.limits.repeat_interleave(len(input_ids) // len(self.limits))
        return input_ids.shape[1] >= rows


def align(log_probs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Align `targets` to frames along the best CTC path (Viterbi).

    All states of a frame are computed at once; the loop runs over frames.

    Args:
        log_probs: (t, c) float32, class 0 is the blank.
        targets: (s,) classes from 1 on, which need at most t frames (see `frames_needed`).

    Returns:
        `spans` (s, 2): the first frame of each target and the frame after its last, and `scores`
        (s,): the highest log-probability of each target in its span.
    """
    t, s = len(log_probs), len(targets)
    states = np.zeros(2 * s + 1, np.int64)  # blanks between and around the targets
    states[1::2] = targets
    skip = np.full(2 * s + 1, -np.inf, np.float32)  # different targets need no blank between them
    skip[3::2][targets[1:] != targets[:-1]] = 0.0
    emit = log_probs[:, states]  # (t, 2 s + 1)
    best = np.full((t, 2 * s + 3), -np.inf, np.float32)  # two columns of "impossible" first
    best[0, 2:4] = emit[0, :2]
    for i in range(1, t):
        before = best[i - 1]
        reached = np.maximum(before[2:], before[1:-1])
        best[i, 2:] = np.maximum(reached, before[:-2] + skip) + emit[i]
    path = np.empty(t, np.int64)
    at = 2 * s - int(best[-1, -2] > best[-1, -1])
    for i in range(t - 1, 0, -1):
        path[i] = at
        two_back, one_back, same = best[i - 1, at : at + 3].tolist()
        two_back += skip[at]
        if same < max(one_back, two_back):
            at -= 1 if one_back >= two_back else 2
    path[0] = at
    label = np.arange(s) * 2 + 1
    spans = np.stack([np.searchsorted(path, label), np.searchsorted(path, label, "right")], 1)
    scores = np.array([emit[a:b, k].max() for (a, b), k in zip(spans, label, strict=True)])
    return spans, scores


def frames_needed(targets: list[int] | np.ndarray) -> int:
    """Count the frames that CTC needs: one for each target, and a blank between equal ones."""
    return len(targets) + int(np.equal(targets[1:], targets[:-1]).sum())


def letter_support(log_probs: np.ndarray, letters: int, space: int) -> float:
    """Rate how well the audio alone supports a text with this many letters.

    A word that was misread still has sure letters beneath it; noise has few, and unsure ones.

    Args:
        log_probs: (t, c), as for `align`.
        letters: the number of letters of the text.
        space: class that is not a letter.

    Returns:
        The geometric mean of the probabilities of the best path's letters, times the share of
        `letters` that it reaches: 0.0 to 1.0.
    """
    best = log_probs.argmax(-1)
    starts = np.flatnonzero(np.diff(best, prepend=-1))
    peaks = np.maximum.reduceat(log_probs.max(-1), starts)
    peaks = peaks[(best[starts] > 0) & (best[starts] != space)]
    if not len(peaks) or not letters:
        return 0.0
    return float(np.exp(peaks.mean()) * min(1.0, len(peaks) / letters))


def time_words(
    log_probs: np.ndarray, classes: list[list[int]], space: int, step: float, seconds: float
) -> tuple[np.ndarray, list[float | None], float | None]:
    """Compute word times by forced alignment.

    Args:
        log_probs: (t, c), as for `align`.
        classes: classes of each of n words. A word without classes (only punctuation, say)
            gets the time between its neighbours and has no confidence.
        space: class that belongs to no word.
        step: seconds per frame.
        seconds: length of the clip.

    Returns:
        times: start and end of each word (n, 2) in seconds, non-decreasing.
        confidences: of each word, the geometric mean of its letters' probabilities.
        overall: the same over all letters; 0.0 if the text does not fit into the frames, and None
            if there are no letters.
    """
    targets = np.array([c for word in classes for c in word], int)
    owner = np.repeat(np.arange(len(classes)), [len(word) for word in classes])
    owner[targets == space] = -1
    edges, sure = np.full((len(classes), 2), np.nan), dict[int, float]()
    confidence = 0.0 if (owner >= 0).any() else None
    if confidence is not None and frames_needed(targets) <= len(log_probs):
        spans, scores = align(log_probs, targets)
        confidence = float(np.exp(scores[owner >= 0].mean()))
        for k in np.unique(owner[owner >= 0]):
            own = owner == k
            edges[k] = spans[own][0, 0] * step, spans[own][-1, 1] * step + LAG
            sure[k] = round(float(np.exp(scores[own].mean())), 3)
    edges, position = edges.clip(0, seconds).reshape(-1), np.arange(edges.size)
    timed = np.isfinite(edges)
    known = np.minimum(edges[timed], [*edges[timed][1:], seconds])  # no word overlaps the next
    # Words without a time are spread evenly between their neighbours.
    edges = np.interp(position, [-1, *position[timed], edges.size], [0.0, *known, seconds])
    return edges.reshape(-1, 2), [sure.get(k) for k in range(len(classes))], confidence
