"""`tiny-audio dev <task>`: development tasks."""

import subprocess
import sys

from . import parser_of

PATHS = ["src", "tests", "bench"]
PYTHON = [sys.executable, "-m"]
TASKS: dict[str, list[list[str]]] = {
    "format": [["ruff", "format", *PATHS], ["ruff", "check", "--fix", *PATHS]],
    "lint": [["ruff", "check", *PATHS], ["ruff", "format", "--check", *PATHS]],
    "type-check": [["pyright"]],
    "smoke": [["pytest", "tests/test_audio.py", "tests/test_decoding.py", "tests/test_scoring.py"]],
    "test": [["pytest", "--numprocesses=2", "--dist=loadfile"]],  # a file per process
}
TASKS["check"] = [*TASKS["lint"], *TASKS["type-check"], *TASKS["test"]]


def main(argv: list[str] | None = None) -> int:
    """Run a task and stop at its first failure; further arguments go to its last command."""
    parser = parser_of("tiny-audio dev", main.__doc__)
    parser.add_argument("task", choices=TASKS)
    args, rest = parser.parse_known_args(argv)
    commands = [list(command) for command in TASKS[args.task]]
    commands[-1] += rest
    for command in commands:
        print("+", " ".join(command), flush=True)
        if code := subprocess.run(PYTHON + command).returncode:
            return code
    return 0
