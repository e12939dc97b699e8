"""`tiny-audio quickstart`: train and score a real recogniser on this CPU in minutes.

Fetches small weights (Whisper base's encoder, SmolLM2-135M) and real recordings into a cache,
trains `+experiments=quickstart`, scores it on held-out speech, and transcribes one held-out clip.
After Ctrl-C, the same command continues. It takes Hydra overrides, e.g.
`run.seed=1 run.output_dir=outputs/seed1`.
"""

import json
import random
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..asr.asr_decoding import SCORE_WEIGHTS, transcribe
from ..errors import clean_exit
from ..evaluation.recognisers import load_recogniser
from ..evaluation.scoring import score
from ..hub import git_hash, model_card
from ..loading import load_pipeline
from ..progress import clock, progress_bar, quiet_libraries
from ..training.checks import Dropped
from ..training.data import SpeechDataset
from ..training.manifests import read_source
from ..training.recipe import compose_recipe
from ..training.train import FINISHED, TUNING, train
from ..training.tuning import encoded
from . import parser_of
from .assets import Assets, prepare
from .eval import evaluate, peak_memory

# Rows of the table. The indented rows add one part of decoding at a time.
ROWS = {
    "model": "this model",
    "greedy": "  characters alone, greedy",
    "lexicon": "  + lexicon",
    "ngram": "  + n-gram",
    "language_model": "  + untrained decoder",
    "decoder": "  + trained decoder, given the audio",
}


def row_options(model: Path) -> dict[str, dict[str, Any]]:
    """Arguments of `transcribe` for the indented rows; tuning found the weights of the last two."""
    chosen = {
        "language_model": {"decoder": 0.0, "language_model": 1.0},
        "decoder": {"decoder": 1.0, "language_model": 0.0},
    }
    if (model / TUNING).exists():  # missing if nothing was evaluated
        found = json.loads((model / TUNING).read_text())
        chosen = {name: {k: found[name][k] for k in SCORE_WEIGHTS} for name in chosen}
    return {
        "greedy": {"decode": "ctc", "decoding": {"lexicon": False, "beams": 1}},
        "lexicon": {"decode": "ctc", "decoding": {"ngram": 0.0}},
        "ngram": {"decode": "ctc"},
        "language_model": {"decoding": chosen["language_model"]},
        "decoder": {"decoding": chosen["decoder"]},
    }


def score_all(model: Path, assets: Assets) -> dict[str, dict[str, dict[str, Any]]]:
    """Return summaries by row of `ROWS` and by set ("test" or "librivox")."""
    out: dict[str, dict[str, dict[str, Any]]] = {row: {} for row in ROWS}
    pipe = load_recogniser(str(model))
    options = row_options(model)
    own = {term: pipe.model.config.decoding[term] for term in SCORE_WEIGHTS}
    others = {row: way for row, way in options.items() if way.get("decoding") != own}
    for name, manifest in {"test": assets.test, "librivox": assets.librivox}.items():
        about = {"model": "model", "dataset": f"quickstart {name}"}
        examples = list(read_source({"path": str(manifest)}))
        print(f"\n{ROWS['model']}, {name}", flush=True)
        out["model"][name] = evaluate(pipe, examples, model / "eval" / name, {}, about)
        scores = score_parts(pipe, manifest, others)
        for row in options:  # the row that tuning chose is the model itself
            out[row][name] = scores.get(row, out["model"][name])
    return out


def score_parts(
    pipe: Any, manifest: Path, options: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Score each of several ways to decode; clips are encoded once for all of them."""
    processor = pipe.processor
    clips = SpeechDataset([{"path": str(manifest)}], processor, Dropped(), max_seconds=60.0)
    references = [example.text for example in clips.examples]
    hypotheses = {way: [""] * len(references) for way in options}
    bar = progress_bar(total=len(references), desc="what each part adds", unit="clip")
    with bar:
        for rows, hidden, steps in encoded(pipe.model, clips, batch_seconds=60.0):
            for way, chosen in options.items():
                found = transcribe(pipe.model, processor, hidden, steps, **chosen)
                for row, transcript in zip(rows, found, strict=True):
                    hypotheses[way][row] = transcript.text
            bar.update(len(rows))
    return {way: score(references, texts, pipe.language) for way, texts in hypotheses.items()}


def table(scores: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Format the final table: WER in percent with its 95 % interval, by row and set."""
    n, words = scores["model"]["test"]["utterances"], scores["model"]["test"]["words"]
    lines = [f"{'WER %':<42}{f'{n} held-out clips, {words} words':<36}LibriVox, 5 clips"]
    for row, label in ROWS.items():
        cells = [
            f"{s['wer']:5.1f}  [{s['wer_low']:.1f}, {s['wer_high']:.1f}]"
            for s in (scores[row]["test"], scores[row]["librivox"])
        ]
        lines.append(f"{label:<42}{cells[0]:<36}{cells[1]}")
    return "\n".join(lines)


def run(overrides: list[str]) -> int:
    """Run the quickstart and return the exit code."""
    started = time.monotonic()
    logging.set_verbosity_error()
    quiet_libraries()
    cfg = compose_recipe(["+experiments=quickstart", *overrides])
    assets = prepare(baseline=False)
    prepared = time.monotonic() - started
    cpu_started = time.process_time()
    model = train(cfg)
    cpu_seconds = time.process_time() - cpu_started
    train_seconds = json.loads((model / FINISHED).read_text())["seconds"]
    scores = score_all(model, assets)
    clip = random.Random(cfg.run.seed).choice(list(read_source({"path": str(assets.test)})))
    hypothesis = load_pipeline(str(model))(clip.audio)["text"]
    test = {row: sets["test"] for row, sets in scores.items()}
    total = time.monotonic() - started
    summary = {
        **{k: test["model"][k] for k in "wer wer_low wer_high rtfx utterances words".split()},
        **{f"{row}_wer": test[row]["wer"] for row in ROWS if row != "model"},
        **{f"librivox_{row}_wer": scores[row]["librivox"]["wer"] for row in ROWS},
        "errors": sum(s["errors"] for s in scores["model"].values()),
        "seed": cfg.run.seed,
        "prepare_seconds": round(prepared, 1),
        "train_seconds": round(train_seconds, 1),
        "train_cpu_seconds": round(cpu_seconds, 1),  # of this process
        "total_seconds": round(total, 1),
        "peak_memory_gb": round(peak_memory(), 2),
        "command": " ".join(["tiny-audio quickstart", *overrides]),
        "git_hash": git_hash(),
    }
    (model / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (model / "README.md").write_text(model_card(model))
    print(f"\n{table(scores)}\n")
    print(
        f"set-up {clock(prepared)}, training {clock(train_seconds)}, total {clock(total)}; "
        f"peak memory {peak_memory():.1f} GB\n\n"
        f"held-out clip {clip.id}\n  reference:  {clip.text}\n  hypothesis: {hypothesis}\n\n"
        f"The model is in {model}; its README.md shows how to load it. Use it:\n\n"
        f"    tiny-audio transcribe talk.mp3 --model {model}\n"
        f"    tiny-audio eval {model} --dataset {assets.test}\n"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart."""
    parser = parser_of("tiny-audio quickstart", __doc__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of +experiments=quickstart")
    args = parser.parse_args(argv)
    with clean_exit():
        return run(args.overrides)
