"""Let SmolLM2 write sentences like the quickstart's training prompts, for its synthetic speech.

    python bench/write_sentences.py --number 3500

Continues src/tiny_audio/configs/quickstart_sentences.txt, which the quickstart reads. The language
model sees a few random *training* prompts as a list and goes on with it; what is close to a
held-out text is dropped. It writes some two sentences a second on one thread.
"""

import argparse
import random
import re
import time
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_audio.commands.assets import (
    HELD_OUT,
    SENTENCES_FILE,
    clean,
    near_duplicate,
    prepare,
    read_manifest,
)

SHOWN, LISTS, NEW_TOKENS = 5, 16, 120  # prompts of a list, lists in a batch, tokens after each
WORDS = range(2, 17)
PLAIN = re.compile(r"[A-Za-z][A-Za-z' ,;-]{8,110}[.!?]?")


def continue_lists(folder: str, prompts: list[str], rng: random.Random) -> Iterator[str]:
    """Yield lines that the language model adds to lists of random prompts, without end."""
    tokenizer: object = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    while True:
        lists = []
        for _ in range(LISTS):
            shown = "".join(f"- {prompt}\n" for prompt in rng.sample(prompts, SHOWN))
            lists.append(f"Announcements of a telephone system:\n{shown}-")
        batch = tokenizer(lists, return_tensors="pt", padding=True)
        written = model.generate(
            **batch, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.9, top_p=0.95
        )
        for text in tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :]):
            yield from text.split("\n")[:-1]  # the last line may be cut off


def main() -> None:
    """Append sentences to the file until it has `--number`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--number", type=int, default=3500, help="sentences in the file at the end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    assets = prepare(synthetic=False, baseline=False)
    prompts = [row["raw_text"].strip() for row in read_manifest(assets.train)]
    prompts = [text for text in prompts if 3 <= len(text.split()) <= 14]
    held_out = [row["text"] for name in HELD_OUT for row in read_manifest(getattr(assets, name))]
    written = SENTENCES_FILE.read_text().splitlines() if SENTENCES_FILE.exists() else []
    known = {clean(text) for text in prompts + written}
    torch.manual_seed(args.seed)
    started, before = time.monotonic(), len(written)
    for line in continue_lists(str(assets.decoder), prompts, random.Random(args.seed)):
        if len(written) >= args.number:
            break
        text = line.strip().lstrip("- ")
        spoken = clean(text)
        if not PLAIN.fullmatch(text) or len(spoken.split()) not in WORDS or spoken in known:
            continue
        if any(near_duplicate(spoken, other) for other in held_out):
            continue
        known.add(spoken)
        written.append(text if text[-1] in ".!?" else f"{text}.")
        with SENTENCES_FILE.open("a") as file:
            file.write(written[-1] + "\n")
        left = (time.monotonic() - started) / (len(written) - before) * (args.number - len(written))
        print(f"{len(written)} of {args.number}, {left:.0f} s left: {written[-1]}")


if __name__ == "__main__":
    main()
