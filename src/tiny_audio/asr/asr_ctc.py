"""The CTC side of the model: its two heads, forced alignment, and the limit on new tokens.

Shapes: b clips, t encoder frames, f projected frames, d a hidden size, c CTC classes (class 0 is
the blank), rows hypotheses of a beam search.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessor

from .asr_config import IGNORE, ASRConfig

CONTEXT = 9  # encoder frames that the character head looks at together
LAG = 0.06  # seconds that a word sounds behind the CTC peak of its last letter, by measurement


class CTCHead(nn.Module):
    """CTC over projected frames whose classifier is the decoder's own token embeddings.

    logit(token) = scale * cosine(frame - mean, embedding - mean), with a learned blank: a frame
    that means a word lies where the decoder already has that word. Classes 1.. are
    `ctc_token_ids`; class 0 is the blank.
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
        self.register_buffer("class_of", class_of, persistent=False)  # 0: not a class of ours
        self.log_scale = nn.Parameter(torch.tensor([3.0]))  # FSDP2 shards no scalar
        self.blank = nn.Linear(d, 1)
        nn.init.zeros_(self.blank.weight)
        nn.init.zeros_(self.blank.bias)

    def forward(self, frames: Tensor, embedding: Tensor, classes: Tensor | None = None) -> Tensor:
        """Frames (b, f, d) and the embedding matrix (vocab, d) -> log-probabilities (b, f, c).

        With `classes` (n,), some of 1.., only of the blank and those: (b, f, n + 1).
        """
        ids = self.token_ids if classes is None else self.token_ids[classes - 1]
        rows = embedding.detach()[self.token_ids].to(frames.dtype)  # (c - 1, d)
        mean = rows.mean(0)
        rows = rows if classes is None else embedding.detach()[ids].to(frames.dtype)
        cosine = F.normalize(frames - mean, dim=-1) @ F.normalize(rows - mean, dim=-1).T
        logits = torch.cat([self.blank(frames), self.log_scale.exp() * cosine], dim=-1)
        return logits.float().log_softmax(-1)

    def loss(
        self, frames: Tensor, lengths: Tensor, labels: Tensor, embedding: Tensor, negatives: int = 0
    ) -> Tensor:
        """Summed negative log-likelihood (Graves et al. 2006) of `labels` (b, s); -100 is skipped.

        Tokens that are no class are left out of the target; a target that does not fit into its
        frames adds nothing (`data.py` drops such clips by name before they come here).

        Args:
            negatives: score the batch's own tokens against so many others drawn at random (a
                sampled softmax, 3x faster with 16,000 classes); 0 scores against all.
        """
        targets = self.class_of[labels.clamp(min=0)].masked_fill(labels == IGNORE, 0)
        present = targets > 0
        chosen = None
        if 0 < negatives < len(self.token_ids):
            others = torch.randperm(len(self.token_ids), device=labels.device)[:negatives] + 1
            chosen = torch.cat([targets[present], others]).unique()
            targets = torch.searchsorted(chosen, targets) + 1
        return F.ctc_loss(
            self(frames, embedding, chosen).transpose(0, 1),
            targets[present],
            lengths,
            present.sum(1),
            reduction="sum",
            zero_infinity=True,
        )

    def greedy(self, log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        """Best path, repeats merged and blanks dropped: token ids for each clip."""
        best = log_probs.argmax(-1)
        paths = [row[:n].unique_consecutive() for row, n in zip(best, lengths, strict=True)]
        return [self.token_ids[path[path > 0] - 1].tolist() for path in paths]

    def spelled(self, ids: list[int]) -> list[int]:
        """Token ids -> their classes; none for a token that is no class of ours."""
        return [c for c in self.class_of[ids].tolist() if c > 0]


class CharacterHead(nn.Module):
    """CTC over encoder frames (50 Hz) whose classes are the bytes of lower-cased text.

    A few dozen classes need little speech, so it spells words that no training text holds, where
    a head over tokens can only say words that it was shown. `asr_decoding` searches its output
    for words. Class 0 is the blank, classes 1.. are the bytes of `ctc_alphabet`.

    With `ctc_direct` a linear map of the frames is added, which starts as the encoder's own head.
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
        """Begin as another head over the same frames and classes: (c, d) and (c,)."""
        assert self.direct is not None
        with torch.no_grad():
            self.direct.weight.copy_(weight)
            self.direct.bias.copy_(bias)
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
        """Summed negative log-likelihood of `targets` (b, n), classes padded with 0."""
        present = targets > 0
        return F.ctc_loss(
            self(hidden).transpose(0, 1),
            targets[present],
            lengths,
            present.sum(1),
            reduction="sum",
            zero_infinity=True,
        )


class LengthLimit(LogitsProcessor):
    """Ends each row at its own number of new tokens, whatever else is in the batch."""

    def __init__(self, limits: Tensor, end: int) -> None:
        self.limits, self.end = limits, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores (rows, vocab) with nothing but the end token left where a limit is reached."""
        rows = self.limits.repeat_interleave(len(scores) // len(self.limits))
        over = (input_ids.shape[1] >= rows)[:, None]
        only_end = torch.full_like(scores, float("-inf"))
        only_end[:, self.end] = 0.0
        return torch.where(over, only_end, scores)


def align(log_probs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forced alignment: where the best CTC path (Viterbi) says each of `targets`.

    All states of a frame are computed at once; the loop is over frames.

    Args:
        log_probs: (t, c) float32, class 0 the blank.
        targets: (s,) classes from 1 on, of which t frames must have room (`fits`).

    Returns:
        `spans` (s, 2): the first frame of each target and the one behind its last, and `scores`
        (s,): the highest log-probability that the target has in its span.
    """
    t, s = len(log_probs), len(targets)
    states = np.zeros(2 * s + 1, np.int64)  # blanks between and around the targets
    states[1::2] = targets
    skip = np.full(2 * s + 1, -np.inf, np.float32)  # a blank may be left out between two unlike
    skip[3::2][targets[1:] != targets[:-1]] = 0.0
    emit = log_probs[:, states]  # (t, 2 s + 1)
    best = np.full((t, 2 * s + 3), -np.inf, np.float32)  # two columns of "impossible" first
    best[0, 2:4] = emit[0, :2]
    top, jump = np.empty(2 * s + 1, np.float32), np.empty(2 * s + 1, np.float32)
    for i in range(1, t):
        before = best[i - 1]
        np.maximum(before[2:], before[1:-1], out=top)
        np.add(before[:-2], skip, out=jump)
        np.maximum(top, jump, out=top)
        np.add(top, emit[i], out=best[i, 2:])
    path = np.empty(t, np.int64)
    at = 2 * s - int(best[-1, -2] > best[-1, -1])
    for i in range(t - 1, 0, -1):
        path[i] = at
        before = best[i - 1, at : at + 3]  # from two states back, from one, from the same
        at -= int(np.argmax((before[2], before[1], before[0] + skip[at])))
    path[0] = at
    label = np.arange(s) * 2 + 1
    spans = np.stack([np.searchsorted(path, label), np.searchsorted(path, label, "right")], 1)
    scores = np.array([emit[a:b, k].max() for (a, b), k in zip(spans, label, strict=True)])
    return spans, scores


def fits(frames: int, targets: np.ndarray) -> bool:
    """Whether `frames` have room for `targets`: one each, and a blank between equal ones."""
    return len(targets) > 0 and len(targets) + (targets[1:] == targets[:-1]).sum() <= frames


def time_words(
    log_probs: np.ndarray, spelled: list[list[int]], space: int, step: float, seconds: float
) -> tuple[np.ndarray, list[float | None], float | None]:
    """Word times by forced alignment.

    Args:
        log_probs: (t, c), as `align` takes them.
        spelled: the classes of each of n words; a word without any (digits, punctuation alone)
            shares the time between its neighbours, and has no confidence.
        space: the class that belongs to no word.
        step: seconds of a frame.
        seconds: length of the clip.

    Returns:
        Start and end of each word (n, 2) in seconds, never falling; the confidence of each, the
        geometric mean of its letters' probabilities; and that of all letters, 0.0 where more is
        said than there is time for, None where there are none.
    """
    targets = np.array([c for word in spelled for c in word], int)
    owner = np.repeat(np.arange(len(spelled)), [len(word) for word in spelled])
    owner[targets == space] = -1
    edges, sure = np.full((len(spelled), 2), np.nan), dict[int, float]()
    confidence = 0.0 if (owner >= 0).any() else None
    if confidence is not None and fits(len(log_probs), targets):
        spans, scores = align(log_probs, targets)
        confidence = float(np.exp(scores[owner >= 0].mean()))
        for k in np.unique(owner[owner >= 0]):
            own = owner == k
            edges[k] = spans[own][0, 0] * step, spans[own][-1, 1] * step + LAG
            sure[k] = round(float(np.exp(scores[own].mean())), 3)
    edges, at = edges.clip(0, seconds).reshape(-1), np.arange(edges.size)
    on = np.isfinite(edges)
    known = np.minimum(edges[on], [*edges[on][1:], seconds])  # no word ends in the next
    edges = np.interp(at, [-1, *at[on], edges.size], [0.0, *known, seconds])
    return edges.reshape(-1, 2), [sure.get(k) for k in range(len(spelled))], confidence
