"""First pass of decoding: N-best search over the character head's posteriors.

It is a prefix beam search with the words and the n-gram of the training transcripts. Each frame
adds at most one character, so it cannot loop and its text is no longer than the audio allows.

Shapes: b clips, t encoder frames, k beams, c classes of characters (class 0 is the blank).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .asr_ngram import NGram

IMPOSSIBLE = -1e30  # log of "impossible"; finite, so sums of it stay comparable
SPACE = 32  # the byte between words
NO_TEXT, NO_PARENT = -2, -1  # hashes that never match a text
OPEN = -1  # node of a word that the lexicon lacks
# A frame is silent if its blank is more likely than SURE_BLANK, or if fewer than LEAST_LETTERS are
# expected within NEAR frames on either side (0.5 s at 50 Hz). Letters that are less likely than the
# blank do not count: hum has many of them, and speech hardly any without likely ones beside them.
SURE_BLANK, LEAST_LETTERS, NEAR = 0.99, 1.0, 25


@dataclass
class Proposal:
    """A text that the search proposes for a clip.

    Attributes:
        text: as the character head spells it.
        ctc: log-probability of the characters, at the search's temperature.
        prior: sum of the n-gram score, the word bonuses and the costs of unknown words.
        score: `ctc` + `prior`; the search returns the highest first.
    """

    text: str
    ctc: float
    prior: float

    @property
    def score(self) -> float:
        """Score of the first pass."""
        return self.ctc + self.prior


class Lexicon:
    """Words as a prefix tree over character classes.

    Node 0 is the root. `child[node, class]` is the next node, or `OPEN` if there is none.
    `word[node]` is the n-gram's id of the word that ends at the node, or of `<unk>` if none does.
    `best[node]` is the log-probability of the most common word at or below the node. The last row
    of each is that of `OPEN`, which is -1.
    """

    def __init__(self, ngram: NGram, alphabet: Sequence[int], device: Any = "cpu") -> None:
        class_of = {byte: i for i, byte in enumerate(alphabet, 1)}
        children: list[dict[int, int]] = [{}]
        words = [ngram.unknown]
        for i, word in enumerate(ngram.words):
            spelled = [class_of.get(byte, 0) for byte in word.encode()]
            if i in (ngram.end, ngram.unknown, ngram.id_of["<s>"]) or not all(spelled):
                continue
            node = 0
            for character in spelled:
                if character not in children[node]:
                    children[node][character] = len(children)
                    children.append({})
                    words.append(ngram.unknown)
                node = children[node][character]
            words[node] = i
        child = np.full((len(children) + 1, len(alphabet) + 1), OPEN, np.int32)
        for node, after in enumerate(children):
            child[node, list(after)] = list(after.values())
        best = [ngram.unigrams[word] for word in words]
        for node in reversed(range(len(children))):  # a node's children come after it
            best[node] = max([best[node], *(best[after] for after in children[node].values())])
        self.child = torch.from_numpy(child).to(device)
        self.word = torch.tensor([*words, ngram.unknown], device=device)
        self.best = torch.tensor([*best, ngram.unigrams[ngram.unknown]], device=device)


@dataclass
class Beams:
    """Hypotheses of a batch of clips; every tensor is (b, k)."""

    blank: Tensor  # log-probability of the paths that end in a blank
    label: Tensor  # log-probability of the paths that end in the last character
    prior: Tensor  # see `Proposal`
    hash: Tensor  # hash of all characters
    parent: Tensor  # hash of all characters but the last
    last: Tensor  # class of the last character, 0 at the start
    node: Tensor  # lexicon node within the current word
    depth: Tensor  # number of characters in the current word
    before: Tensor  # n-gram's id of the word before the current one

    @property
    def score(self) -> Tensor:
        """Score (b, k) that ranks the hypotheses."""
        return torch.logaddexp(self.blank, self.label) + self.prior

    def take(self, index: Tensor) -> "Beams":
        """Select the hypotheses at `index` (b, k)."""
        numbers = torch.stack([self.blank, self.label, self.prior])
        marks = torch.stack([self.hash, self.parent, self.last, self.node, self.depth, self.before])
        numbers = numbers.gather(2, index.expand_as(numbers))
        return Beams(*numbers, *marks.gather(2, index.expand_as(marks)))


def _hash(parent: Tensor, character: Tensor) -> Tensor:
    """Hash a text after adding a character, in 64 bits that wrap around."""
    return (parent + character + 1) * 6364136223846793005 + 1442695040888963407


class PrefixSearch:
    """Prefix beam search (Hannun et al. 2014, arXiv 1408.2873) over a batch of posteriors.

    All clips and hypotheses advance together, frame by frame, in a few tensor operations. A text is
    one hypothesis, however many paths spell it. The n-gram scores a word of the lexicon when the
    word ends. A word that the lexicon lacks costs `open_character` for each of its characters.

    Args:
        alphabet: byte of each class from 1 on.
        ngram: n-gram of the training transcripts; an empty one if only the characters count.
        settings: see `DECODING_DEFAULTS`; costs are natural logarithms.
        device: device that runs the search.
    """

    def __init__(
        self, alphabet: Sequence[int], ngram: NGram, settings: dict, device: Any = "cpu"
    ) -> None:
        self.alphabet, self.settings, self.device = list(alphabet), settings, device
        self.ngram, self.lexicon = ngram.to(device), Lexicon(ngram, alphabet, device)
        self.space = self.alphabet.index(SPACE) + 1 if SPACE in self.alphabet else -1

    def __call__(self, log_probs: Tensor, lengths: Tensor) -> list[list[Proposal]]:
        """Log-probabilities (b, t, c) of clips of `lengths` (b,) -> proposals, best first."""
        log_probs, lengths = log_probs.to(self.device).float(), lengths.to(self.device)
        scaled = (log_probs / self.settings["temperature"]).log_softmax(-1)
        frames, dropped = squeeze(scaled, lengths, silent_frames(log_probs, lengths))
        beams = self.start(len(frames), frames.device)
        history: list[tuple[Tensor, Tensor]] = []
        for t in range(frames.shape[1]):
            beams, origin, added = self.step(beams, frames[:, t])
            history.append((origin, added))
        beams = self.finish(beams)
        return self.read(beams, history, dropped)

    def start(self, clips: int, device: torch.device) -> Beams:
        """Start each clip with the empty text; the other beams are impossible."""
        shape = (clips, self.settings["beams"])
        zero = torch.zeros(shape, dtype=torch.long, device=device)
        blank = torch.full(shape, IMPOSSIBLE, dtype=torch.float, device=device)
        blank[:, 0] = 0.0
        return Beams(
            blank=blank,
            label=torch.full_like(blank, IMPOSSIBLE),
            prior=torch.zeros_like(blank),
            hash=torch.where(blank == 0.0, 0, NO_TEXT),
            parent=torch.full_like(zero, NO_PARENT),
            last=zero,
            node=zero,
            depth=zero,
            before=torch.full_like(zero, self.ngram.start),
        )

    def step(self, beams: Beams, frame: Tensor) -> tuple[Beams, Tensor, Tensor]:
        """Advance by one frame (b, c).

        Returns:
            The best hypotheses, the index (b, k) of the hypothesis that each comes from, and the
            character (b, k) that each gained, 0 for none.
        """
        k = beams.last.shape[1]
        stay, merged = self.keep(beams, frame)
        log_probs, new = frame[:, 1:].topk(min(self.settings["candidates"], frame.shape[1] - 1))
        new = new + 1  # (b, n)
        ended, word = self.end_word(beams)
        label, prior, node = self.extend(beams, new, log_probs, merged, ended)
        score = torch.cat([stay.score, (label + prior).flatten(1)], 1)  # (b, k + k n)
        node = torch.cat([beams.node, node.flatten(1)], 1)
        # Columns 0 to k - 1 keep a text; column k + i n + j adds the j-th character to text i.
        picked = (score + self.look_ahead(node)).topk(k, 1).indices
        grows, extension = picked >= k, (picked - k).clamp(min=0)
        origin = torch.where(grows, extension // new.shape[1], picked)
        gained = new.gather(1, extension % new.shape[1]).masked_fill(~grows, 0)
        beams = self.grow(stay.take(origin), gained, word.gather(1, origin))
        beams.node = node.gather(1, picked)
        beams.blank = beams.blank.masked_fill(grows, IMPOSSIBLE)
        beams.label = torch.cat([stay.label, label.flatten(1)], 1).gather(1, picked)
        beams.prior = torch.cat([stay.prior, prior.flatten(1)], 1).gather(1, picked)
        dead = score.gather(1, picked) < IMPOSSIBLE / 2
        beams.hash = beams.hash.masked_fill(dead, NO_TEXT)
        beams.parent = beams.parent.masked_fill(dead, NO_PARENT)
        return beams, origin, gained

    def keep(self, beams: Beams, frame: Tensor) -> tuple[Beams, Tensor]:
        """Score each hypothesis with its text unchanged.

        The frame is a blank or repeats the last character. If the parent (the text without its
        last character) is among the hypotheses, it reaches the same text by adding that character;
        its probability is added.

        Returns:
            The hypotheses, and a mask (b, k, c) of the extensions that are thereby counted.
        """
        total = torch.logaddexp(beams.blank, beams.label)
        again = frame.gather(1, beams.last)
        is_parent = beams.parent[:, :, None] == beams.hash[:, None]  # (b, k, k)
        found, at = is_parent.any(2), is_parent.byte().argmax(2)
        double = beams.last.gather(1, at) == beams.last  # needs a blank in between
        reached = torch.where(double, beams.blank.gather(1, at), total.gather(1, at))
        reached = reached.masked_fill(~found, IMPOSSIBLE)
        label = torch.logaddexp(beams.label, reached) + again
        stay = replace(beams, blank=total + frame[:, :1], label=label)
        (b, k), c = beams.last.shape, frame.shape[1]
        merged = torch.zeros(b, k * c, dtype=torch.uint8, device=frame.device)
        merged.scatter_add_(1, at * c + beams.last, found.byte())
        return stay, merged.view(b, k, c).bool()

    def extend(
        self, beams: Beams, new: Tensor, log_probs: Tensor, merged: Tensor, ended: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score each hypothesis with each of the characters `new` (b, n) added to its text.

        Args:
            beams, merged: see `keep`.
            new, log_probs: classes (b, n) and their log-probabilities in this frame.
            ended: the prior (b, k) if the current word ended here.

        Returns:
            `label`, `prior` and `node` (b, k, n) of the extensions.
        """
        total = torch.logaddexp(beams.blank, beams.label)
        new = new[:, None].expand(-1, beams.last.shape[1], -1)
        double = new == beams.last[..., None]
        label = torch.where(double, beams.blank[..., None], total[..., None]) + log_probs[:, None]
        node = self.lexicon.child[beams.node].gather(2, new).long()
        price = torch.where(beams.node == OPEN, 1, beams.depth + 1)
        as_unknown = beams.prior - self.settings["open_character"] * price
        prior = torch.where(node == OPEN, as_unknown[..., None], beams.prior[..., None])
        is_space = new == self.space
        prior = torch.where(is_space, ended[..., None], prior)
        node = node.masked_fill(is_space, 0)
        forbidden = merged.gather(2, new) | (is_space & (beams.depth == 0)[..., None])
        return label.masked_fill(forbidden, IMPOSSIBLE), prior, node

    def look_ahead(self, node: Tensor) -> Tensor:
        """Score each node by the most common word that it can still become.

        Otherwise the n-gram would count only when a word ends, and until then rare words could push
        out common ones (Steinbiss, Tran and Ney 1994, "Improvements in beam search").
        """
        return self.settings["ngram"] * self.lexicon.best[node]

    def grow(self, beams: Beams, gained: Tensor, word: Tensor) -> Beams:
        """Add the character `gained` (b, k), 0 for none, to the text of each hypothesis.

        `word` (b, k) is the n-gram's id of the word that a space would end.
        """
        grows, is_space = gained > 0, gained == self.space
        return replace(
            beams,
            hash=torch.where(grows, _hash(beams.hash, gained), beams.hash),
            parent=torch.where(grows, beams.hash, beams.parent),
            last=torch.where(grows, gained, beams.last),
            depth=(beams.depth + grows).masked_fill(is_space, 0),
            before=torch.where(is_space, word, beams.before),
        )

    def end_word(self, beams: Beams) -> tuple[Tensor, Tensor]:
        """Return the prior (b, k) and the n-gram's id of the current word if it ended here."""
        word = self.lexicon.word[beams.node]
        log_prob = self.ngram.score(beams.before, word)
        unfinished = (word == self.ngram.unknown) & (beams.node != OPEN)
        price = self.settings["open_character"] * unfinished * beams.depth
        return beams.prior + self.settings["ngram"] * log_prob + self.settings["word"] - price, word

    def finish(self, beams: Beams) -> Beams:
        """Add the n-gram scores of the last word and of the end of the text."""
        ended, word = self.end_word(beams)
        inside = beams.depth > 0
        prior = torch.where(inside, ended, beams.prior)
        before = torch.where(inside, word, beams.before)
        log_prob = self.ngram.score(before, torch.full_like(before, self.ngram.end))
        return replace(beams, prior=prior + self.settings["ngram"] * log_prob)

    def read(
        self, beams: Beams, history: list[tuple[Tensor, Tensor]], constant: Tensor
    ) -> list[list[Proposal]]:
        """Trace the hypotheses back to their texts, and add `constant` (b,) to each score."""
        at = torch.arange(beams.last.shape[1], device=beams.last.device).expand_as(beams.last)
        gained = [torch.zeros_like(at)]  # class 0 is not a letter
        for origin, character in reversed(history):
            gained.append(character.gather(1, at))
            at = origin.gather(1, at)
        letters = np.array([0, *self.alphabet], np.uint8)  # byte of each class
        spelled = letters[torch.stack(gained[::-1], -1).cpu()]
        ctc = (torch.logaddexp(beams.blank, beams.label) + constant[:, None]).tolist()
        prior = beams.prior.tolist()
        proposals = []
        for i in range(len(ctc)):
            texts: dict[str, Proposal] = {}
            for j, score in enumerate(ctc[i]):
                if score < IMPOSSIBLE / 2:
                    continue
                text = bytes(spelled[i, j]).replace(b"\0", b"").decode(errors="ignore").strip()
                if text in texts:  # the same text with or without a final space
                    score = float(np.logaddexp(texts[text].ctc, score))
                texts[text] = Proposal(text, score, prior[i][j])
            proposals.append(sorted(texts.values(), key=lambda proposal: -proposal.score))
        return proposals


def silent_frames(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Find the frames without speech: almost surely blank, or with hardly a letter around them.

    Pass the posteriors from before the temperature: once it has flattened them, a long silence
    looks like letters.

    Args:
        log_probs: (b, t, c), as the character head gives them.
        lengths: (b,) in frames.

    Returns:
        A mask (b, t), True beyond the clips.
    """
    blank = log_probs[..., 0].exp()
    inside = torch.arange(blank.shape[1], device=blank.device) < lengths[:, None]
    letters = ((1 - blank) * (blank < 0.5) * inside)[:, None]  # expected number in each frame
    around = F.avg_pool1d(letters, 2 * NEAR + 1, stride=1, padding=NEAR)[:, 0] * (2 * NEAR + 1)
    return (blank > SURE_BLANK) | (around < LEAST_LETTERS) | ~inside


def squeeze(log_probs: Tensor, lengths: Tensor, silent: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the silent frames, except the first of each run.

    Args:
        log_probs: (b, t, c).
        lengths: (b,) in frames.
        silent: (b, t), see `silent_frames`.

    Returns:
        Frames (b, t', c), which can only be blank beyond a clip's own, and the log-probability (b,)
        of a blank in all dropped frames.
    """
    inside = torch.arange(silent.shape[1], device=silent.device) < lengths[:, None]
    keep = inside & ~(silent & F.pad(silent, (1, 0))[:, :-1])
    width = int(keep.sum(1).max())
    order = (~keep).long().argsort(dim=1, stable=True)[:, :width]
    frames = log_probs.gather(1, order[..., None].expand(-1, -1, log_probs.shape[2]))
    beyond = ~keep.gather(1, order)
    frames = frames.masked_fill(beyond[..., None], IMPOSSIBLE)
    frames[..., 0] = frames[..., 0].masked_fill(beyond, 0.0)
    return frames, (log_probs[..., 0] * (inside & ~keep)).sum(1)
