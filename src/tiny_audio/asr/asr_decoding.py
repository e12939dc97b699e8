"""From encoder frames to text: CTC proposes, the language model chooses.

`PrefixSearch` finds the N best texts, the decoder scores them in one pass as a tree of tokens, and
`transcribe` takes the best. Shapes: b clips, t encoder frames, s prompt tokens.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .asr_config import DECODE, DECODING_DEFAULTS, check_keys
from .asr_search import Proposal

logger = logging.getLogger(__name__)
# Frames of a blank of more than this are no speech; so many of them are kept around it.
SURELY_BLANK, MARGIN = 0.9, 25
RESCORED = 8  # clips whose proposals are scored together: more would be padding for the most part


class TextTree:
    """Texts that share their beginnings, as one sequence that a decoder scores in one pass.

    Every node is a token behind its parent; a node sees the prompt, its ancestors and itself.

    Attributes:
        tokens: id of each node's token.
        parents: node before it, -1 for the prompt.
        depths: tokens before it, from 0 on.
        paths: the nodes of each text.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.paths: list[list[int]] = []
        nodes: dict[tuple[int, int], int] = {}
        for text in texts:
            node, path = -1, []
            for depth, token in enumerate(text):
                if (node, token) not in nodes:
                    nodes[node, token] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.depths.append(depth)
                node = nodes[node, token]
                path.append(node)
            self.paths.append(path)

    def visible(self) -> np.ndarray:
        """Which nodes each node sees: (n, n) bool."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):  # a parent comes before its children
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def score_trees(
    decoder: Any, embeds: Tensor, attention_mask: Tensor, trees: Sequence[TextTree]
) -> list[list[float]]:
    """Log-probability of each text of each clip behind its prompt, in one pass of the decoder.

    The prompt is computed once, and so is every beginning that texts share (tree attention, as
    speculative decoding verifies its drafts: Miao et al. 2024, arXiv 2305.09781).

    Args:
        decoder: a causal language model of transformers.
        embeds: (b, s, d) prompts with their audio, padded on the left; (1, s, d) for all clips.
        attention_mask: (b, s), or (1, s).
        trees: the texts of each clip, end tokens included.
    """
    b, device = len(trees), embeds.device
    prompts = decoder.base_model(
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
    )
    past, last = prompts.past_key_values, prompts.last_hidden_state[:, -1:]
    if len(embeds) < b:
        past.batch_repeat_interleave(b)
        last, attention_mask = last.expand(b, -1, -1), attention_mask.expand(b, -1)
    n = max(len(tree.tokens) for tree in trees)
    tokens = torch.zeros(b, n, dtype=torch.long, device=device)
    depths = torch.zeros_like(tokens)
    among = torch.eye(n, dtype=torch.bool, device=device).repeat(b, 1, 1)
    for i, tree in enumerate(trees):
        many = len(tree.tokens)
        tokens[i, :many] = torch.tensor(tree.tokens)
        depths[i, :many] = torch.tensor(tree.depths)
        among[i, :many, :many] = torch.from_numpy(tree.visible())
    prompt = attention_mask.bool()
    visible = torch.cat([prompt[:, None].expand(-1, n, -1), among], 2)
    tree_embeds = decoder.get_input_embeddings()(tokens).to(embeds.dtype)
    least = torch.finfo(embeds.dtype).min
    bias = torch.zeros_like(visible, dtype=embeds.dtype).masked_fill(~visible, least)
    with any_mask(decoder):
        nodes = decoder.base_model(
            inputs_embeds=tree_embeds,
            attention_mask=bias[:, None],
            position_ids=prompt.sum(1, keepdim=True) + depths,
            past_key_values=past,
        ).last_hidden_state
    hidden = torch.cat([last, nodes], 1)  # node -1 is the prompt's last token
    found = []
    for i, tree in enumerate(trees):
        before = 1 + torch.tensor(tree.parents, device=device)
        logits = decoder.get_output_embeddings()(hidden[i, before])
        target = torch.tensor(tree.tokens, device=device)
        log_probs = -F.cross_entropy(logits.float(), target, reduction="none")
        found.append([float(log_probs[path].sum()) for path in tree.paths])
    return found


@contextmanager
def any_mask(decoder: Any) -> Iterator[None]:
    """Attention that takes any mask: FlashAttention knows padding and causality alone."""
    before = decoder.config._attn_implementation
    if "flash" in str(before):
        decoder.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


@dataclass
class Candidate:
    """A proposal with what the decoder says of it, as log-probabilities.

    Attributes:
        proposal: of the search.
        decoder: of the text given the audio, by the trained decoder.
        language_model: of the text alone, by the decoder as it came.
    """

    proposal: Proposal
    decoder: float = 0.0
    language_model: float = 0.0

    def score(self, weights: dict[str, Any]) -> float:
        """All of it, with `ASRConfig.decoding`'s weights."""
        words = len(self.proposal.text.split())
        heard = self.proposal.ctc + weights["prior"] * self.proposal.prior
        fluent = weights["decoder"] * self.decoder
        fluent += weights["language_model"] * self.language_model
        return heard + fluent + weights["decoder_word"] * words


@dataclass
class Transcript:
    """What was decoded of a clip.

    Attributes:
        text: the transcript.
        truncated: the decoder, which wrote it alone, met its limit of tokens.
        log_probs: (t, c) float32 of the character head, if there is one.
    """

    text: str = ""
    truncated: bool = False
    log_probs: np.ndarray | None = field(default=None, repr=False)


@torch.no_grad()
def transcribe(
    model: Any,
    processor: Any,
    hidden: Tensor,
    steps: Tensor,
    decode: str | None = None,
    decoding: dict[str, Any] | None = None,
    generate_kwargs: dict[str, Any] | None = None,
) -> list[Transcript]:
    """The texts of a batch of encoded clips; every user of a model decodes by this.

    Args:
        model, processor: an `ASRModel` and its `ASRProcessor`.
        hidden: (b, t, d_encoder) from `ASRModel.encode`.
        steps: (b,) in frames.
        decode: "rescore", where the decoder chooses among the search's proposals; "ctc", the
            search's best; "generate", the decoder alone. None: the first that the model can.
        decoding: settings that override the config's.
        generate_kwargs: arguments of `generate`, for "generate".

    Raises:
        ValueError: for another `decode`, or one that the model lacks the head for.
    """
    decode = decode or ("rescore" if model.characters is not None else "generate")
    if decode not in DECODE:
        raise ValueError(f"decode is one of {', '.join(DECODE)}, not {decode!r}")
    if generate_kwargs and decode != "generate":
        raise ValueError(f"generate_kwargs need decode='generate', this is decode={decode!r}")
    check_keys(decoding or {}, DECODING_DEFAULTS, "decoding")
    settings = {**model.config.decoding, **(decoding or {})}
    settings["words"] = spell_terms(processor, settings["words"])
    if model.characters is None:
        if decode == "ctc":
            return [Transcript(processor.decode(ids)) for ids in model.ctc_greedy(hidden, steps)]
        if decode == "rescore":
            raise ValueError("this model has no character head: use decode='generate' or 'ctc'")
        return generate(model, processor, hidden, steps, generate_kwargs or {})
    log_probs = model.characters(hidden)
    found = [Transcript() for _ in steps]
    heard, lengths = trim(hidden, steps, log_probs[..., 0])
    spoken = lengths.nonzero()[:, 0].tolist()  # what holds no speech is not decoded
    if spoken and decode == "generate":
        some = generate(model, processor, heard[spoken], lengths[spoken], generate_kwargs or {})
    elif spoken:
        proposals = model.search(settings)(log_probs[spoken], steps[spoken])
        texts = [first[0].text for first in proposals]
        if decode == "rescore":
            scored = rescore(model, processor, heard[spoken], lengths[spoken], proposals, settings)
            texts = [choose(candidates, settings) for candidates in scored]
        some = [Transcript(text) for text in texts]
    for i, transcript in zip(spoken, some if spoken else [], strict=True):
        found[i] = transcript
    for transcript, row, n in zip(found, log_probs, steps.tolist(), strict=True):
        transcript.log_probs = row[:n].float().cpu().numpy()
    return found


def spell_terms(processor: Any, terms: Sequence[str]) -> list[str]:
    """The words of names and terms as the character head spells them, each once.

    One with letters that it does not know is left out, and said.
    """
    words = set[str]()
    for term in terms:
        spelled = processor.spoken(term)
        if sum(map(str.isalnum, spelled)) == sum(map(str.isalnum, term)):
            words |= {*spelled.split()}
        else:
            say_once(f"{term!r} is not preferred: the model does not know all of its letters")
    return sorted(words)


@cache
def say_once(line: str) -> None:
    """Log a warning the first time that it is given."""
    logger.warning(line)


def trim(hidden: Tensor, steps: Tensor, blank: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the silence before and behind the speech of each clip down to a margin.

    Args:
        hidden: (b, t, d) encoder frames.
        steps: (b,) frames of each clip.
        blank: (b, t) log-probability of the blank.

    Returns:
        Frames (b, t', d), zero beyond each clip, and lengths (b,), 0 where nothing is spoken.
    """
    t = hidden.shape[1]
    frame = torch.arange(t, device=hidden.device)
    spoken = (blank < math.log(SURELY_BLANK)) & (frame < steps[:, None])
    any_, last = spoken.any(1), t - spoken.flip(1).int().argmax(1)
    first = (spoken.int().argmax(1) - MARGIN).clamp(min=0)
    lengths = torch.where(any_, torch.minimum(last + MARGIN, steps) - first, 0)
    index = (first[:, None] + frame[: max(1, int(lengths.max()))]).clamp(max=t - 1)
    cut = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
    inside = torch.arange(cut.shape[1], device=hidden.device) < lengths[:, None]
    return cut.masked_fill(~inside[..., None], 0.0), lengths


def choose(candidates: list[Candidate], weights: dict[str, Any]) -> str:
    """The text of the best of a clip's candidates."""
    return max(candidates, key=lambda candidate: candidate.score(weights)).proposal.text


def rescore(
    model: Any,
    processor: Any,
    hidden: Tensor,
    steps: Tensor,
    found: list[list[Proposal]],
    settings: dict[str, Any],
) -> list[list[Candidate]]:
    """Let the decoder score the proposals of each clip that are near its best one.

    A clip with one such proposal is not scored: there is nothing to choose.
    """
    kept = []
    for proposals in found:
        near = [p for p in proposals if p.score >= proposals[0].score - settings["margin"]]
        kept.append([Candidate(p) for p in near[: settings["proposals"]]])
    open_ = [i for i, some in enumerate(kept) if len(some) > 1]
    for at in range(0, len(open_), RESCORED):
        some = open_[at : at + RESCORED]
        texts = [[processor.tokenize(c.proposal.text) for c in kept[i]] for i in some]
        if settings["decoder"]:
            width = int(steps[some].max())
            prompt = processor.prompt(steps[some].tolist()).to(hidden.device)
            embeds, mask, _ = model.prompts(hidden[some, :width], steps[some], **prompt)
            _note(kept, some, "decoder", model.score_texts(embeds, mask, texts))
        if settings["language_model"]:
            prompt = processor.prompt([0]).to(hidden.device)  # the same for all of them
            embeds = model.get_input_embeddings()(prompt["input_ids"])
            with model.decoder_as_it_came():
                scores = model.score_texts(embeds, prompt["attention_mask"], texts)
            _note(kept, some, "language_model", scores)
    return kept


def _note(
    kept: list[list[Candidate]], clips: list[int], what: str, scores: list[list[float]]
) -> None:
    for clip, row in zip(clips, scores, strict=True):
        for candidate, score in zip(kept[clip], row, strict=True):
            setattr(candidate, what, score)


def generate(
    model: Any, processor: Any, hidden: Tensor, steps: Tensor, options: dict[str, Any]
) -> list[Transcript]:
    """What the decoder alone writes, token by token."""
    mask = torch.arange(hidden.shape[1], device=steps.device) < steps[:, None]
    prompt = processor.prompt(steps.tolist()).to(hidden.device)
    ids = model.generate(hidden, mask, **prompt, encoded=True, **options).tolist()
    limits = model.token_limits((steps + processor.stack - 1) // processor.stack).tolist()
    found = []
    for row, limit in zip(ids, limits, strict=True):
        spoken = [token for token in row if token != processor.end_token_id]
        cut = processor.end_token_id not in row or len(spoken) >= limit
        found.append(Transcript(processor.decode(spoken), truncated=cut))
    return found
