"""`tiny-audio <verb>`: the list of verbs. Each verb is `main(argv)` of one file beside this one."""

import importlib
import sys

VERBS = {
    "train": "train a model: Hydra config and overrides, as src/train.py",
    "eval": "word error rate of a model on a dataset, with interval and report files",
    "compare": "which of two evaluations is better: paired bootstrap, and where they differ",
    "leaderboard": "add an evaluation to the README's table",
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


def main(argv: list[str] | None = None) -> int:
    """Run the verb that the first argument names."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: tiny-audio <verb> [options]; `tiny-audio <verb> --help` teaches each\n")
        for verb, text in VERBS.items():
            print(f"  {verb:<12}{text}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; one of: {', '.join(VERBS)}"
        print(f"tiny-audio: no verb {verb!r}{hint}", file=sys.stderr)
        return 2
    if verb == "train":  # Hydra reads sys.argv itself
        sys.argv = ["tiny-audio train", *rest]
        importlib.import_module("tiny_audio.train").main()
        return 0
    try:
        return importlib.import_module(f"tiny_audio.commands.{verb}").main(rest)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


def eval_alias() -> int:
    """`poetry run eval` is `tiny-audio eval`."""
    return main(["eval", *sys.argv[1:]])


def deploy_alias() -> int:
    """`deploy-runpod` is `tiny-audio remote deploy`."""
    return main(["remote", "deploy", *sys.argv[1:]])


def remote_train_alias() -> int:
    """`remote-train` is `tiny-audio remote train`."""
    return main(["remote", "train", *sys.argv[1:]])


def format_alias() -> int:
    """`poetry run format` is `tiny-audio dev format`."""
    return main(["dev", "format", *sys.argv[1:]])


def lint_alias() -> int:
    """`poetry run lint` is `tiny-audio dev lint`."""
    return main(["dev", "lint", *sys.argv[1:]])


def type_check_alias() -> int:
    """`poetry run type-check` is `tiny-audio dev type-check`."""
    return main(["dev", "type-check", *sys.argv[1:]])


def test_alias() -> int:
    """`poetry run test` is `tiny-audio dev test`."""
    return main(["dev", "test", *sys.argv[1:]])


def check_alias() -> int:
    """`poetry run check` is `tiny-audio dev check`."""
    return main(["dev", "check", *sys.argv[1:]])
