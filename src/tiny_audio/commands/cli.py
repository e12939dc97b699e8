"""`tiny-audio <verb>`: the list of verbs. Each verb is `main(argv)` of one file beside this one."""

import difflib
import importlib
import os
import sys
from pathlib import Path

import tiny_audio

VERBS = {
    "train": "train a model: Hydra config and overrides, as src/train.py",
    "eval": "word error rate of a model on a dataset, with interval and report files",
    "compare": "which of two evaluations is better: paired bootstrap, and where they differ",
    "leaderboard": "add an evaluation to the leaderboard",
    "transcribe": "audio files in, text or subtitles out",
    "serve": "an HTTP endpoint with OpenAI's routes for transcription",
    "demo": "a web page: upload or record, read along, download",
    "data": "check what a recipe trains on, before paying for a GPU",
    "plan": "what a recipe costs in time, memory and money, before it runs",
    "remote": "train on a rented machine: deploy, train, attach, status, logs, stop, fetch",
    "push": "put a trained model on the Hugging Face Hub",
    "quickstart": "train, score and use a real recogniser on this CPU",
    "dev": "format, lint, type-check, test, check",
}
# Console scripts that have a name of their own; the others are tasks of `dev`.
ALIASES = {"eval": ["eval"]}
ALIASES |= {"deploy-runpod": ["remote", "deploy"], "remote-train": ["remote", "train"]}


def main(argv: list[str] | None = None) -> int:
    """Run the verb that the first argument names."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: tiny-audio <verb> [options]; `tiny-audio <verb> --help` teaches each\n")
        for verb, text in VERBS.items():
            print(f"  {verb:<12}{text}")
        return 0
    if argv[0] == "--version":
        print(f"tiny-audio {tiny_audio.__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; one of: {', '.join(VERBS)}"
        print(f"tiny-audio: no verb {verb!r}{hint}", file=sys.stderr)
        return 2
    if verb == "train":  # Hydra reads sys.argv itself
        sys.argv = ["tiny-audio train", *rest]
        importlib.import_module("tiny_audio.training.train").main()
        return 0
    try:
        code = importlib.import_module(f"tiny_audio.commands.{verb}").main(rest)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


def alias() -> int:
    """A console script that is named after what it does: `poetry run eval` is `tiny-audio eval`."""
    name = Path(sys.argv[0]).stem
    return main([*ALIASES.get(name, ["dev", name]), *sys.argv[1:]])
