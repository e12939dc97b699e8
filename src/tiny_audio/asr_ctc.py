"""The CTC side of the model: alignment head, joint decoding, and the limit on new tokens.

Shapes: b clips, f projected frames, d the decoder's hidden size, c CTC classes (class 0 is the
blank), rows hypotheses of a search.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessor

from .asr_config import ASRConfig

IGNORE = -100  # label positions that carry no target
LOG_ZERO = -1e4  # log of "impossible", finite so that sums of it stay finite


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
        self.log_scale = nn.Parameter(torch.tensor(3.0))
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


class CTCPrefixScorer(LogitsProcessor):
    """Joint CTC/decoder decoding: adds the CTC prefix score to the decoder's log-probabilities.

    score(token) = log p_decoder(token | prefix) + weight * log [psi(prefix token) / psi(prefix)]
    where psi is the CTC probability of all texts that begin so (Watanabe et al. 2017, "Hybrid
    CTC/Attention Architecture", algorithm 2). All candidates are scored at once: with r(t) the
    probability that frames up to t spell the prefix, psi(prefix c) = sum_t r(t-1) p(c | t), a
    matrix product. Rows may be reordered by beam search: a row finds its parent by its tokens.
    """

    def __init__(self, ctc: CTCHead, log_probs: Tensor, lengths: Tensor, end: int, weight: float):
        b, f, _ = log_probs.shape
        beyond = torch.arange(f, device=lengths.device) >= lengths[:, None]
        log_probs = log_probs.double().masked_fill(beyond[..., None], LOG_ZERO)
        log_probs[..., 0].masked_fill_(beyond, 0.0)  # padding can only be blank
        self.log_probs, self.probs = log_probs, log_probs[..., 1:].exp()  # (b, f, c)
        self.ctc, self.end, self.weight = ctc, end, weight
        self.tokens = torch.zeros(b, 0, dtype=torch.long, device=lengths.device)
        self.item = torch.arange(b, device=lengths.device)  # the clip of each row
        self.r_token = torch.full((b, f), LOG_ZERO, device=lengths.device, dtype=torch.double)
        self.r_blank = log_probs[..., 0].cumsum(1)  # the empty prefix: blanks only
        self.score = torch.zeros(b, device=lengths.device, dtype=torch.double)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Token ids (rows, n) so far and logits (rows, vocab) -> joint scores (rows, vocab)."""
        if input_ids.shape[1]:
            self._extend(input_ids)
        elif len(input_ids) > len(self.item):  # beam search: every clip has several rows
            self._select(self.item.repeat_interleave(len(input_ids) // len(self.item)), input_ids)
        psi = self._psi()  # (rows, c - 1)
        end = torch.logaddexp(self.r_token[:, -1], self.r_blank[:, -1])
        joint = torch.full_like(scores, float("-inf"), dtype=torch.float)
        joint[:, self.ctc.token_ids] = (self.weight * (psi - self.score[:, None])).float()
        joint[:, self.end] = (self.weight * (end - self.score)).float()
        return joint + scores.float().log_softmax(-1)

    def _before(self, r: Tensor, first: float) -> Tensor:
        """r(t - 1) for every t, with the given value before the first frame."""
        return torch.cat([r.new_full((len(r), 1), first), r[:, :-1]], dim=1)

    def _phi(self) -> tuple[Tensor, Tensor]:
        """Probability of the prefix before frame t: (rows, f) for a new token, for a repeat."""
        empty = self.tokens.shape[1] == 0
        blank = self._before(self.r_blank, 0.0 if empty else LOG_ZERO)
        return torch.logaddexp(self._before(self.r_token, LOG_ZERO), blank), blank

    def _psi(self) -> Tensor:
        """log psi(prefix c) for every class c but the blank: (rows, c - 1)."""
        fresh, repeat = self._phi()
        peak = fresh.max(1, keepdim=True).values
        probs = self.probs[self.item]
        psi = torch.einsum("rf,rfc->rc", (fresh - peak).exp(), probs)
        if self.tokens.shape[1]:
            last = self.ctc.class_of[self.tokens[:, -1]] - 1  # -1: the end token, never extended
            row = torch.arange(len(last), device=last.device)
            psi[row, last] = ((repeat - peak).exp() * probs[row, :, last]).sum(1)
        return psi.clamp(min=1e-300).log() + peak

    def _select(self, rows: Tensor, tokens: Tensor) -> None:
        self.item, self.tokens = self.item[rows], tokens
        self.r_token, self.r_blank = self.r_token[rows], self.r_blank[rows]
        self.score = self.score[rows]

    def _extend(self, input_ids: Tensor) -> None:
        """Move the state of each row to its parent's prefix plus the row's newest token."""
        per_item = len(self.item) // len(self.item.unique())
        item = torch.arange(len(input_ids), device=input_ids.device) // per_item
        same = (self.tokens[None] == input_ids[:, None, :-1]).all(-1) & (self.item == item[:, None])
        self._select(same.int().argmax(1), input_ids[:, :-1])
        newest = self.ctc.class_of[input_ids[:, -1]]
        row = torch.arange(len(newest), device=newest.device)
        self.score = self._psi()[row, newest - 1]
        fresh, blank = self._phi()
        repeat = self.tokens.shape[1] > 0 and self.tokens[:, -1] == input_ids[:, -1]
        phi = torch.where(torch.as_tensor(repeat, device=newest.device)[..., None], blank, fresh)
        # r_token(t) = [r_token(t-1) + phi(t)] p(t) unrolled: one cumulative sum instead of a loop
        log_p = self.log_probs[self.item, :, newest]  # (rows, f)
        total = log_p.cumsum(1)
        self.r_token = total + torch.logcumsumexp(phi - self._before(total, 0.0), 1)
        total = self.log_probs[self.item, :, 0].cumsum(1)
        into = self._before(self.r_token, LOG_ZERO)
        self.r_blank = total + torch.logcumsumexp(into - self._before(total, 0.0), 1)
        self.tokens = input_ids


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
