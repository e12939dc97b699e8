"""The CTC side of the model: its two heads, joint decoding, and the limit on new tokens.

Shapes: b clips, t encoder frames, f projected frames, d a hidden size, c CTC classes (class 0 is
the blank), rows hypotheses of a search.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .asr_config import IGNORE, ASRConfig

LOG_ZERO = -1e4  # log of "impossible", finite so that sums of it stay finite
CONTEXT = 9  # encoder frames that the character head looks at together
MAX_SPELLING = 16  # bytes of the longest token that can be spelled
UNSPELLABLE = 255
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
    a head over tokens can only say words that it was shown. How it spells is for the decoder to
    mend: `CTCPrefixScorer` scores the decoder's tokens by their bytes.

    `spelling` (vocab, MAX_SPELLING) holds the classes of each token's bytes, 0 after its end and
    `UNSPELLABLE` first where it has none; it is saved with the weights, see `spell`.
    """

    spelling: Tensor

    def __init__(self, config: ASRConfig) -> None:
        super().__init__()
        d, self.classes = config.audio_config.hidden_size, len(config.ctc_alphabet)
        hidden = config.ctc_hidden
        spelling = torch.zeros(config.text_config.vocab_size, MAX_SPELLING, dtype=torch.uint8)
        self.register_buffer("spelling", spelling)
        self.context = nn.Conv1d(d, d, CONTEXT, padding=CONTEXT // 2, groups=d)
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.output = nn.Linear(hidden, self.classes + 1)
        self.trie: tuple[Tensor, Tensor, Tensor] | None = None

    def spelled(self, ids: list[int]) -> list[int]:
        """Token ids -> the classes of their bytes; none for what has no sound."""
        return [c for c in self.spelling[ids].flatten().tolist() if 0 < c < UNSPELLABLE]

    def forward(self, hidden: Tensor) -> Tensor:
        """Encoder frames (b, t, d), zero beyond each clip -> log-probabilities (b, t, c)."""
        hidden = hidden.to(self.output.weight.dtype)
        x = self.norm(hidden + self.context(hidden.transpose(1, 2)).transpose(1, 2))
        return self.output(F.silu(self.gate_proj(x)) * self.up_proj(x)).float().log_softmax(-1)

    def loss(self, hidden: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Summed negative log-likelihood of the spelling of `labels` (b, s); -100 is skipped."""
        spelled = self.spelling[labels.clamp(min=0)].long()  # (b, s, MAX_SPELLING)
        present = (spelled > 0) & (spelled < UNSPELLABLE) & (labels != IGNORE)[..., None]
        return F.ctc_loss(
            self(hidden).transpose(0, 1),
            spelled[present],
            lengths,
            present.sum((1, 2)),
            reduction="sum",
            zero_infinity=True,
        )

    def token_trie(self) -> tuple[Tensor, Tensor, Tensor]:
        """The spellings as a prefix tree, made once.

        Returns:
            `child` (nodes, c - 1): the node that a class leads to, -1 for none; node 0 is the
            root. `ids` (n,): the tokens that have a spelling. `node` (n,): where each one ends.
        """
        if self.trie is None or self.trie[0].device != self.spelling.device:
            spelling = self.spelling.long()
            ids = (spelling[:, 0] != UNSPELLABLE).nonzero()[:, 0]
            node = torch.zeros_like(ids)
            child = ids.new_full((1, self.classes), -1)
            for column in spelling[ids].T:
                on = column > 0
                edges, which = (node[on] * self.classes + column[on] - 1).unique(
                    return_inverse=True
                )
                child.view(-1)[edges] = torch.arange(len(edges), device=ids.device) + len(child)
                node[on] = which + len(child)
                child = torch.cat([child, child.new_full((len(edges), self.classes), -1)])
            self.trie = (child, ids, node)
        return self.trie


def spell(tokenizer: Any, alphabet: list[int], size: int, written: set[int]) -> Tensor:
    """The `spelling` of a byte-level BPE vocabulary in classes of `alphabet`, both byte values.

    Only tokens made of the bytes `written` in the training text are spelled, of at most
    `MAX_SPELLING` bytes, and no special tokens. Upper case is spelled as lower case, and bytes
    that are not in the alphabet (punctuation) are silent.

    Returns:
        uint8 of shape (size, MAX_SPELLING).
    """
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    class_of = {byte: i + 1 for i, byte in enumerate(alphabet)}
    out = torch.zeros(size, MAX_SPELLING, dtype=torch.uint8)
    out[:, 0] = UNSPELLABLE
    special = set(tokenizer.all_special_ids)
    for token, i in tokenizer.get_vocab().items():
        if i in special or i >= size or not set(token) <= byte_of.keys():
            continue
        text = bytes(byte_of[char] for char in token)
        classes = [class_of[byte] for byte in text.lower() if byte in class_of]
        if len(classes) <= MAX_SPELLING and set(text) <= written:
            out[i] = torch.tensor(classes + [0] * (MAX_SPELLING - len(classes)))
    return out


@dataclass
class Prefixes:
    """CTC forward variables of n text prefixes, log domain; t encoder frames."""

    item: Tensor  # (n,) the clip
    last: Tensor  # (n,) class of the last byte, 0 for the empty prefix
    r_label: Tensor  # (n, t) frames up to t spell the prefix, the last of them its last byte
    r_blank: Tensor  # (n, t) the same, the last of them a blank
    score: Tensor  # (n,) log psi: all texts that begin with the prefix

    def __getitem__(self, rows: Tensor) -> "Prefixes":
        return Prefixes(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __setitem__(self, rows: Tensor, other: "Prefixes") -> None:
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(other, f.name)


class CTCPrefixScorer(LogitsProcessor):
    """Joint CTC/decoder decoding: adds the CTC prefix score to the decoder's log-probabilities.

    score(token) = log p_decoder(token | prefix) + weight * log [psi(prefix token) / psi(prefix)]
    where psi is the CTC probability of all texts that begin so (Watanabe et al. 2017, "Hybrid
    CTC/Attention Architecture", algorithm 2). The decoder's tokens are scored by their bytes: a
    search through the tree of spellings proposes the tokens that the audio supports, the best
    `width` bytes of each depth for each row, and every other token is ruled out.

    With r(t) the probability that frames up to t spell a prefix, psi(prefix c) = sum_t r(t-1)
    p(c | t) is a matrix product over all classes, and the recursion over t a cumulative sum. Rows
    may be reordered by beam search: a row finds its parent by its tokens.
    """

    def __init__(
        self,
        head: CharacterHead,
        log_probs: Tensor,
        lengths: Tensor,
        end: int,
        weight: float,
        width: int = 24,
        slack: float = 20.0,
    ) -> None:
        b, t, _ = log_probs.shape
        beyond = torch.arange(t, device=lengths.device) >= lengths[:, None]
        log_probs = log_probs.double().masked_fill(beyond[..., None], LOG_ZERO)
        log_probs[..., 0].masked_fill_(beyond, 0.0)  # padding can only be blank
        self.log_probs, self.probs = log_probs, log_probs[..., 1:].exp()  # (b, t, c)
        self.head, self.end, self.weight = head, end, weight
        self.width, self.slack = width, slack
        item = torch.arange(b, device=lengths.device)
        self.tokens = item.new_zeros(b, 0)
        self.rows = Prefixes(
            item=item,
            last=torch.zeros_like(item),
            r_label=torch.full_like(log_probs[..., 0], LOG_ZERO),
            r_blank=log_probs[..., 0].cumsum(1),  # the empty prefix: blanks only
            score=torch.zeros_like(log_probs[:, 0, 0]),
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Token ids (rows, n) so far and logits (rows, vocab) -> joint scores (rows, vocab)."""
        if input_ids.shape[1]:
            self._follow(input_ids)
        elif len(input_ids) > len(self.tokens):  # beam search: every clip has several rows
            self.rows = self.rows[
                self.rows.item.repeat_interleave(len(input_ids) // len(self.tokens))
            ]
            self.tokens = input_ids
        rows = self.rows
        _, ids, node = self.head.token_trie()
        end = torch.logaddexp(rows.r_label[:, -1], rows.r_blank[:, -1])
        joint = torch.full_like(scores, float("-inf"), dtype=torch.float)
        joint[:, ids] = self.weight * (self._search()[:, node] - rows.score[:, None].float())
        if input_ids.shape[1]:  # silence costs nothing: never two silent tokens in a row
            mute = ids[node == 0]
            twice = (input_ids[:, -1:] == mute).any(1)
            joint[twice.nonzero(), mute] = float("-inf")
        joint[:, self.end] = (self.weight * (end - rows.score)).float()
        return joint + scores.float().log_softmax(-1)

    @staticmethod
    def _before(r: Tensor, first: Any) -> Tensor:
        """r(t - 1) for every t, with `first` before the first frame."""
        column = r[:, :1].clone()
        column[:, 0] = first
        return torch.cat([column, r[:, :-1]], dim=1)

    def _phi(self, p: Prefixes) -> tuple[Tensor, Tensor]:
        """Probability of the prefix before frame t: (n, t) for a new byte, for a repeated one."""
        blank = self._before(p.r_blank, torch.where(p.last == 0, 0.0, LOG_ZERO).to(p.score))
        return torch.logaddexp(self._before(p.r_label, LOG_ZERO), blank), blank

    def _psi(self, p: Prefixes) -> Tensor:
        """log psi(prefix c) for every class c but the blank: (n, c - 1)."""
        fresh, repeat = self._phi(p)
        peak = fresh.max(1, keepdim=True).values
        probs = self.probs[p.item]
        psi = torch.einsum("nt,ntc->nc", (fresh - peak).exp(), probs)
        again = (p.last > 0).nonzero()[:, 0]
        same = probs[again, :, p.last[again] - 1]
        psi[again, p.last[again] - 1] = ((repeat - peak)[again].exp() * same).sum(1)
        return psi.clamp(min=1e-300).log() + peak

    def _extend(self, p: Prefixes, byte: Tensor, score: Tensor) -> Prefixes:
        """Each prefix with one class (n,) more, whose log psi is `score` (n,)."""
        fresh, blank = self._phi(p)
        phi = torch.where((p.last == byte)[:, None], blank, fresh)
        # r_label(t) = [r_label(t-1) + phi(t)] p(t) unrolled: one cumulative sum instead of a loop
        total = self.log_probs[p.item, :, byte].cumsum(1)  # (n, t)
        r_label = total + torch.logcumsumexp(phi - self._before(total, 0.0), 1)
        total = self.log_probs[p.item, :, 0].cumsum(1)
        into = self._before(r_label, LOG_ZERO)
        r_blank = total + torch.logcumsumexp(into - self._before(total, 0.0), 1)
        return Prefixes(p.item, byte, r_label, r_blank, score)

    def _search(self) -> Tensor:
        """log psi of each row's prefix with the bytes of each node: (rows, nodes), pruned: -inf."""
        child, _, _ = self.head.token_trie()
        found = self.rows.score.new_full((len(self.tokens), len(child)), float("-inf")).float()
        found[:, 0] = self.rows.score.float()
        least = self.rows.score - self.slack
        p, row = self.rows, torch.arange(len(self.tokens), device=child.device)
        node = torch.zeros_like(row)
        for _ in range(MAX_SPELLING):
            psi = self._psi(p)
            psi = psi.masked_fill((child[node] < 0) | (psi < least[row, None]), float("-inf"))
            parent, byte = psi.isfinite().nonzero().T
            score = psi[parent, byte]
            best = score.argsort(descending=True, stable=True)
            best = best[row[parent[best]].argsort(stable=True)]  # by row, best first
            owner = row[parent[best]]
            rank = torch.arange(len(best), device=best.device) - torch.searchsorted(owner, owner)
            best = best[rank < self.width]
            if not len(best):
                break
            parent, byte, score = parent[best], byte[best], score[best]
            row, node = row[parent], child[node[parent], byte]
            found[row, node] = score.float()
            p = self._extend(p[parent], byte + 1, score)
        return found

    def _follow(self, input_ids: Tensor) -> None:
        """Move the state of each row to its parent's prefix plus the row's newest token."""
        per_item = len(self.tokens) // len(self.log_probs)
        item = torch.arange(len(input_ids), device=input_ids.device) // per_item
        same = (self.tokens[None] == input_ids[:, None, :-1]).all(-1)
        same &= self.rows.item == item[:, None]
        self.rows, self.tokens = self.rows[same.int().argmax(1)], input_ids
        for column in self.head.spelling[input_ids[:, -1]].long().T:
            on = ((column > 0) & (column < UNSPELLABLE)).nonzero()[:, 0]
            if not len(on):
                break
            p, byte = self.rows[on], column[on]
            score = self._psi(p).gather(1, byte[:, None] - 1)[:, 0]
            self.rows[on] = self._extend(p, byte, score)


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
