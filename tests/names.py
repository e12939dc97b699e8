"""Errors of words that a model did not know, before and after they are named.

    python tests/names.py outputs/quickstart

The words are those of the held-out clips and LibriVox that no recorded training prompt holds. They
are given as names to prefer; printed are the errors of these words, those of all other words, and
the WER of all.
"""

import argparse
from pathlib import Path
from typing import Any

import jiwer
import torch
from ordinary import clips_of

from tiny_audio.commands import assets
from tiny_audio.commands.speech import read_manifest
from tiny_audio.evaluation.scoring import normalizer, score
from tiny_audio.loading import load_pipeline


def missed(said: list[str], heard: list[str], words: set[str]) -> float:
    """The share (%) of the words said that were not heard, of those in `words`."""
    found = asked = 0
    for reference, text in zip(said, heard, strict=True):
        right: set[int] = set()
        for chunk in jiwer.process_words(reference, text).alignments[0]:
            if chunk.type == "equal":
                right.update(range(chunk.ref_start_idx, chunk.ref_end_idx))
        for position, word in enumerate(reference.split()):
            asked += word in words
            found += word in words and position in right
    return 100 * (1 - found / asked)


def measure(model: str) -> dict[str, dict[str, float]]:
    """The figures without and with the names, each printed as it is done."""
    torch.set_num_threads(1)
    normal, speech = normalizer("en"), assets.cache_dir() / "speech"
    clips = clips_of(speech / "test.jsonl") + clips_of(speech / "librivox.jsonl")
    said = [normal(text) for text, _ in clips]
    prompts = read_manifest(speech / "train.jsonl")
    known = {word for row in prompts for word in normal(row["text"]).split()}
    words = {word for text in said for word in text.split() if word.isalpha()}
    names, found = words - known, {}
    pipe = load_pipeline(model)
    print(f"{len(names)} names{'':<10}{'names %':>9}{'others %':>10}{'WER %':>8}")
    for row, given in (("not named", []), ("named", sorted(names))):
        options: Any = {"decoding": {"words": given}} if given else {}
        heard = [normal(r["text"]) for r in pipe([samples for _, samples in clips], **options)]
        found[row] = {"names": missed(said, heard, names),
                      "others": missed(said, heard, words - names),
                      "wer": score(said, heard)["wer"]}  # fmt: skip
        print(f"{row:<20}{found[row]['names']:9.1f}{found[row]['others']:10.1f}"
              f"{found[row]['wer']:8.1f}", flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a trained model")
    measure(str(parser.parse_args().model))
