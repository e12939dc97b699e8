"""The classes of the CTC heads and the vocabulary of the search."""

import math
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from unicodedata import name

from ..asr.asr_config import ASRConfig
from ..asr.asr_ngram import NEVER, START, NGram, build_ngram
from ..asr.asr_processing import ASRProcessor
from ..asr.asr_search import SPACE
from .checks import spelled
from .manifests import DataError, Example

MAX_MEAN_WORD = 15.0  # letters; a longer mean indicates a script without spaces between words
# Beginnings of the Unicode names of letters that are written without spaces between words.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
MIN_EXTRA_WORD = 3  # letters of a word that occurs in no transcript


def ctc_vocabulary(examples: Iterable[Example]) -> tuple[list[int], list[int]]:
    """The token ids and the lower-case bytes that occur in the training transcripts.

    The bytes exclude punctuation and symbols, except the apostrophe.
    """
    examples = list(examples)
    tokens = {token for example in examples for token in example.target}
    letters = {byte for example in examples for byte in spelled(example.text)}
    return sorted(tokens), sorted(letters | {SPACE})


def extend_vocabulary(
    previous: ASRConfig, examples: list[Example], resume: str | None
) -> tuple[list[int], list[int]]:
    """Append the transcripts' new tokens and bytes to the classes of a trained model's heads.

    A run that resumes from the checkpoint `resume` keeps its classes unchanged.

    Raises:
        ValueError: if a resumed run would need new letters.
    """
    tokens, alphabet = ctc_vocabulary(examples)
    tokens = grow(previous.ctc_token_ids, tokens)
    alphabet = grow(previous.ctc_alphabet, alphabet)
    letters = new_letters({*alphabet} - {*previous.ctc_alphabet}, examples)
    if not resume:
        if letters:
            print(f"new letters, which the model will learn: {letters}")
        return tokens, alphabet
    if letters:
        raise ValueError(
            f"the transcripts have letters that {resume} does not know: {letters}; restore them, "
            "or start over with run.fresh=true"
        )
    if others := len(tokens) - len(previous.ctc_token_ids):
        print(f"{others} tokens that {resume} does not know; its token head ignores them")
    return previous.ctc_token_ids, alphabet


def grow(known: list[int], found: list[int]) -> list[int]:
    """Append the new ones of `found` to a head's classes; empty if the head does not exist."""
    return [*known, *sorted({*found} - {*known})] if known else []


def new_letters(new_bytes: set[int], examples: Iterable[Example]) -> str:
    """List the letters of the transcripts that need one of `new_bytes`, with their counts."""
    letters = Counter(letter for example in examples for letter in example.text.lower())
    counts = [f"{x} ({n}x)" for x, n in letters.most_common() if new_bytes & {*x.encode()}]
    return ", ".join(counts)


def transcript_ngram(
    processor: ASRProcessor, examples: Iterable[Example], words: Path | None = None
) -> NGram | None:
    """Build the n-gram of the training transcripts, in the spelling of the character head.

    Its vocabulary also contains the words of the file `words` (see `read_counts`). Without a file,
    it contains the decoder's whole words: tokens of letters that begin with a space. Returns None
    for a script without spaces between words.
    """
    sentences = [processor.spoken(example.text).split() for example in examples]
    lengths = [len(word) for sentence in sentences for word in sentence]
    if not lengths or sum(lengths) > MAX_MEAN_WORD * len(lengths):
        return None
    letters = Counter(chain.from_iterable(chain.from_iterable(sentences)))
    unspaced = [letter for letter in letters if name(letter, "").startswith(UNSPACED)]
    if sum(letters[letter] for letter in unspaced) > letters.total() / 2:
        return None
    if words is None:
        tokens = [[token] for token in processor.tokenizer.get_vocab() if token[0] in "Ġ▁"]
        whole = (processor.tokenizer.convert_tokens_to_string(token).strip() for token in tokens)
        counts = {word: 1.0 for word in whole if word.isalpha()}
    else:
        counts = read_counts(words)
    known = {*processor.alphabet}
    extra = {
        text: count
        for text, count in counts.items()
        if len(text) >= MIN_EXTRA_WORD and {*text.encode()} <= known
    }
    return build_ngram(sentences, extra)


def read_counts(path: Path) -> dict[str, float]:
    """Read counts from a file of lines "word<TAB>count" and "word word<TAB>count".

    Raises:
        DataError: if the file does not exist or a line is malformed; names the line.
    """
    if not path.is_file():
        raise DataError(f"data.words={path}: no such file")
    counts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        word, _, count = line.partition("\t")
        if not word or not count.strip().isdigit() or int(count) < 1:
            raise DataError(f"{path}, line {number} is not word<TAB>count: {line[:60]!r}")
        counts[word.lower()] = counts.get(word.lower(), 0.0) + float(count)
    return counts


def blend(known: NGram, new: NGram, share: float = 0.5) -> NGram:
    """Mix two n-grams: p = (1 - `share`) p(known) + `share` p(new).

    Linear interpolation (Jelinek and Mercer 1980), written as one backoff n-gram. Words of either
    are in the result.
    """
    words = [*known.words, *(word for word in new.words if word not in known.id_of)]
    id_of = {word: i for i, word in enumerate(words)}
    sources = ((1 - share, known), (share, new))

    def mixed(word: str, previous: str | None = None) -> float:
        total = 0.0
        for weight, ngram in sources:
            if word not in ngram.id_of:
                continue
            at = ngram.id_of[word]
            if previous is None:
                log_prob = ngram.unigrams[at]
            else:
                log_prob = ngram.log_prob(ngram.id_of.get(previous, ngram.unknown), at)
            total += weight * math.exp(log_prob)
        return total

    unigrams = [NEVER if word == START else math.log(mixed(word)) for word in words]
    followers: dict[str, set[str]] = {}
    for _, ngram in sources:
        for first, second in ngram.bigrams:
            followers.setdefault(ngram.words[first], set()).add(ngram.words[second])
    bigrams, backoffs = dict[tuple[int, int], float](), dict[int, float]()
    for first, after in followers.items():
        found = {id_of[word]: mixed(word, first) for word in sorted(after)}
        lower = sum(math.exp(unigrams[word]) for word in found)
        left = (1 - sum(found.values())) / (1 - lower)
        backoffs[id_of[first]] = math.log(max(left, 1e-10))
        bigrams |= {(id_of[first], word): math.log(p) for word, p in found.items()}
    return NGram(words, unigrams, bigrams, backoffs)
