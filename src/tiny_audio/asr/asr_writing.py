"""Write a text as the training transcripts are written: with their capitals and punctuation.

The search finds words as they are spoken: in lower case, without marks. `Writing` knows the forms
in which the transcripts write each word (`london` -> `London`, `i'm` -> `I'm`) and which style
follows which: a capital after a full stop, for example. It writes the most probable sequence.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Self

# The case of a form, by what it does to the spoken word.
CASES: dict[str, Callable[[str], str]] = {"aa": str, "Aa": str.capitalize, "AA": str.upper}
OTHER = "??"  # a case of its own, like that of "iPhone"
START, END = "<s>", "</s>"  # styles before and after a text
MAX_WORDS = 200_000  # the most frequent ones are kept
USUAL_STYLES = 10  # tried for every word, even if the transcripts never write it so
UNSEEN = 1.0  # pseudo-count of the styles of all words, beside those of a word itself


def style_of(form: str, word: str) -> str:
    """The style of a form: its case and the marks around it, such as "Aa." for "London."."""
    at = form.lower().find(word)  # `\w` lacks vowel signs, and the word may end in an apostrophe
    core = form[at : at + len(word)] if at >= 0 else re.sub(r"^\W+|\W+$", "", form)
    case = next((name for name, change in CASES.items() if change(word) == core), OTHER)
    return form.replace(core, case, 1)


def in_style(style: str, word: str) -> str:
    """Write a spoken word in a style such as "Aa."; its case must be one of `CASES`."""
    case = next(name for name in CASES if name in style)
    return style.replace(case, CASES[case](word))


class Writing:
    """How transcripts write their words.

    Args:
        forms: for each spoken word, how often it is written in which form.
        following: for each style, how often it is followed by which style.
    """

    def __init__(self, forms: dict[str, Counter[str]], following: dict[str, Counter[str]]) -> None:
        self.forms, self.following = forms, following
        self.styles: Counter[str] = sum(following.values(), Counter())
        self.total = self.styles.total()
        known = [style for style, _ in self.styles.most_common() if style != END]
        self.usual = [style for style in known if OTHER not in style][:USUAL_STYLES]

    @classmethod
    def learn(
        cls, texts: Iterable[str], spoken: Callable[[str], str], known: Self | None = None
    ) -> Self | None:
        """Count the forms and styles of transcripts, and add those of a `known` writing.

        Args:
            texts: the transcripts.
            spoken: turns a written text into what the search finds.
            known: how earlier transcripts were written.

        Returns:
            None if every word is written as it is spoken.
        """
        forms = defaultdict(Counter[str], deepcopy(known.forms) if known else {})
        following = defaultdict(Counter[str], deepcopy(known.following) if known else {})
        for text in texts:
            before = START
            for form in text.split():
                word = spoken(form)
                if not word or " " in word:  # a mark by itself, or one form of several words
                    continue
                forms[word][form] += 1
                style = style_of(form, word)
                following[before][style] += 1
                before = style
            following[before][END] += 1
        if all(word == form for word, counts in forms.items() for form in counts):
            return None
        frequent = sorted(forms, key=lambda word: -forms[word].total())[:MAX_WORDS]
        return cls({word: forms[word] for word in frequent}, dict(following))

    def write(self, text: str) -> str:
        """Write a spoken text in its most probable form (Viterbi over the styles of its words).

        P(form | word, previous style) is taken to be proportional to
        P(form | word) P(style | previous style) / P(style).
        """
        best: dict[str, tuple[float, list[str]]] = {START: (0.0, [])}
        for word in text.split():
            reached: dict[str, tuple[float, list[str]]] = {}
            for form, own in self.choices(word):
                style = style_of(form, word)
                score, before = max(
                    (so_far + self.after(last, style), last) for last, (so_far, _) in best.items()
                )
                if style not in reached or score + own > reached[style][0]:
                    reached[style] = score + own, [*best[before][1], form]
            best = reached
        last = max(best, key=lambda style: best[style][0] + self.after(style, END))
        return " ".join(best[last][1])

    def choices(self, word: str) -> list[tuple[str, float]]:
        """The forms of a word, each with log P(form | word) / P(style)."""
        counts = self.forms.get(word, Counter())
        total = counts.total() + UNSEEN
        out = []
        for form in dict.fromkeys([*counts, *(in_style(style, word) for style in self.usual)]):
            share = self.share(style_of(form, word))
            out.append((form, math.log((counts[form] + UNSEEN * share) / total / share)))
        return out

    def share(self, style: str) -> float:
        """The share of a style among all words and ends of texts; never zero."""
        return (self.styles[style] + 0.01) / (self.total + 1.0)

    def after(self, before: str, style: str) -> float:
        """log P(style | previous style)."""
        counts = self.following.get(before, Counter())
        return math.log((counts[style] + UNSEEN * self.share(style)) / (counts.total() + UNSEEN))

    def save(self, path: Path) -> None:
        """Write all counts as JSON."""
        path.write_text(json.dumps([self.forms, self.following]) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        tables = json.loads(path.read_text(encoding="utf-8"))
        forms, following = ({k: Counter(v) for k, v in table.items()} for table in tables)
        return cls(forms, following)
