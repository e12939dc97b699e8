"""Let SmolLM2 write sentences like the quickstart's training prompts, for its synthetic speech.

    python bench/write_sentences.py --number 2500

Continues `src/tiny_audio/configs/quickstart_sentences.txt`. The language model sees a few random
training prompts as a list and adds to it. What is close to a held-out text is dropped. One thread
writes some two sentences a second.
"""

import random
import re

import torch
from transformers import pipeline

from tiny_audio.commands import assets, parser_of, speech
from tiny_audio.progress import progress_bar

TITLE = "Announcements of a telephone system:\n"
SHOWN, LISTS = 5, 16  # prompts in a list, lists in a batch
SAMPLING = {"max_new_tokens": 120, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
SENTENCE = re.compile(r"[A-Za-z][A-Za-z' ,;-]{8,110}[.!?]?")


def main() -> None:
    """Add sentences to the file until it has `--number`."""
    parser = parser_of("python bench/write_sentences.py", __doc__)
    parser.add_argument("--number", type=int, default=2500, help="sentences in all")
    number = parser.parse_args().number
    made = assets.prepare(synthetic=False, baseline=False)
    held_out, rows = speech.held_out_texts(assets.cache_dir()), speech.read_manifest(made.train)
    prompts = [row["raw_text"].strip() for row in rows if 3 <= len(row["text"].split()) <= 14]
    file = speech.SENTENCES_FILE
    written = file.read_text().splitlines() if file.exists() else []
    known = {row["text"] for row in rows} | {speech.clean(text) for text in written}
    rng = random.Random(len(written))
    torch.manual_seed(len(written))
    write = pipeline("text-generation", str(made.decoder), dtype=torch.float32)
    bar = progress_bar(total=number, initial=len(written), desc="sentences")
    while bar.n < number:
        lists = [TITLE + "".join(f"- {text}\n" for text in rng.sample(prompts, SHOWN)) + "-"
                 for _ in range(LISTS)]  # fmt: skip
        found = write(lists, batch_size=LISTS, return_full_text=False, **SAMPLING)
        lines = [line for (one,) in found for line in one["generated_text"].split("\n")[:-1]]
        for text in (line.strip().lstrip("- ") for line in lines):
            spoken = speech.clean(text)
            new = SENTENCE.fullmatch(text) and " " in spoken and spoken not in known
            if new and not any(speech.near_duplicate(spoken, other) for other in held_out):
                known.add(spoken)
                bar.update()
                with file.open("a") as end:
                    end.write(f"{text}\n" if text[-1] in ".!?" else f"{text}.\n")


if __name__ == "__main__":
    main()
