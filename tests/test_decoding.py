"""The search over the character head, the decoder's choice, the n-gram: against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import TEXTS, babble

from tiny_audio.asr import asr_ngram
from tiny_audio.asr.asr_audio import SAMPLE_RATE
from tiny_audio.asr.asr_config import DECODE, DECODING_DEFAULTS, ASRConfig
from tiny_audio.asr.asr_decoding import (  # fmt: skip
    TextTree,
    read_prompts,
    score_trees,
    spell_terms,
    transcribe,
    write_terms,
)
from tiny_audio.asr.asr_ngram import build_ngram, load_arpa, save_arpa
from tiny_audio.asr.asr_pipeline import ASRPipeline
from tiny_audio.asr.asr_search import Lexicon, PrefixSearch, silent_frames, squeeze
from tiny_audio.commands.transcribe import main as transcribe_command
from tiny_audio.commands.transcribe import read_terms
from tiny_audio.training.manifests import DataError, Example
from tiny_audio.training.vocabulary import blend, read_counts, transcript_ngram

ALPHABET = list(b" ab")
NGRAM = build_ngram([["a", "b"], ["ab", "a"], ["ba"]], {"bb": 3})
LONG_WORDS = build_ngram([["aab", "b"], ["aab"], ["bab", "aab"]])  # "a", "aa", "ba" are no words
WHOLE = {  # nothing is pruned
    **DECODING_DEFAULTS, "beams": 400, "temperature": 1.0, "candidates": 3, "ngram": 0.7,
    "word": 0.3, "open_character": 0.9,
}  # fmt: skip


@pytest.mark.parametrize("texts", [["打开客厅的灯", "关灯"], ["เปิดไฟ", "ปิดไฟ"], ["ライト"]])
def test_short_texts_without_spaces_are_no_words(build, texts):
    """As words of a lexicon, the search would find nothing but whole training texts."""
    processor, _ = build("whisper")
    processor.alphabet = sorted({*"".join(texts).encode(), 32})
    examples = [Example(text, None, text, 1.0) for text in texts]
    assert transcript_ngram(processor, examples) is None
    processor.alphabet = sorted({*b"no yest", 32})
    words = transcript_ngram(processor, [Example("a", None, "yes", 1.0)]).words
    assert "yes" in words


def random_log_probs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)


def score_text(ngram, words):
    """The log-probability of a sentence, including its end."""
    total, before = 0.0, torch.tensor([ngram.start])
    for word in [*words, "</s>"]:
        word_id = torch.tensor([ngram.id_of.get(word, ngram.unknown)])
        log_prob, before = ngram.score(before, word_id), word_id
        total += float(log_prob)
    return total


# -- search --------------------------------------------------------------------------------------


def by_brute_force(log_probs, ngram):
    """Every text with its score, best first, over all paths of log-probs (t, 4)."""
    ctc = {}
    for path in itertools.product(range(4), repeat=len(log_probs)):
        text = "".join(" ab"[c - 1] for c, _ in itertools.groupby(path) if c)
        if text.startswith(" ") or "  " in text:
            continue  # with words, a space ends one
        score = sum(float(log_probs[t, c]) for t, c in enumerate(path))
        ctc[text.strip()] = np.logaddexp(ctc.get(text.strip(), -np.inf), score)
    scores = {}
    for text, score in ctc.items():
        words = text.split() if ngram else []
        scores[text] = score + WHOLE["word"] * len(words)
        if ngram:
            scores[text] += WHOLE["ngram"] * score_text(ngram, words)
        unknown = [word for word in words if word not in ngram.id_of]
        scores[text] -= WHOLE["open_character"] * sum(map(len, unknown))
    return sorted(((score, text) for text, score in scores.items()), reverse=True)


@pytest.mark.parametrize(
    ("ngram", "rounding"),
    [(NGRAM, 1e-6), (LONG_WORDS, 2e-6), (None, 1e-6)],  # unknown long words cost up to 19
    ids=["words", "long words", "characters"],
)
def test_the_search_finds_what_all_paths_add_up_to(ngram, rounding):
    """Clips of unequal lengths in one batch: what lies behind their ends does not matter."""
    log_probs, lengths = random_log_probs(3, 5, 4), torch.tensor([5, 3, 4])
    none = {} if ngram else {"ngram": 0.0, "word": 0.0, "open_character": 0.0}
    found = PrefixSearch(ALPHABET, ngram or build_ngram([]), {**WHOLE, **none})(log_probs, lengths)
    for row, n, proposals in zip(log_probs, lengths.tolist(), found, strict=True):
        wanted = by_brute_force(row[:n], ngram)
        assert len(proposals) == len(wanted)
        assert [p.score for p in proposals] == pytest.approx([s for s, _ in wanted], abs=rounding)
        assert [p.text for p in proposals[:6]] == [text for _, text in wanted[:6]]


@pytest.mark.parametrize("ngram", [NGRAM, LONG_WORDS])
def test_a_narrow_search_keeps_what_scores_best(ngram):
    """12 of all texts in each frame: the n-gram's part of the score decides which."""
    log_probs, lengths = random_log_probs(12, 5, 4), torch.full((12,), 5)
    found = PrefixSearch(ALPHABET, ngram, {**WHOLE, "beams": 12})(log_probs, lengths)
    best = [by_brute_force(row, ngram)[0] for row in log_probs]
    same = [p[0].text == text for p, (_, text) in zip(found, best, strict=True)]
    assert sum(same) >= 11


def test_a_common_word_is_not_pruned_before_it_ends():
    """The audio says "a" first, slightly; a single beam must expect what the n-gram says later."""
    ngram = build_ngram([["ba"]] * 20 + [["ab"]])
    log_probs = torch.full((1, 2, 4), 0.02)
    log_probs[0, 0, 2:] = torch.tensor([0.5, 0.46])
    log_probs[0, 1, 2:] = torch.tensor([0.5, 0.46])
    log_probs = log_probs.log()
    one_beam = PrefixSearch(ALPHABET, ngram, {**WHOLE, "beams": 1})
    assert by_brute_force(log_probs[0], ngram)[0][1] == "ba"
    assert one_beam(log_probs, torch.tensor([2]))[0][0].text == "ba"


def test_temperature_flattens_the_posteriors():
    log_probs, lengths = random_log_probs(2, 5, 4), torch.tensor([5, 4])
    flat = (log_probs / 2).log_softmax(-1)
    wanted = PrefixSearch(ALPHABET, NGRAM, WHOLE)(flat, lengths)
    found = PrefixSearch(ALPHABET, NGRAM, {**WHOLE, "temperature": 2.0})(log_probs, lengths)
    for some, others in zip(found, wanted, strict=True):
        assert [p.text for p in some[:6]] == [p.text for p in others[:6]]
        assert some[0].score == pytest.approx(others[0].score, abs=1e-5)


def test_the_lexicon_leaves_out_words_with_letters_that_the_head_lacks():
    ngram = build_ngram([["ab", "cab", "s"], ["ba"]])
    lexicon = Lexicon(ngram, ALPHABET)
    assert len(lexicon.child) == 6  # the root, a, ab, b, ba, and no word
    known = {ngram.words[i] for i in lexicon.word.tolist()}
    assert known == {"ab", "ba", ngram.words[ngram.unknown]}


def test_sure_blanks_cost_nothing_and_change_nothing():
    log_probs = random_log_probs(1, 6, 4)
    blank = torch.full((1, 40, 4), -30.0)
    blank[..., 0] = 0.0
    long = torch.cat([blank, log_probs[:, :3], blank, log_probs[:, 3:], blank], 1)
    search = PrefixSearch(ALPHABET, NGRAM, WHOLE)
    alone = search(
        torch.cat([log_probs[:, :3], blank[:, :1], log_probs[:, 3:]], 1), torch.tensor([7])
    )
    within = search(long, torch.tensor([long.shape[1]]))
    assert [p.text for p in within[0][:5]] == [p.text for p in alone[0][:5]]
    assert within[0][0].score == pytest.approx(alone[0][0].score, abs=1e-3)


def test_a_run_of_sure_blanks_becomes_one_frame():
    """A text keeps their log-probability; sure letters stay, frame by frame."""
    blank = torch.tensor([0.994, 0.003, 0.002, 0.001]).log()
    letter = blank[[2, 1, 0, 3]]
    frames = torch.stack([blank, blank, blank, letter, letter, blank, blank]).repeat(2, 1, 1)
    lengths = torch.tensor([7, 5])
    kept, dropped = squeeze(frames, lengths, silent_frames(frames, lengths))
    assert dropped.tolist() == pytest.approx([3 * float(blank[0]), 2 * float(blank[0])])
    assert torch.equal(kept[0], torch.stack([blank, letter, letter, blank]))
    assert torch.equal(kept[1, :3], torch.stack([blank, letter, letter]))
    assert kept[1, 3].exp().tolist() == [1.0, 0.0, 0.0, 0.0]  # beyond the second clip
    search = PrefixSearch(ALPHABET, NGRAM, WHOLE)
    whole, short = (search(x[:1], torch.tensor([x.shape[1]]))[0] for x in (frames, kept))
    assert [p.text for p in whole] == [p.text for p in short]
    wanted = [p.ctc + float(dropped[0]) for p in short]
    assert [p.ctc for p in whole] == pytest.approx(wanted, abs=1e-5)


def test_silence_is_not_searched_for_words():
    """In ten seconds of hum, frames that are a little less sure of the blank are silent too."""
    hum = torch.tensor([0.9, 0.05, 0.03, 0.02]).log().repeat(1, 500, 1)
    hum[:, torch.arange(500) % 50 != 0] = torch.tensor([0.999, 0.0005, 0.0003, 0.0002]).log()
    word = torch.tensor([0.05, 0.9, 0.03, 0.02]).log().repeat(1, 3, 1)
    around = torch.cat([hum, word, word[:, :, [0, 2, 1, 3]], hum], 1)
    length = torch.tensor([around.shape[1]])
    heard = (~silent_frames(around, length))[0].nonzero()[:, 0]
    assert {*range(500, 506)} <= {*heard.tolist()}
    assert heard.min() >= 500 - 26
    assert heard.max() < 506 + 26
    search = PrefixSearch(ALPHABET, NGRAM, {**WHOLE, "temperature": 3.0})
    assert (
        search(around, length)[0][0].text
        == search(around[:, 499:507], torch.tensor([8]))[0][0].text
    )
    # Many letters that are all less likely than the blank are no speech.
    unlikely = torch.tensor([0.7, 0.2, 0.06, 0.04]).log().repeat(1, 500, 1)
    assert silent_frames(unlikely, torch.tensor([500])).all()
    # A clip's padding is no silence around it: batch and single agree.
    longer = torch.cat([around, torch.zeros_like(hum)], 1)
    assert torch.equal(silent_frames(longer, length)[:, : length[0]], silent_frames(around, length))


def test_more_candidates_than_letters_are_all_letters():
    log_probs, lengths = random_log_probs(2, 4, 4), torch.tensor([4, 3])
    all_letters, more = (
        PrefixSearch(ALPHABET, NGRAM, {**WHOLE, "candidates": n})(log_probs, lengths)
        for n in (3, 9)
    )
    assert all_letters == more


def test_an_unknown_word_is_dear_by_its_length():
    """Nothing but blanks and one sure text: what the price is for each letter."""
    text = "ab aab"  # the second is no word
    path = [c for letter in text for c in (0, " ab".index(letter) + 1)]
    log_probs = torch.full((1, len(path), 4), -1000.0)
    log_probs[0, torch.arange(len(path)), torch.tensor(path)] = 0.0
    best = PrefixSearch(ALPHABET, NGRAM, WHOLE)(log_probs, torch.tensor([len(path)]))[0][0]
    assert best.text == text
    known = WHOLE["ngram"] * score_text(NGRAM, text.split()) + 2 * WHOLE["word"]
    assert best.prior == pytest.approx(known - 3 * WHOLE["open_character"], abs=1e-5)


def test_empty_audio_is_empty_text():
    log_probs = torch.full((2, 4, 4), -1000.0)
    log_probs[..., 0] = 0.0
    found = PrefixSearch(ALPHABET, NGRAM, WHOLE)(log_probs, torch.tensor([4, 1]))
    assert [proposals[0].text for proposals in found] == ["", ""]


# -- n-gram --------------------------------------------------------------------------------------


def total(ngram, before):
    """The sum of the probabilities of all words after a word."""
    ids = torch.tensor([i for i, word in enumerate(ngram.words) if word != "<s>"])
    scores = ngram.score(torch.full_like(ids, before), ids)
    assert scores.tolist() == pytest.approx([ngram.log_prob(before, i) for i in ids.tolist()])
    return float(scores.double().exp().sum())


def test_the_ngram_sums_to_one_and_is_kept_by_its_file(tmp_path):
    sentences = [text.lower().split() for text in TEXTS]
    elsewhere = {"unseen": 5, "rarer": 3, "unseen rarer": 2, "rarer unseen": 3, "nor known": 1}
    ngram = build_ngram(sentences, elsewhere)
    for before in range(len(ngram.words)):
        assert total(ngram, before) == pytest.approx(1, abs=1e-4)
    save_arpa(ngram, tmp_path / "n.arpa.gz")
    again = load_arpa(tmp_path / "n.arpa.gz")
    for sentence in [*sentences, ["unseen", "never", "seen"], []]:
        assert score_text(again, sentence) == pytest.approx(score_text(ngram, sentence), abs=1e-3)


def test_words_from_elsewhere_share_by_their_counts():
    ngram = build_ngram([["go", "on"], ["go"]], {"muted": 30, "unmuted": 10, "on": 1})
    once = {word: score_text(ngram, [word]) for word in ("muted", "unmuted")}
    assert np.exp(once["muted"] - once["unmuted"]) == pytest.approx(3, abs=1e-3)


def test_pairs_from_elsewhere_are_expected_as_far_as_transcripts_do_not_know_better():
    words = {"are": 40, "muted": 20, "unmuted": 20, "sold": 20}
    sentences = [["you", "are"], ["are", "sold"]] * 2
    pairs = {"are muted": 30, "are unmuted": 10, "are gone": 9}
    plain, ngram = build_ngram(sentences, words), build_ngram(sentences, {**words, **pairs})

    def after_are(ngram, word):
        return math.exp(ngram.log_prob(ngram.id_of["are"], ngram.id_of[word]))

    gain = {word: after_are(ngram, word) - after_are(plain, word) for word in ("muted", "unmuted")}
    assert gain["muted"] > 2 * gain["unmuted"] > 0
    assert after_are(ngram, "sold") > after_are(ngram, "muted") > after_are(plain, "muted")
    assert "gone" not in ngram.id_of  # a pair brings no word of its own


def test_a_list_of_words_may_begin_with_a_mark_of_its_encoding(tmp_path):
    (tmp_path / "words.tsv").write_text("the\t5\n", encoding="utf-8-sig")
    assert read_counts(tmp_path / "words.tsv") == {"the": 5.0}


def test_a_list_of_words_is_checked(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("muted\t30\nbluetooth\t7\nis muted\t3\n")
    assert read_counts(path) == {"muted": 30.0, "bluetooth": 7.0, "is muted": 3.0}
    path.write_text("muted\t30\nbluetooth\n")
    with pytest.raises(DataError, match=r"words\.tsv, line 2 is not word<TAB>count"):
        read_counts(path)
    with pytest.raises(DataError, match="no such file"):
        read_counts(tmp_path / "none.tsv")


def test_a_file_that_is_no_ngram_is_named(tmp_path):
    path = tmp_path / "n.arpa"
    path.write_text("\\data\\\n\\1-grams:\n-1.0\tone two\n")
    with pytest.raises(ValueError, match=r"n\.arpa, line 3: not a 1-gram"):
        load_arpa(path)
    path.write_text("\\data\\\n\\1-grams:\n-1.0\tone\n")
    with pytest.raises(ValueError, match="it lacks"):
        load_arpa(path)


def test_an_ngram_of_another_toolkit(tmp_path):
    """Unigrams alone will do; a bigram needs no backoff weight; three words are too many."""
    path = tmp_path / "n.arpa"
    path.write_text("\\data\\\n\n\\1-grams:\n-99\t<s>\n-1\t</s>\n-2\t<unk>\n-0.5\tgo\t-0.1\n")
    ngram = load_arpa(path)
    assert score_text(ngram, ["go", "there"]) == pytest.approx(-3.6 * math.log(10))
    with path.open("a") as file:
        file.write("\n\\2-grams:\n-0.3\t<s> go\n-0.2\tgo </s>\n")
    assert score_text(load_arpa(path), ["go"]) == pytest.approx(-0.5 * math.log(10))
    with path.open("a") as file:
        file.write("\n\\3-grams:\n-0.1\t<s> go </s>\n")
    with pytest.raises(ValueError, match=r"n\.arpa holds 3-grams; only 1- and 2-grams are read"):
        load_arpa(path)


@pytest.mark.parametrize("seed", range(5))
def test_forgotten_counts_leave_a_distribution(seed, monkeypatch):
    """As 25,000 hours of transcripts need it: rare pairs are dropped while counting."""
    monkeypatch.setattr(asr_ngram, "MAX_PAIRS", 8)
    rng = np.random.default_rng(seed)
    sentences = [[f"w{x}" for x in rng.zipf(1.5, 5).clip(max=30)] for _ in range(60)]
    ngram = build_ngram(sentences)
    for before in range(len(ngram.words)):
        assert total(ngram, before) == pytest.approx(1, abs=1e-5)


def test_mixed_ngrams_are_a_distribution_with_the_words_of_both():
    known = build_ngram([["go", "on"], ["go", "home", "now"]], {"rare": 3})
    new = build_ngram([["adler", "goes", "on"], ["go", "adler"]])
    mixed = blend(known, new)
    assert {"adler", "rare", "home"} <= {*mixed.words}
    for before in range(len(mixed.words)):
        assert total(mixed, before) == pytest.approx(1, abs=1e-5), mixed.words[before]
    for text in (["go", "on"], ["adler", "goes", "on"]):
        both = max(score_text(known, text), score_text(new, text))
        assert score_text(mixed, text) > both + (len(text) + 1) * math.log(0.5) - 1e-4


# -- the decoder's choice ------------------------------------------------------------------------


def test_a_tree_of_texts_is_scored_as_each_alone(build, clips):
    """Against the decoder's plain forward, one text at a time, with its audio and without LoRA."""
    processor, model = build("whisper", bridge="posteriors", lora="decoder")
    texts = [[processor.tokenize(t) for t in some] for some in (TEXTS[:3], TEXTS[1:2], TEXTS[4:6])]
    texts[0].append(texts[0][0][:2])  # another's beginning
    batch = processor(clips[:3])
    hidden, steps = model.encode(batch["input_features"], batch["input_features_mask"])
    prompt = processor.prompt(steps.tolist())
    with torch.no_grad():
        embeds, mask, _ = model.prompts(hidden, steps, **prompt)
        trees = [TextTree([[*text, processor.end_token_id] for text in some]) for some in texts]
        found = score_trees(model.decoder, read_prompts(model.decoder, embeds, mask), trees)
        for i, some in enumerate(texts):
            own = embeds[i : i + 1, -int(mask[i].sum()) :]
            for text, score in zip(some, found[i], strict=True):
                ids = torch.tensor([[*text, processor.end_token_id]])
                whole = torch.cat([own, model.get_input_embeddings()(ids)], 1)
                logits = model.decoder(inputs_embeds=whole).logits[0, own.shape[1] - 1 : -1]
                wanted = logits.log_softmax(-1).gather(1, ids.T).sum()
                assert score == pytest.approx(float(wanted), abs=1e-3)
        with model.decoder_without_lora():
            prompts = read_prompts(model.decoder, embeds, mask)
            bare = score_trees(model.decoder, prompts, trees)
        assert bare[0][0] != pytest.approx(found[0][0], abs=1e-3), "LoRA made no difference"


def decode_all(model, processor, clips, **options):
    batch = processor.collate([processor.features(clip) for clip in clips])
    hidden, steps = model.encode(batch["input_features"], batch["input_features_mask"])
    return [t.text for t in transcribe(model, processor, hidden, steps, **options)]


@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
@pytest.mark.parametrize("decode", DECODE)
@torch.no_grad()
def test_batch_equals_single(build, clips, encoder, decode):
    processor, model = build(encoder, bridge="posteriors", lora="decoder")
    options = {"decode": decode, "decoding": {"language_model": 0.5}}
    together = decode_all(model, processor, clips, **options)
    assert together == [decode_all(model, processor, [clip], **options)[0] for clip in clips]
    assert len({*together}) > 2


@torch.no_grad()
def test_one_proposal_is_the_first_pass(build, clips):
    processor, model = build("whisper")
    first = decode_all(model, processor, clips, decode="ctc")
    assert decode_all(model, processor, clips, decoding={"proposals": 1}) == first
    nothing = {"decoder": 0.0, "language_model": 0.0, "prior": 1.0, "margin": 1e9}
    assert decode_all(model, processor, clips, decoding=nothing) == first
    chosen = decode_all(model, processor, clips, decoding={"decoder": 5.0, "margin": 1e9})
    assert chosen != first, "the decoder changed nothing: this shows nothing"


def test_saved_is_loaded(build, clips, tmp_path):
    processor, model = build("whisper")
    model.config.decoding["ngram"] = 0.9
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    here = [r["text"] for r in ASRPipeline(model=model, processor=processor)(clips)]
    again = type(model).from_pretrained(tmp_path)
    there = type(processor).from_pretrained(tmp_path)
    assert there.alphabet == processor.alphabet and again.ngram.words == model.ngram.words
    assert [r["text"] for r in ASRPipeline(model=again, processor=there)(clips)] == here


def test_refusals(build, clips):
    processor, model = build("whisper", ctc=False)
    pipe = ASRPipeline(model=model, processor=processor)
    assert pipe(clips[0])["text"] == pipe(clips[0], decode="generate")["text"]
    with pytest.raises(ValueError, match="no character head"):
        pipe(clips[0], decode="rescore")
    with pytest.raises(ValueError, match="no CTC head"):
        pipe(clips[0], decode="ctc")
    processor, model = build("whisper")
    pipe = ASRPipeline(model=model, processor=processor)
    with pytest.raises(ValueError, match="one of rescore, ctc, generate"):
        pipe(clips[0], decode="beam")
    with pytest.raises(ValueError, match="did you mean 'proposals'"):
        pipe(clips[0], decoding={"proposal": 3})
    for name in ("beams", "candidates", "proposals"):
        with pytest.raises(ValueError, match="must be at least 1"):
            pipe(clips[0], decoding={name: 0})
    with pytest.raises(ValueError, match=r"saved by an older version.*make quickstart"):
        ASRConfig(ctc_decode_weight=0.5)


def test_names_are_written_as_they_were_given(build):
    processor, _ = build("whisper")
    terms = ["New York", "dashwood", "McX", "O'Hara"]
    text = "a new york. Newest new, mcx dashwood o'hara o'haras"
    written = "a New York. Newest new, McX dashwood O'Hara o'haras"
    assert write_terms(processor, [text, "no name"], terms) == [written, "no name"]


def test_names_with_hyphens_are_preferred_as_transcripts_spell_them(build):
    """Lower-case transcripts have a space for a hyphen, others drop it; both write ’ as '."""
    processor, _ = build("whisper")
    terms = ["Jean-Luc", "O’Hara"]
    assert spell_terms(processor, terms) == ["jean", "jeanluc", "luc", "o'hara"]
    texts = ["jean luc and jeanluc", "o'hara"]
    assert write_terms(processor, texts, terms) == ["Jean-Luc and Jean-Luc", "O’Hara"]


def test_words_that_are_named_are_preferred(build, caplog):
    """Between two spellings of one sound, that of a name wins, known to the lexicon or not."""
    ngram = build_ngram([["go", "home"]] * 50, {"gnome": 5, "home": 900})
    named = ngram.preferring(["gnome", "zgnome", "home"])
    assert score_text(named, ["gnome"]) > score_text(ngram, ["gnome"]) + 2
    assert "zgnome" not in ngram.id_of and "zgnome" in named.id_of
    assert score_text(named, ["go", "home"]) == pytest.approx(score_text(ngram, ["go", "home"]))
    assert ngram.preferring(["home"]).words == ngram.words

    alphabet = list(b" abdy")
    classes = {chr(byte): i for i, byte in enumerate(alphabet, 1)}
    frames = torch.full((1, 5, 6), -9.0)
    for t, letters in enumerate(["a", "bd", "", "b", "y"]):  # "abby" or "adby"
        for letter in letters or [""]:
            frames[0, t, classes.get(letter, 0)] = 0.0
    log_probs, lengths = frames.log_softmax(-1), torch.tensor([5])
    sharper = {**DECODING_DEFAULTS, "temperature": 1.5, "word": 0.5}
    common = build_ngram([["abby"]] * 9)
    for terms, wanted in (([], "abby"), (["adby"], "abby"), (["adby"] * 2, "abby")):
        search = PrefixSearch(alphabet, common.preferring(terms), sharper)
        assert search(log_probs, lengths)[0][0].text == wanted  # a name is no order
    rare = build_ngram([["by"]] * 9, {"abby": 1, "by": 10_000})
    for terms, wanted in (([], "abby"), (["adby"], "adby")):
        search = PrefixSearch(alphabet, rare.preferring(terms), sharper)
        assert search(log_probs, lengths)[0][0].text == wanted

    processor, model = build("whisper")
    pipe = ASRPipeline(model=model, processor=processor)
    model.ngram = build_ngram([["zzz"]])
    heard = pipe(babble(2.0, 1), decode="ctc")["text"]
    word = max(heard.split(), key=len)
    sure = {"open_character": 50.0, "words": [word.upper()]}
    assert word.upper() in pipe(babble(2.0, 1), decode="ctc", decoding=sure)["text"].split()
    with pytest.raises(ValueError, match="need a lexicon"):
        pipe(babble(2.0, 1), decoding={"words": [word], "lexicon": False})
    for _ in range(2):
        pipe(babble(2.0, 1), decoding={"words": ["Łódź", word]})
    (line,) = [record.getMessage() for record in caplog.records if "Łódź" in record.getMessage()]
    assert line == "'Łódź' is not preferred: not all of its letters are known"


def test_a_file_of_terms(tmp_path, capsys):
    path = tmp_path / "terms.txt"
    path.write_text("Ada Lovelace\n\n  Łódź \n")
    assert read_terms(str(path)) == ["Ada Lovelace", "Łódź"]
    path.write_text("\n")
    for bad, why in ((path, "is empty"), (tmp_path / "none", "No such file")):
        with pytest.raises(SystemExit):
            transcribe_command(["talk.wav", "--terms", str(bad)])
        assert why in capsys.readouterr().err


def test_a_clip_of_60_ms_and_no_known_word(build):
    processor, model = build("whisper")
    model.ngram = build_ngram([["zzz"]])  # a lexicon that nothing in the audio is near to
    pipe = ASRPipeline(model=model, processor=processor)
    assert isinstance(pipe(babble(0.06, 0))["text"], str)
    assert pipe(babble(2.0, 1))["text"]
    model.ngram = None  # a script without spaces
    assert pipe(babble(2.0, 1))["text"]
    assert pipe(np.zeros(SAMPLE_RATE, np.float32))["text"] == ""
