"""From encoder frames to text: the CTC search proposes texts and the decoder chooses one.

`PrefixSearch` finds the N best texts. The decoder scores them in one pass as a tree of tokens.
`transcribe` returns the best. Shapes: b clips, t encoder frames, s prompt tokens.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .asr_config import DECODE, SPARE_TOKENS, decoding_settings
from .asr_search import Proposal, silent_frames

logger: Any = logging.get_logger(__name__)
# The weights of `Candidate.score`, in the order of `Candidate.parts`.
SCORE_WEIGHTS = ("prior", "decoder", "language_model", "decoder_word")
RESCORE_CLIPS = 8  # clips rescored together: padding, or attention among them, grows with it


class TextTree:
    """A prefix tree of texts that a decoder scores in one pass.

    Each node is a token that follows its parent. A node sees the prompt, its ancestors and itself.
    The last token of a text is not a node: nothing follows it.

    Attributes:
        tokens: token id of each node.
        parents: parent of each node, -1 for the prompt.
        depths: number of tokens between the prompt and each node.
        texts: token ids of each text.
        paths: the node before each token of each text.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.texts = [list(text) for text in texts]
        self.paths: list[list[int]] = []
        nodes: dict[tuple[int, int], int] = {}
        for text in self.texts:
            path = [-1]
            for depth, token in enumerate(text[:-1]):
                branch = path[-1], token
                if branch not in nodes:
                    nodes[branch] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(path[-1])
                    self.depths.append(depth)
                path.append(nodes[branch])
            self.paths.append(path)

    def visible(self) -> np.ndarray:
        """Return the (n, n) bool mask of the nodes that each node sees."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):  # a parent comes before its children
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


@dataclass
class Prompts:
    """A batch of prompts after the decoder has processed them.

    Attributes:
        mask: (b, s) attention mask; padding is on the left.
        last: (b, d) hidden state of each prompt's last token.
        past_key_values: keys and values of all tokens.
    """

    mask: Tensor
    last: Tensor
    past_key_values: Any


def read_prompts(decoder: Any, embeds: Tensor, attention_mask: Tensor) -> Prompts:
    """Run a transformers language model over prompts (b, s, d) with their mask (b, s)."""
    places = (attention_mask.cumsum(1) - 1).clamp(min=0)
    output = decoder.base_model(
        inputs_embeds=embeds, attention_mask=attention_mask, position_ids=places, use_cache=True
    )
    return Prompts(attention_mask, output.last_hidden_state[:, -1], output.past_key_values)


def read_text_prompt(model: Any, processor: Any) -> Prompts:
    """Run the decoder, without its LoRA, over a prompt that contains no audio.

    These weights never change, so the model caches the result.
    """
    inputs = processor.prompt([0]).to(model.device)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    key = tuple(inputs["input_ids"][0].tolist()), embeds.device, embeds.dtype, model.training
    if model.last_text_prompt is None or model.last_text_prompt[0] != key:
        with model.decoder_without_lora():
            prompts = read_prompts(model.decoder, embeds, inputs["attention_mask"])
        model.last_text_prompt = key, prompts
    prompts = model.last_text_prompt[1]
    # Scoring appends to the keys and values.
    return replace(prompts, past_key_values=deepcopy(prompts.past_key_values))


def score_trees(decoder: Any, prompts: Prompts, trees: Sequence[TextTree]) -> list[list[float]]:
    """Score the texts of each clip after its prompt, in one pass of the decoder.

    A prefix that texts share is computed once. Speculative decoding uses the same tree attention to
    verify drafts (Miao et al. 2024, arXiv 2305.09781).

    Args:
        decoder: a causal language model of transformers.
        prompts: the prompt of each of b clips. Its `past_key_values` cannot be used again.
        trees: the texts of each clip, including end tokens.

    Returns:
        Log-probability of each text of each clip.
    """
    b, device, dtype = len(trees), prompts.last.device, prompts.last.dtype
    n = max(1, *(len(tree.tokens) for tree in trees))
    tokens = torch.zeros(b, n, dtype=torch.long, device=device)
    depths = torch.zeros_like(tokens)
    tree_mask = torch.eye(n, dtype=torch.bool, device=device).repeat(b, 1, 1)
    for i, tree in enumerate(trees):
        size = len(tree.tokens)
        tokens[i, :size] = torch.tensor(tree.tokens)
        depths[i, :size] = torch.tensor(tree.depths)
        tree_mask[i, :size, :size] = torch.from_numpy(tree.visible())
    prompt = prompts.mask.bool()
    visible = torch.cat([prompt[:, None].expand(-1, n, -1), tree_mask], 2)
    bias = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    nodes = decoder.base_model(
        inputs_embeds=decoder.get_input_embeddings()(tokens).to(dtype),
        attention_mask=bias[:, None],
        position_ids=prompt.sum(1, keepdim=True) + depths,
        past_key_values=prompts.past_key_values,
    ).last_hidden_state
    scores = []
    for i, tree in enumerate(trees):
        # The prompt's last token comes last: it is node -1.
        hidden = torch.cat([nodes[i, : len(tree.tokens)], prompts.last[i : i + 1]])
        after = decoder.get_output_embeddings()(hidden).float().log_softmax(-1)
        scores.append([float(after[path, text].sum())
                       for path, text in zip(tree.paths, tree.texts, strict=True)])  # fmt: skip
    return scores


@dataclass
class Candidate:
    """A proposal with its log-probabilities from the decoder, 0.0 where none was computed.

    Attributes:
        proposal: from the search.
        decoder: log p(text | audio) from the trained decoder.
        language_model: log p(text) from the decoder without LoRA.
    """

    proposal: Proposal
    decoder: float = 0.0
    language_model: float = 0.0

    def parts(self) -> tuple[float, ...]:
        """The parts of the score: the CTC score, and one for each of `SCORE_WEIGHTS`."""
        words = len(self.proposal.text.split())
        first_pass = self.proposal.ctc, self.proposal.prior
        return *first_pass, self.decoder, self.language_model, float(words)

    def score(self, settings: dict[str, Any]) -> float:
        """Add up the parts, weighted by `ASRConfig.decoding`; the CTC score has weight 1."""
        ctc, *others = self.parts()
        return ctc + sum(settings[name] * x for name, x in zip(SCORE_WEIGHTS, others, strict=True))


@dataclass
class Transcript:
    """The decoded text of a clip.

    Attributes:
        text: the transcript.
        truncated: whether the decoder reached its token limit (only with "generate").
        log_probs: (t, c) float32 output of the character head, if there is one.
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
    """Transcribe a batch of encoded clips. All decoding goes through this function.

    Args:
        model, processor: an `ASRModel` and its `ASRProcessor`.
        hidden: (b, t, d_encoder) from `ASRModel.encode`.
        steps: (b,) number of frames of each clip.
        decode: "rescore" (the decoder chooses among the search's proposals), "ctc" (the search's
            best proposal) or "generate" (the decoder alone). None: "rescore" if the model has a
            character head, else "generate".
        decoding: settings that override the config's.
        generate_kwargs: arguments of `generate`, only for "generate".

    Raises:
        ValueError: if `decode` is unknown, or needs a head that the model lacks.
    """
    decode = decode or ("rescore" if model.characters is not None else "generate")
    if decode not in DECODE:
        raise ValueError(f"decode must be one of {', '.join(DECODE)}, not {decode!r}")
    if generate_kwargs and decode != "generate":
        raise ValueError(f"generate_kwargs need decode='generate', not {decode!r}")
    settings = decoding_settings({**model.config.decoding, **(decoding or {})})
    terms = settings["words"] or []
    if isinstance(terms, str):
        raise ValueError(f"decoding: words must be a list, not {terms!r}")
    if terms and (decode == "generate" or model.characters is None):
        logger.warning_once("no words are preferred: this way of decoding writes freely")
    settings["words"] = spell_terms(processor, terms)
    if model.characters is None:
        if decode == "ctc":
            return [Transcript(processor.decode(ids)) for ids in model.ctc_greedy(hidden, steps)]
        if decode == "rescore":
            raise ValueError("this model has no character head: use decode='generate'")
        return generate(model, processor, hidden, steps, generate_kwargs or {})
    log_probs = model.characters(hidden)
    results = [Transcript() for _ in steps]
    silent = silent_frames(log_probs, steps).all(1)
    spoken = (~silent).nonzero()[:, 0].tolist()  # clips without speech are not decoded
    lengths = steps[spoken]
    if spoken and decode == "generate":
        decoded = generate(model, processor, hidden[spoken], lengths, generate_kwargs or {})
    elif spoken:
        proposals = model.propose(log_probs[spoken], lengths, settings)
        texts = [first[0].text for first in proposals]
        if decode == "rescore":
            scored = rescore(model, processor, hidden[spoken], lengths, proposals, settings)
            texts = [choose(candidates, settings) for candidates in scored]
        decoded = [Transcript(text) for text in write_terms(processor, texts, terms)]
    for i, transcript in zip(spoken, decoded if spoken else [], strict=True):
        results[i] = transcript
    for transcript, row, n in zip(results, log_probs, steps.tolist(), strict=True):
        transcript.log_probs = row[:n].float().cpu().numpy()
    return results


def spell_terms(processor: Any, terms: Sequence[str]) -> list[str]:
    """Split names and terms into unique words as the character head spells them.

    A term with letters that the head does not know is skipped with a warning.
    """
    words = set[str]()
    for term in terms:
        letters = sum(map(str.isalnum, term))
        for spelled in spellings(processor, term):
            if sum(map(str.isalnum, spelled)) == letters:
                words |= {*spelled.split()}
            else:
                logger.warning_once(f"{term!r} is not preferred: not all of its letters are known")
    return sorted(words)


def spellings(processor: Any, term: str) -> list[str]:
    """Return how transcripts may spell a term: "Jean-Luc" is "jeanluc" or "jean luc" to them."""
    term = term.replace("’", "'")
    return sorted({processor.spoken(term), processor.spoken(re.sub(r"[^\w']+", " ", term))})


def write_terms(processor: Any, texts: list[str], terms: Sequence[str]) -> list[str]:
    """Write terms with capitals as they were given, wherever the texts have their words."""
    capitals = [term for term in terms if term != term.lower()]
    given = {spelled: term for term in capitals for spelled in spellings(processor, term)}
    if words := sorted(filter(None, given), key=len, reverse=True):  # the longest term wins
        found = re.compile(rf"(?i)\b(?:{'|'.join(map(re.escape, words))})\b")
        texts = [found.sub(lambda m: given.get(m[0].lower(), m[0]), text) for text in texts]
    return texts


def choose(candidates: list[Candidate], settings: dict[str, Any]) -> str:
    """Return the text of the best candidate of a clip."""
    return max(candidates, key=lambda candidate: candidate.score(settings)).proposal.text


@torch.no_grad()
def rescore(
    model: Any,
    processor: Any,
    hidden: Tensor,
    steps: Tensor,
    proposals: list[list[Proposal]],
    settings: dict[str, Any],
) -> list[list[Candidate]]:
    """Score with the decoder those proposals of each clip that are close to its best one.

    They are within `margin` of it, at most `proposals`. If only one is left, it is not scored.
    """
    kept = []
    for ranked in proposals:
        close = [p for p in ranked if p.score >= ranked[0].score - settings["margin"]]
        kept.append([Candidate(p) for p in close[: settings["proposals"]]])
    undecided = [i for i, candidates in enumerate(kept) if len(candidates) > 1]
    for start in range(0, len(undecided), RESCORE_CLIPS):
        clips = undecided[start : start + RESCORE_CLIPS]
        rows = [kept[i] for i in clips]
        scored = [candidate for row in rows for candidate in row]
        texts = [
            [[*processor.tokenize(c.proposal.text), processor.end_token_id] for c in row]
            for row in rows
        ]
        if settings["decoder"]:
            width = int(steps[clips].max())
            inputs = processor.prompt(steps[clips].tolist()).to(hidden.device)
            embeds, mask, _ = model.prompts(hidden[clips, :width], steps[clips], **inputs)
            prompts = read_prompts(model.decoder, embeds, mask)
            scores = score_trees(model.decoder, prompts, [TextTree(of_clip) for of_clip in texts])
            for candidate, score in zip(scored, chain(*scores), strict=True):
                candidate.decoder = score
        if settings["language_model"]:
            prompts = read_text_prompt(model, processor)
            with model.decoder_without_lora():
                # All clips have the same prompt, so their texts are one tree.
                (scores,) = score_trees(model.decoder, prompts, [TextTree([*chain(*texts)])])
            for candidate, score in zip(scored, scores, strict=True):
                candidate.language_model = score
    return kept


def generate(
    model: Any, processor: Any, hidden: Tensor, steps: Tensor, options: dict[str, Any]
) -> list[Transcript]:
    """Transcribe with the decoder alone, token by token."""
    mask = torch.arange(hidden.shape[1], device=steps.device) < steps[:, None]
    prompt = processor.prompt(steps.tolist()).to(hidden.device)
    ids = model.generate(hidden, mask, **prompt, encoded=True, **options).tolist()
    limits = (steps + processor.stack - 1) // processor.stack + SPARE_TOKENS
    results = []
    for row, limit in zip(ids, limits.tolist(), strict=True):
        spoken = [token for token in row if token != processor.end_token_id]
        cut = processor.end_token_id not in row or len(spoken) >= limit
        results.append(Transcript(processor.decode(spoken), truncated=cut))
    return results
