"""`tiny-audio <verb>`: list and dispatch the verbs.

Each verb is the function `main(argv)` of the module of that name in this package.
"""

import difflib
import importlib
import os
import sys
from pathlib import Path

import torch

import tiny_audio

from ..errors import UserError, one_line

VERBS = {
    "train": "train a model; takes Hydra overrides, like src/train.py",
    "eval": "measure a model's word error rate on a dataset, and write a report",
    "compare": "test which of two evaluations is better, and show where they differ",
    "leaderboard": "add an evaluation to the leaderboard",
    "transcribe": "transcribe audio files to text or subtitles",
    "serve": "serve an HTTP endpoint with OpenAI's transcription routes",
    "demo": "serve a web page: upload or record, read along, download",
    "data": "check a recipe's training data before paying for a GPU",
    "plan": "estimate a recipe's time, memory and cost before running it",
    "remote": "train on a rented machine: deploy, train, attach, status, logs, stop, fetch",
    "push": "upload a trained model to the Hugging Face Hub",
    "cut": "make training clips from long recordings with subtitles",
    "adapt": "improve a trained model on recordings of your own",
    "quickstart": "train, score and use a real recogniser on this CPU",
    "dev": "run a development task: format, lint, type-check, test, check",
}
# Console scripts that run a verb; all others run a task of `dev`.
ALIASES = {"eval": ["eval"]}
ALIASES |= {"deploy-runpod": ["remote", "deploy"], "remote-train": ["remote", "train"]}


def main(argv: list[str] | None = None) -> int:
    """Run the verb named by the first argument."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: tiny-audio <verb> [options]; see `tiny-audio <verb> --help`\n")
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
    except ImportError as error:
        extra = verb if verb in ("cut", "serve", "demo", "dev") else "quickstart"
        ours = f": pip install 'tiny-audio[{extra}]'" if type(error) is not ImportError else ""
        print(f"error: {one_line(error)}{ours}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("TINY_AUDIO_TRACEBACK"):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if verb == "eval" else 1  # 1 of eval: some clips failed
    except KeyboardInterrupt:
        print("stopped; what is done is kept", file=sys.stderr)
        return 130


def alias() -> int:
    """Entry point of the other console scripts: `poetry run eval` is `tiny-audio eval`."""
    name = Path(sys.argv[0]).stem
    return main([*ALIASES.get(name, ["dev", name]), *sys.argv[1:]])
