"""Word n-gram of the training transcripts, for the CTC search.

Its tables are tensors, so the search looks up a whole batch of hypotheses at once. It is saved as a
plain ARPA file beside the weights, and an n-gram from any toolkit can replace it.
"""

import gzip
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
LOG10 = math.log(10.0)
PREFERRED = math.log(0.02)  # minimum for preferred words: about the 5th most common word's
PAIRED = 0.7  # share of the words that follow a word in other text; the rest is for any word
# Only the most frequent entries are kept.
MAX_WORDS, MAX_NGRAMS = 200_000, 2_000_000


@dataclass
class Table:
    """Entries of a backoff n-gram (Katz 1987) over word ids, with natural logarithms.

    Attributes:
        number: number of each context, a tuple of word ids; the empty context is 0.
        backoff: log backoff weight of each context.
        arcs: (number of a context, word) -> log-probability.
    """

    number: dict[tuple[int, ...], int] = field(default_factory=lambda: {(): 0})
    backoff: list[float] = field(default_factory=lambda: [0.0])
    arcs: dict[tuple[int, int], float] = field(default_factory=dict)

    def add(self, context: tuple[int, ...], backoff: float, after: dict[int, float]) -> None:
        """Add a context, its backoff weight, and the words that follow it."""
        self.number[context] = len(self.backoff)
        self.arcs.update({(len(self.backoff), word): value for word, value in after.items()})
        self.backoff.append(backoff)

    def log_prob(self, context: tuple[int, ...], word: int) -> float:
        """Return the log-probability of a word after a context."""
        at = self.number.get(context)
        if at is None:
            return self.log_prob(context[1:], word)
        if (at, word) in self.arcs:
            return self.arcs[at, word]
        return self.backoff[at] + self.log_prob(context[1:], word)

    def longest(self, words: tuple[int, ...]) -> int:
        """Return the number of the longest context that `words` end with."""
        while words not in self.number:
            words = words[1:]
        return self.number[words]


class NGram:
    """A backoff n-gram over words with batched lookups.

    Args:
        words: the vocabulary, including `<s>`, `</s>` and `<unk>`; a word's id is its index.
        table: must have an arc from the empty context for every word except `<s>`.
    """

    def __init__(self, words: Sequence[str], table: Table) -> None:
        self.words, self.table = list(words), table
        self.id_of = {word: i for i, word in enumerate(self.words)}
        self.end, self.unknown = self.id_of[END], self.id_of[UNKNOWN]
        self.start = table.longest((self.id_of[START],))
        contexts = list(table.number)
        self.order = 1 + max(map(len, contexts))
        self.backoff = torch.tensor(table.backoff)
        self.shorter = torch.tensor([table.longest(context[1:]) for context in contexts])
        arcs = sorted(table.arcs)
        self.keys = torch.tensor([at * len(self.words) + word for at, word in arcs])
        self.log_probs = torch.tensor([table.arcs[arc] for arc in arcs])
        self.next = torch.tensor([table.longest((*contexts[at], word)) for at, word in arcs])

    def preferring(self, words: Iterable[str]) -> "NGram":
        """Copy the n-gram and make each of `words` at least as likely as a common word.

        Words that the vocabulary lacks are added. The probabilities no longer sum to 1.
        """
        vocabulary = list(self.words)
        vocabulary += [word for word in dict.fromkeys(words) if word not in self.id_of]
        id_of = {word: i for i, word in enumerate(vocabulary)}
        arcs = dict(self.table.arcs)
        for word in words:
            arcs[0, id_of[word]] = max(arcs.get((0, id_of[word]), PREFERRED), PREFERRED)
        return NGram(vocabulary, Table(self.table.number, self.table.backoff, arcs))

    def to(self, device: Any) -> "NGram":
        """Move the tables to a device in place."""
        for name in ("backoff", "shorter", "keys", "log_probs", "next"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def score(self, context: Tensor, word: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts and word ids (of one shape) -> log-probabilities and the next contexts.

        Every word of the vocabulary has an arc from the empty context, so backoff ends there.
        """
        weight = torch.zeros_like(context, dtype=self.log_probs.dtype)
        for _ in range(self.order):
            key = context * len(self.words) + word
            at = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
            missing = self.keys[at] != key
            weight = weight + torch.where(missing, self.backoff[context], 0.0)
            context = torch.where(missing, self.shorter[context], context)
        return weight + self.log_probs[at], self.next[at]


def count_ngrams(sentences: Iterable[Sequence[str]], order: int) -> list[Counter]:
    """Count the n-grams of orders 1 to `order`, including sentence starts and ends.

    If an order has more than twice `MAX_NGRAMS`, the rare ones are dropped (lossy counting, Manku
    and Motwani 2002). This way 25,000 hours of transcripts fit into memory.
    """
    counts: list[Counter] = [Counter() for _ in range(order)]
    for sentence in sentences:
        padded = (START, *sentence, END)
        for n, counter in enumerate(counts, 1):
            counter.update(zip(*(padded[i:] for i in range(n)), strict=False))
            if len(counter) > 2 * MAX_NGRAMS:
                counts[n - 1] = Counter(dict(counter.most_common(MAX_NGRAMS)))
    return counts


def build_ngram(
    sentences: Iterable[Sequence[str]],
    counts_elsewhere: Mapping[str, float] | None = None,
    order: int = 2,
    discount: float = 0.9,
) -> NGram:
    """Estimate an n-gram with interpolated absolute discounting (Ney, Essen and Kneser 1994).

    Args:
        sentences: transcripts, split into words.
        counts_elsewhere: counts of words ("rare") and of pairs of words ("very rare") in other
            text. What the discount takes from the transcripts is shared in proportion to them. A
            word without a count gets the smallest one; a pair without a count gets its share by the
            count of its second word.
        order: length of the longest n-gram, in words.
        discount: subtracted from every count and shared among all words.
    """
    counts = count_ngrams(sentences, order)
    seen = {word for (word,), _ in counts[0].most_common(MAX_WORDS)} - {START}
    words, elsewhere = _shares_elsewhere(seen, counts_elsewhere or {})
    id_of = {word: i for i, word in enumerate(words)}
    table = Table()
    for n in range(1, order + 1):
        following: dict[tuple[str, ...], dict[str, int]] = {}
        for ngram, count in counts[n - 1].most_common(MAX_NGRAMS):
            if id_of.keys() >= {*ngram} and ngram[-1] != START:
                following.setdefault(ngram[:-1], {})[ngram[-1]] = count
        histories = following.keys() | {history for history in elsewhere if len(history) == n - 1}
        for history in sorted(histories):
            after, share = following.get(history, {}), elsewhere.get(history, {})
            # Lossy counting may have forgotten the history itself.
            total = max(counts[n - 2][history] if history else 0, sum(after.values()))
            kept = {word: (count - discount) / total for word, count in after.items()}
            left = 1 - sum(kept.values())
            backoff = left * (1 - sum(share.values()))
            context, found = tuple(id_of[word] for word in history), {}
            for word in sorted(kept.keys() | share.keys()):
                p = kept.get(word, 0.0) + left * share.get(word, 0.0)
                if history:
                    p += backoff * math.exp(table.log_prob(context[1:], id_of[word]))
                found[id_of[word]] = math.log(p)
            if history:
                table.add(context, math.log(backoff), found)
            else:
                table.arcs.update({(0, word): value for word, value in found.items()})
    return NGram(words, table)


def _shares_elsewhere(
    seen: set[str], counts: Mapping[str, float]
) -> tuple[list[str], dict[tuple[str, ...], dict[str, float]]]:
    """Return the vocabulary, and for each history the shares of the words after it in other text.

    The shares of all words, after the empty history, sum to 1, those after a word to `PAIRED` at
    most, so that any other word can follow.
    """
    unigrams = {word: count for word, count in counts.items() if " " not in word}
    words = sorted(seen | unigrams.keys() | {END, UNKNOWN})
    least = min(unigrams.values(), default=1.0)
    share = {word: unigrams.get(word, least) for word in words}
    share[END] = share[UNKNOWN] = sum(share.values()) / len(share)
    total = sum(share.values())
    shares: dict[tuple[str, ...], dict[str, float]] = {
        (): {word: count / total for word, count in share.items()}
    }
    for pair, count in counts.items():
        first, _, second = pair.partition(" ")
        if first in share and second in share:
            shares.setdefault((first,), {})[second] = count
    for history, after in shares.items():
        if history:
            total = max(share[history[0]], sum(after.values()))
            after.update({word: PAIRED * count / total for word, count in after.items()})
    return [*words, START], shares


def save_arpa(ngram: NGram, path: Path) -> None:
    """Write an n-gram as a gzipped ARPA file."""
    table, words = ngram.table, ngram.words
    contexts = list(table.number)
    by_order: list[list[str]] = [[] for _ in range(ngram.order)]
    for (at, word), value in table.arcs.items():
        ids = (*contexts[at], word)
        weight = table.backoff[table.number[ids]] if ids in table.number else None
        by_order[len(ids) - 1].append(_arpa_line(value, [words[i] for i in ids], weight))
    start = ngram.id_of[START]
    weight = table.backoff[table.number[start,]] if (start,) in table.number else None
    by_order[0].append(_arpa_line(-99 * LOG10, [START], weight))
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as file:
        counts = (f"ngram {n}={len(rows)}" for n, rows in enumerate(by_order, 1))
        file.write("\n".join(["\\data\\", *counts]) + "\n")
        for n, rows in enumerate(by_order, 1):
            file.write("\n".join([f"\n\\{n}-grams:", *rows]) + "\n")
        file.write("\n\\end\\\n")


def _arpa_line(log_prob: float, words: Sequence[str], backoff: float | None) -> str:
    columns = [f"{log_prob / LOG10:.6g}", " ".join(words)]
    return "\t".join(columns + ([] if backoff is None else [f"{backoff / LOG10:.6g}"]))


def load_arpa(path: Path) -> NGram:
    """Read an n-gram from an ARPA file, gzipped or not.

    Raises:
        ValueError: if a line cannot be read, or a special word is missing.
    """
    words: list[str] = []
    id_of: dict[str, int] = {}
    table, order = Table(), 0
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.strip("\n")
            if line.startswith("\\"):
                order = int(line[1 : line.index("-")]) if line.endswith("-grams:") else 0
            elif line and order:
                columns = line.split("\t")
                text = columns[1].split(" ") if len(columns) > 1 else []
                if len(text) != order:
                    raise ValueError(f"{path}, line {number}: not a {order}-gram: {line[:60]!r}")
                if order == 1:
                    id_of[text[0]] = len(words)
                    words += text
                ids = tuple(id_of[word] for word in text)
                if text != [START]:
                    if ids[:-1] not in table.number:  # no backoff column means a weight of one
                        table.add(ids[:-1], 0.0, {})
                    at = table.number[ids[:-1]]
                    table.arcs[at, ids[-1]] = float(columns[0]) * LOG10
                if len(columns) > 2:
                    table.add(ids, float(columns[2]) * LOG10, {})
    if missing := {START, END, UNKNOWN} - id_of.keys():
        raise ValueError(f"{path} is not a complete ARPA file: it lacks {sorted(missing)}")
    return NGram(words, table)
