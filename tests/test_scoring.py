"""Word error rates against an independent implementation, and the interval against the truth."""

import numpy as np
import pytest

from tiny_audio.commands.speech import read_manifest
from tiny_audio.evaluation import scoring

NINE = "cat dog hen cow pig fox owl ram bee"


def distance(r, h):
    """Levenshtein distance of two sequences, by the textbook."""
    row = list(range(len(h) + 1))
    for i, word in enumerate(r, 1):
        before, row = row, [i]
        for j, other in enumerate(h, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (word != other)))
    return row[-1]


def spoil(rng, words):
    """Words with some of them dropped, swapped for another or doubled."""
    out = []
    for word in words:
        kind = rng.choice(["keep", "keep", "keep", "drop", "swap", "double"])
        out += {"keep": [word], "drop": [], "swap": [str(rng.choice(words))]}.get(kind, [word] * 2)
    return " ".join(out)


def check(reference, hypothesis):
    errors, words = scoring.count(reference, hypothesis)
    assert errors == distance(reference.split(), hypothesis.split()), (reference, hypothesis)
    assert words == len(reference.split())


def test_counts_are_the_edit_distance():
    rng = np.random.default_rng(0)
    letters = list("abcd")
    pairs = []
    for _ in range(500):
        sizes = rng.integers(0, 9, 2)  # zero words too
        pairs.append(tuple(" ".join(rng.choice(letters, n)) for n in sizes))
        check(*pairs[-1])
    found = scoring.score(*zip(*pairs, strict=True))
    errors = [found[kind] for kind in ("substitutions", "deletions", "insertions")]
    hits = found["words"] - found["substitutions"] - found["deletions"]
    heard = sum(len(hypothesis.split()) for _, hypothesis in pairs)
    assert hits + found["substitutions"] + found["insertions"] == heard
    assert min(*errors, hits) >= 0
    assert sum(errors) == sum(scoring.count(*pair)[0] for pair in pairs)


def test_counts_are_the_edit_distance_on_real_transcripts(real_bases):
    rng = np.random.default_rng(1)
    texts = [row["text"] for row in read_manifest(real_bases.train)]
    for text in texts:
        check(text, spoil(rng, text.split()))
        check(text, str(rng.choice(texts)))
        check(text, "")
        check("", text)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a b c", "a b c", (0, 0, 0, 3)),
        ("a b c", "a x c", (1, 0, 0, 3)),
        ("a b c", "a c", (0, 1, 0, 3)),
        ("a b c", "a b b c", (0, 0, 1, 3)),
        ("a b", "", (0, 2, 0, 2)),
        ("", "a b", (0, 0, 2, 0)),  # a hallucination on silence
        ("", "", (0, 0, 0, 0)),
        ("   ", " a ", (0, 0, 1, 0)),
    ],
)
def test_error_types(reference, hypothesis, expected):
    assert scoring.count(reference, hypothesis) == (sum(expected[:3]), expected[3])
    # The right utterance beside it must not hide or change the errors of this one.
    found = scoring.score([reference, NINE], [hypothesis, NINE])
    kinds = [found[kind] for kind in ("substitutions", "deletions", "insertions", "words")]
    assert kinds == [*expected[:3], expected[3] + len(NINE.split())]


def test_score_normalises_and_keeps_the_raw_rate():
    out = scoring.score(["Hello, Mr. Smith!", "two"], ["hello mister smith", "2"])
    assert out["wer"] == out["cer"] == 0
    assert out["wer_raw"] == pytest.approx(100)
    assert (out["words"], out["utterances"]) == (4, 2)


def test_score_of_a_corpus_is_weighted_by_words():
    out = scoring.score([NINE, "wolf"], [NINE, "lion"])
    assert out["wer"] == pytest.approx(10)  # the mean over utterances would be 50
    assert out["wer_low"] <= out["wer"] <= out["wer_high"]


def test_a_hallucination_on_an_empty_reference_counts():
    out = scoring.score(["hello there", ""], ["hello there", "thank you for watching"])
    assert out["insertions"] == 4
    assert out["wer"] == pytest.approx(200)


def test_a_corpus_with_empty_texts_by_hand():
    out = scoring.score(
        ["red fox", "", "[noise]", "home", "sea"], ["red box", "thank you so", "", "", "sea"]
    )
    assert (out["substitutions"], out["insertions"], out["deletions"]) == (1, 3, 1)
    assert (out["hallucinated"], out["empty_references"], out["words"]) == (3, 2, 4)
    said = ["red fox", "", "", "home", "sea"]  # as normalised
    heard = ["red box", "thank you so", "", "", "sea"]
    letters = sum(map(distance, said, heard))
    assert out["cer"] == pytest.approx(100 * letters / sum(map(len, said)))


def test_figures_of_a_corpus_are_the_edit_distance(real_bases):
    rng = np.random.default_rng(2)
    said = [row["text"] for row in read_manifest(real_bases.train)] * 2
    heard = [spoil(rng, text.split()) for text in said]
    said += [""] * 5
    heard += ["", "a", "thanks for watching", "", "you"]
    normal = scoring.normalizer()
    refs, hyps = ([" ".join(normal(text).split()) for text in texts] for texts in (said, heard))
    out = scoring.score(said, heard)
    errors = sum(distance(r.split(), h.split()) for r, h in zip(refs, hyps, strict=True))
    words = sum(len(r.split()) for r in refs)
    assert out["utterances"] > 500 and out["words"] == words
    assert out["wer"] == pytest.approx(100 * errors / words)
    letters = sum(map(distance, refs, hyps))
    assert out["cer"] == pytest.approx(100 * letters / sum(map(len, refs)))
    raw = sum(distance(r.split(), h.split()) for r, h in zip(said, heard, strict=True))
    assert out["wer_raw"] == pytest.approx(100 * raw / sum(len(r.split()) for r in said))


@pytest.mark.parametrize(
    ("language", "a", "b", "same"),
    [
        ("en", "colour", "color", True),
        ("de", "Straße, zwei!", "straße zwei", True),
        ("de", "schön", "schon", False),
        ("hi", "\u0915\u093f", "\u0915\u0941", False),  # differ in a vowel sign
    ],
)
def test_normalisers(language, a, b, same):
    assert (scoring.score([a], [b], language)["wer"] == 0) == same


def test_alignment_pairs_words():
    pairs = scoring.align("the cat sat down", "a cat sat right down")
    assert pairs == [("the", "a"), ("cat", "cat"), ("sat", "sat"), ("", "right"), ("down", "down")]
    assert scoring.align("one\n two", "one\ttwo") == [("one", "one"), ("two", "two")]
    assert scoring.align("a b", "") == [("a", ""), ("b", "")]


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no utterance"):
        scoring.score([], [])


def test_lists_of_unequal_length_are_an_error():
    with pytest.raises(ValueError):
        scoring.score(["a", "b"], ["a"])


def test_rates_of_a_single_word_or_letter():
    out = scoring.score(["a"], [""])
    assert out["wer"] == out["wer_raw"] == out["cer"] == out["wer_low"] == out["wer_high"] == 100
    out = scoring.score([""], ["thank you"])  # no word to divide by
    assert out["wer"] == out["wer_raw"] == out["wer_high"] == 200
    assert scoring.interval([3], [10]) == (30.0, 30.0)


def test_interval_and_difference_are_percentiles_of_resamples():
    rng = np.random.default_rng(3)
    words = rng.integers(3, 20, 500)
    errors, others = rng.binomial(words, 0.2), rng.binomial(words, 0.19)

    def middle(wrong, seed):  # without the 50 lowest and the 50 highest of 2,000
        draws = np.random.default_rng(seed)
        picked = [draws.integers(0, 500, 500) for _ in range(2000)]
        rates = sorted(100 * wrong[rows].sum() / words[rows].sum() for rows in picked)
        return pytest.approx([np.mean(rates[49:51]), np.mean(rates[1949:1951])], abs=0.02), rates

    for seed in (0, 5):
        expected, _ = middle(errors, seed)
        assert scoring.interval(errors, words, seed) == expected
        expected, rates = middle(others - errors, seed)
        *ends, p = scoring.difference(errors, others, words, seed)
        assert ends == expected
        above = np.mean([rate > 0 for rate in rates]) + np.mean([rate == 0 for rate in rates]) / 2
        assert p == pytest.approx(2 * min(above, 1 - above))
    assert scoring.interval(errors, words) == scoring.interval(errors, words, 0)
    assert scoring.interval(errors, words) != scoring.interval(errors, words, 5)
    assert scoring.difference(errors, others, words) == scoring.difference(errors, others, words, 0)


def test_the_smallest_p_value_is_one_in_all_resamples():
    assert scoring.difference([5] * 20, [1] * 20, [10] * 20) == (-40, -40, 1 / scoring.RESAMPLES)
    assert scoring.difference([0], [1], [1])[:2] == (100, 100)


def test_interval_repeats_with_its_seed_and_shrinks_with_more_data():
    rng = np.random.default_rng(0)
    words = rng.integers(3, 20, 4000)
    errors = rng.binomial(words, 0.15)
    assert scoring.interval(errors, words) == scoring.interval(errors, words)
    small = np.subtract(*scoring.interval(errors[:100], words[:100])[::-1])
    large = np.subtract(*scoring.interval(errors, words)[::-1])
    assert small / large == pytest.approx(np.sqrt(40), rel=0.3)


@pytest.mark.long
def test_interval_covers_the_true_rate(monkeypatch):
    """1,000 simulated corpora of 200 utterances whose errors come in clusters, as real ones do."""
    monkeypatch.setattr(scoring, "RESAMPLES", 400)
    rng = np.random.default_rng(42)
    size, inside = 200, 0
    true = 100 * 0.12  # mean of the Beta below; independent of the utterance's length
    for i in range(1000):
        words = rng.integers(4, 25, size)
        errors = rng.binomial(words, rng.beta(1.2, 8.8, size))
        low, high = scoring.interval(errors, words, seed=i)
        inside += low <= true <= high
    assert 930 <= inside <= 970
