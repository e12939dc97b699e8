"""Word bigram of the training transcripts, for the CTC search.

Its tables are tensors, so the search looks up a whole batch of hypotheses at once. It is saved as a
plain ARPA file beside the weights, and a bigram from any toolkit can replace it.
"""

import gzip
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
LOG10 = math.log(10.0)
NEVER = -99 * LOG10  # how ARPA files write the log-probability of the start of a sentence
PREFERRED = math.log(0.02)  # minimum for preferred words: about the 5th most common word's
PAIRED = 0.7  # of the probability goes to words that follow a word in other text, at most
# Of the transcripts, only the most frequent entries are kept.
MAX_WORDS, MAX_PAIRS = 200_000, 2_000_000


class NGram:
    """A backoff bigram (Katz 1987) over words with batched lookups; all values are natural logs.

    Args:
        words: the vocabulary, including `<s>`, `</s>` and `<unk>`; a word's id is its index.
        unigrams: log-probability of each word.
        bigrams: (word, next word) -> log-probability of the next word.
        backoffs: word -> log weight of the unigrams after it; a word that is missing has 0.
    """

    def __init__(
        self,
        words: Sequence[str],
        unigrams: Sequence[float],
        bigrams: Mapping[tuple[int, int], float],
        backoffs: Mapping[int, float],
    ) -> None:
        self.words, self.unigrams = list(words), list(unigrams)
        self.bigrams, self.backoffs = bigrams, backoffs
        self.id_of = {word: i for i, word in enumerate(self.words)}
        self.start, self.end, self.unknown = (self.id_of[w] for w in (START, END, UNKNOWN))
        pairs = sorted(bigrams)
        # The first key matches no pair, so that the table is never empty.
        self.keys = torch.tensor([-1, *(a * len(self.words) + b for a, b in pairs)])
        self.pair = torch.tensor([0.0, *(bigrams[pair] for pair in pairs)])
        self.word = torch.tensor(self.unigrams)
        self.backoff = torch.tensor([backoffs.get(i, 0.0) for i in range(len(self.words))])

    def preferring(self, words: Iterable[str]) -> "NGram":
        """Copy the n-gram and make each of `words` at least as likely as a common word.

        Words that the vocabulary lacks are added. The probabilities no longer sum to 1.
        """
        log_probs = dict(zip(self.words, self.unigrams, strict=True))
        for word in words:
            log_probs[word] = max(log_probs.get(word, PREFERRED), PREFERRED)
        return NGram([*log_probs], [*log_probs.values()], self.bigrams, self.backoffs)

    def to(self, device: Any) -> "NGram":
        """Move the tables to a device in place."""
        for name in ("keys", "pair", "word", "backoff"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def log_prob(self, previous: int, word: int) -> float:
        """Return the log-probability of a word after another one."""
        if (previous, word) in self.bigrams:
            return self.bigrams[previous, word]
        return self.backoffs.get(previous, 0.0) + self.unigrams[word]

    def score(self, previous: Tensor, word: Tensor) -> Tensor:
        """Word ids and ids of the words before them (of one shape) -> log-probabilities."""
        key = previous * len(self.words) + word
        at = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        backed_off = self.backoff[previous] + self.word[word]
        return torch.where(self.keys[at] == key, self.pair[at], backed_off)


def count_words(sentences: Iterable[Sequence[str]]) -> tuple[Counter[str], Counter[tuple]]:
    """Count words and pairs of adjacent words, including sentence starts and ends.

    Above 2 x `MAX_PAIRS` pairs, only the `MAX_PAIRS` most frequent are kept (lossy counting, Manku
    and Motwani 2002), so that 25,000 hours of transcripts fit into memory.
    """
    words: Counter[str] = Counter()
    pairs: Counter[tuple] = Counter()
    for sentence in sentences:
        padded = (START, *sentence, END)
        words.update(padded)
        pairs.update(pairwise(padded))
        if len(pairs) > 2 * MAX_PAIRS:
            pairs = Counter(dict(pairs.most_common(MAX_PAIRS)))
    return words, pairs


def build_ngram(
    sentences: Iterable[Sequence[str]],
    counts_elsewhere: Mapping[str, float] | None = None,
    discount: float = 0.9,
) -> NGram:
    """Estimate a bigram with interpolated absolute discounting (Ney, Essen and Kneser 1994).

    Args:
        sentences: transcripts, split into words.
        counts_elsewhere: counts of words ("rare") and of pairs of words ("very rare") in other
            text. What the discount takes from the transcripts is shared in proportion to them. A
            word without a count gets the smallest one; a pair without a count gets its share by the
            count of its second word.
        discount: subtracted from every count and shared among all words.
    """
    counts, pairs = count_words(sentences)
    seen = {word for word, _ in counts.most_common(MAX_WORDS)} - {START}
    words, shares, paired = _shares_elsewhere(seen, counts_elsewhere or {})
    own = {word: counts[word] for word in sorted(seen)}
    unigrams, _ = _discounted(own, sum(own.values()), discount, shares)

    id_of = {word: i for i, word in enumerate(words)}
    following: dict[str, dict[str, int]] = {}
    for (first, second), count in pairs.most_common(MAX_PAIRS):
        if first in id_of and second in id_of:
            following.setdefault(first, {})[second] = count
    bigrams, backoffs = dict[tuple[int, int], float](), dict[int, float]()
    for first in sorted(following.keys() | paired.keys()):
        share = paired.get(first, {})
        found, left = _discounted(following.get(first, {}), counts[first], discount, share)
        backoff = left * (1 - sum(share.values()))
        backoffs[id_of[first]] = math.log(backoff)
        for word, p in found.items():
            bigrams[id_of[first], id_of[word]] = math.log(p + backoff * unigrams[word])
    logs = [math.log(unigrams[word]) if word != START else NEVER for word in words]
    return NGram(words, logs, bigrams, backoffs)


def _discounted(
    counts: Mapping[str, int], total: int, discount: float, shares: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """Return the probability of each word, and the probability that the discount has freed.

    `shares` hands the freed part out; if the shares sum to less than 1, some of it is left over.
    """
    kept = {word: (count - discount) / total for word, count in counts.items()}
    left = 1 - sum(kept.values())
    words = sorted(kept.keys() | shares.keys())
    return {word: kept.get(word, 0.0) + left * shares.get(word, 0.0) for word in words}, left


def _shares_elsewhere(
    seen: set[str], counts: Mapping[str, float]
) -> tuple[list[str], dict[str, float], dict[str, dict[str, float]]]:
    """Return the vocabulary, each word's share of other text, and the shares of its followers.

    The words' shares sum to 1. Those of the followers of a word sum to `PAIRED` at most, which
    leaves some probability for every other word.
    """
    unigrams = {word: count for word, count in counts.items() if " " not in word}
    words = sorted(seen | unigrams.keys() | {END, UNKNOWN})
    least = min(unigrams.values(), default=1.0)
    share = {word: unigrams.get(word, least) for word in words}
    share[END] = share[UNKNOWN] = sum(share.values()) / len(share)
    paired: dict[str, dict[str, float]] = {}
    for pair, count in counts.items():
        first, _, second = pair.partition(" ")
        if first in share and second in share:
            paired.setdefault(first, {})[second] = count
    for first, after in paired.items():
        total = max(share[first], sum(after.values()))
        after.update({word: PAIRED * count / total for word, count in after.items()})
    total = sum(share.values())
    return [*words, START], {word: count / total for word, count in share.items()}, paired


def save_arpa(ngram: NGram, path: Path) -> None:
    """Write an n-gram as a gzipped ARPA file."""
    words = ngram.words
    unigrams = [
        _arpa_line(value, word, ngram.backoffs.get(i))
        for i, (word, value) in enumerate(zip(words, ngram.unigrams, strict=True))
    ]
    bigrams = [
        _arpa_line(value, f"{words[first]} {words[second]}")
        for (first, second), value in ngram.bigrams.items()
    ]
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as file:
        file.write(f"\\data\\\nngram 1={len(unigrams)}\nngram 2={len(bigrams)}\n")
        for n, rows in ((1, unigrams), (2, bigrams)):
            file.write("\n".join([f"\n\\{n}-grams:", *rows]) + "\n")
        file.write("\n\\end\\\n")


def _arpa_line(log_prob: float, text: str, backoff: float | None = None) -> str:
    columns = [f"{log_prob / LOG10:.6g}", text]
    return "\t".join(columns + ([] if backoff is None else [f"{backoff / LOG10:.6g}"]))


def load_arpa(path: Path) -> NGram:
    """Read an n-gram of order 1 or 2 from an ARPA file, gzipped or not.

    Raises:
        ValueError: if the order is higher, a line cannot be read, or a special word is missing.
    """
    id_of: dict[str, int] = {}
    unigrams: list[float] = []
    bigrams, backoffs = dict[tuple[int, int], float](), dict[int, float]()
    order = 0
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.strip("\n")
            if line.startswith("\\"):
                order = int(line[1 : line.index("-")]) if line.endswith("-grams:") else 0
                if order > 2:
                    raise ValueError(f"{path} holds {order}-grams; only 1- and 2-grams are read")
            elif line and order:
                columns = line.split("\t")
                text = columns[1].split(" ") if len(columns) > 1 else []
                if len(text) != order:
                    raise ValueError(f"{path}, line {number}: not a {order}-gram: {line[:60]!r}")
                value = float(columns[0]) * LOG10
                if order == 2:
                    bigrams[id_of[text[0]], id_of[text[1]]] = value
                    continue
                if len(columns) > 2:
                    backoffs[len(id_of)] = float(columns[2]) * LOG10
                id_of[text[0]] = len(id_of)
                unigrams.append(value)
    if missing := {START, END, UNKNOWN} - id_of.keys():
        raise ValueError(f"{path} is not a complete ARPA file: it lacks {sorted(missing)}")
    return NGram(list(id_of), unigrams, bigrams, backoffs)
