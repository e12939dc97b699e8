"""`tiny-audio remote <task> --host H --port P`: train on a rented machine, or any with ssh.

  deploy   check the machine, send this checkout, install it      (deploy-runpod is the same)
  train    start a recipe and follow its log                      (remote-train is the same)
  attach   follow the log again
  status   print step, loss, speed, time left and money spent
  logs     print the whole log
  stop     save a checkpoint and stop the run
  fetch    download checkpoints and results; later calls download only changes

Every task can be repeated; `train` continues from the newest checkpoint. All tasks use the system's
ssh and rsync, and so your keys, agents and jump hosts. The first connection stores the machine's
host key; later ones verify it. HF_TOKEN and WANDB_API_KEY are sent on ssh's standard input and
exist only in the environment of the run.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..progress import clock
from ..training.recipe import compose_recipe
from . import cache_dir, parser_of

ROOT = Path(__file__).resolve().parents[3]
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
RSYNC_EXCLUDES = "/.git /.venv /outputs /runs /wandb /.deploying /.cache __pycache__".split()
RSYNC_EXCLUDES += ".*_cache .env* *.pem *.key id_rsa* id_ed25519* .netrc".split()
DISK_GB = {"gpu": 40, "cpu": 8}  # installation, base models, checkpoints
# Error messages of ssh and rsync, and advice for the user.
ADVICE = {
    "HOST IDENTIFICATION HAS CHANGED": "its host key has changed: either the machine was replaced, "
    "or someone intercepts the connection. If it was replaced: ssh-keygen -f {known} -R {name}",
    "Permission denied": "it refuses your key: give --identity FILE and the right --user, "
    "and add the .pub file to its ~/.ssh/authorized_keys",
    "Could not resolve": "there is no such host: check --host",
    "Connection refused": "nothing listens on that port: check --port, and that the machine runs",
    "timed out": "it does not answer: check --host and --port, and that the machine runs",
    "No space left": "its disk is full: free some space, or rent a larger disk",
}

# Bash scripts for the remote machine. Values are passed as arguments and never parsed as code.
REFUSE_IF_BUSY = """refuse_if_busy() {
  for lock in runs/*/lock; do
    [ -e "$lock" ] && ! flock -n "$lock" true || continue
    other=$(basename "$(dirname "$lock")")
    echo "the run $other is still running: attach to it, or stop it" >&2; exit 4
  done
}
"""
CHECK = """
mkdir -p -- "$1" && cd -- "$1" || exit
[ -e .deploying ] || [ -z "$(ls -A)" ] || {
  echo "$PWD is not empty and not ours: name a new folder with --folder" >&2; exit 3; }
>> .deploying
refuse_if_busy  # it would lose its environment
for python in python3.13 python3.12 python3.11 python3; do
  $python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
    echo "python=$python" && break
done
echo "gpu=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader \\
  2>/dev/null | grep , | head -n 1)"
echo "free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1e6) }')"
echo "rsync=$(command -v rsync)"
"""
INSTALL = """
cd -- "$1" && exec 9>>.deploying || exit
flock -n 9 || { echo 'another deploy to this machine is running' >&2; exit 3; }
want=$(cat pyproject.toml constraints.txt | sha256sum)
if .venv/bin/python -V > /dev/null 2>&1 && [ "$(cat .venv/deployed 2>/dev/null)" = "$want" ]; then
  echo 'already installed'
else
  set -e
  rm -rf .venv
  "$2" -m venv .venv
  .venv/bin/pip install --quiet torch -c constraints.txt
  .venv/bin/pip install --quiet -e '.[quickstart,wandb]' -c constraints.txt
  echo "$want" > .venv/deployed
fi
[ "$3" = cpu ] || .venv/bin/python -c 'import torch; assert torch.cuda.is_available()' || {
  echo "torch cannot use the GPU with driver $3: rent a machine with a newer one" >&2; exit 5; }
"""
START = """
cd -- "$1" && [ -x .venv/bin/python ] || { echo 'nothing is installed: deploy first' >&2; exit 3; }
name=$2 output=$3; shift 3
# Downloads go to the disk of this folder, whose size was checked, and stay there.
export HF_HOME="${HF_HOME:-$PWD/.cache/huggingface}"
export TINY_AUDIO_CACHE="${TINY_AUDIO_CACHE:-$PWD/.cache/tiny-audio}"
while IFS= read -r line; do export "$line"; done  # the secrets
mkdir -p "runs/$name" && exec 9>>runs/starting && flock -w 30 9 || exit
refuse_if_busy
cd "runs/$name" && exec 8>>lock && flock -n 8 || exit 4  # held until the run's last process ends
before=$(cat before 2>/dev/null || echo 0)  # seconds that earlier starts ran
[ -s started ] && echo $((before + $(stat -c %Y log) - $(cat started))) > before
rm -f exit pid; date +%s > started; echo "$output" > output; echo "$name" > ../last; touch log
echo "from=$(($(stat -c %s log) + 1))"
cd ../..
PYTHONUNBUFFERED=1 setsid bash -c '
  run=$0; "$@" & echo $! > "$run/pid"; wait $!; echo $? > "$run/exit"
' "runs/$name" "$@" < /dev/null >> "runs/$name/log" 2>&1 9>&- &
for _ in 1 2 3 4 5; do [ -s "runs/$name/pid" ] && break; sleep 0.2; done
"""
RUN = """
cd -- "$1" 2>/dev/null; name=${2:-$(cat runs/last 2>/dev/null)}
cd "runs/$name" 2>/dev/null && [ -n "$name" ] || { echo 'there is no such run' >&2; exit 3; }
"""
FOLLOW = RUN + 'tail -c "+$3" -f --pid="$(cat pid)" log'
LOGS = RUN + "cat log"
STATUS = (
    RUN
    + """
echo "name=$name"; echo "output=$(cat output)"
echo "started=$(($(cat started) - $(cat before 2>/dev/null || echo 0)))"  # as if never stopped
echo "seen=$(stat -c %Y log)"; echo "now=$(date +%s)"
if ! flock -n lock true; then echo state=running
elif [ -e exit ]; then echo "state=ended with code $(cat exit)"
else echo state=killed; fi
last() { grep -a "^step *[0-9]*$1" log | tail -n1; }; echo "step=$(last /)"; echo "eval=$(last :)"
"""
)
STOP = (
    RUN
    + """
flock -n lock true && { echo 'it is not running' >&2; exit 3; }
kill -TERM "$(cat pid)"  # only the main process, which needs its workers to stop cleanly
for _ in $(seq 300); do flock -n lock true && exit 0; sleep 1; done
echo "still running after 300 s; the same command waits longer" >&2; exit 6
"""
)


class RemoteError(UserError):
    """A failure of the connection or on the remote machine, with the next step, in one line."""


class Machine:
    """A remote machine and the folder of its checkout."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.host, self.folder = f"{args.user}@{args.host}", args.folder
        self.name = f"[{args.host}]:{args.port}" if args.port != 22 else args.host
        cache_dir().mkdir(parents=True, exist_ok=True)
        self.known = cache_dir() / "known_hosts"
        self.ssh = ["ssh", "-p", str(args.port), "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
        self.ssh += ["-o", "StrictHostKeyChecking=accept-new", "-o", "LogLevel=ERROR"]
        self.ssh += ["-o", f'UserKnownHostsFile="{self.known}"', "-o", "ForwardAgent=no"]
        self.ssh += ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
        if args.identity:
            self.ssh += ["-i", str(args.identity), "-o", "IdentitiesOnly=yes"]

    def call(self, script: str, *values: object, text: str = "", show: bool = False) -> str:
        """Run a script remotely with `folder` and `values` as arguments and `text` as stdin.

        Returns its output, or prints it as it comes with `show`. Raises RemoteError if it fails.
        """
        words = [
            "bash",
            "-c",
            REFUSE_IF_BUSY + script,
            "tiny-audio",
            self.folder,
            *map(str, values),
        ]
        done = subprocess.run(
            [*self.ssh, "--", self.host, shlex.join(words)],
            input=text,
            stdout=None if show else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.check(done)
        return done.stdout or ""

    def facts(self, script: str, *values: object, text: str = "") -> dict[str, str]:
        """Run a script remotely and parse the `key=value` lines that it prints."""
        lines = self.call(script, *values, text=text).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def rsync(self, *args: str) -> None:
        """Copy files; resume partial copies. The remote shell never parses file names."""
        shell = " ".join("'" + word.replace("'", "''") + "'" for word in self.ssh)
        options = "-azs --no-owner --no-group --partial --timeout=60 -e".split()
        command = ["rsync", *options, shell, *args]
        self.check(subprocess.run(command, stderr=subprocess.PIPE, text=True))

    def check(self, done: subprocess.CompletedProcess[str]) -> None:
        """Raise RemoteError if a program failed, with advice for known errors."""
        if not done.returncode:
            return
        message = done.stderr.strip()
        lost = done.returncode in (255, 10, 12, 30, 35)  # connection errors of ssh and rsync
        for sign, advice in ADVICE.items():
            # A remote script may print the same words about its own files, except for a full disk.
            if sign in message and (lost or sign.startswith("No space")):
                known, name = shlex.quote(str(self.known)), shlex.quote(self.name)
                raise RemoteError(f"{self.name}: {advice.format(known=known, name=name)}")
        lines = message.splitlines() or [f"exit code {done.returncode}"]
        if len(lines) > 1:
            print(message, file=sys.stderr)
        hint = "; connection lost: repeat the command, or attach to the run" if lost else ""
        raise RemoteError(f"{self.name}: {lines[-1]}{hint}")

    def path(self, folder: str) -> str:
        """A remote folder in rsync's notation; relative ones are inside the checkout."""
        return f"{self.host}:{Path(self.folder) / folder}/"


def deploy(machine: Machine, args: argparse.Namespace) -> None:
    """Check the machine, copy the checkout and install it; takes seconds if nothing changed."""
    if not (ROOT / "constraints.txt").is_file():
        raise RemoteError("deploy sends a clone of tiny-audio: run it from one, see `make install`")
    found = machine.facts(CHECK)
    print(f"{machine.name}: {found['gpu'] or 'no GPU'}; {found['free']} GB free", flush=True)
    need = DISK_GB["cpu" if args.cpu else "gpu"]
    for wrong, what in (
        (not args.cpu and not found["gpu"], "nvidia-smi finds no GPU; --cpu deploys without one"),
        ("python" not in found, "no Python 3.11 with venv: apt-get install -y python3-venv"),
        (not found["rsync"], "no rsync: apt-get install -y rsync"),
        (int(found["free"]) < need and not args.small_disk,
         f"{found['free']} GB of disk are free, {need} are needed; --small-disk skips this check"),
    ):  # fmt: skip
        if wrong:
            raise RemoteError(f"{machine.name}: {what}")
    excluded = [f"--exclude={name}" for name in RSYNC_EXCLUDES]
    # What lies beside the checkout's own files stays: data, and results in other folders.
    machine.rsync("--delete", "--filter=protect /*", *excluded, f"{ROOT}/", machine.path("."))
    print("installing", flush=True)
    driver = "cpu" if args.cpu else found["gpu"].split(",")[-1].strip()
    machine.call(INSTALL, found["python"], driver, show=True)
    print("ready: remote-train starts a recipe")


def train(machine: Machine, args: argparse.Namespace) -> int:
    """Start or continue a run and follow its log; the run outlives this program."""
    overrides = [f"+experiments={args.config}", *args.overrides]
    cfg = compose_recipe(overrides)  # refuse wrong overrides locally
    name = args.run or args.config.replace("/", "-")
    secrets = {key: os.environ[key] for key in SECRETS if os.environ.get(key)}
    command = [".venv/bin/python", "src/train.py", *overrides]
    if args.config == "quickstart":  # fetches its assets first, and measures the result
        command = [".venv/bin/tiny-audio", "quickstart", *args.overrides]
    text = "".join(f"{key}={value}\n" for key, value in secrets.items())
    started = machine.facts(START, name, cfg.run.output_dir, *command, text=text)
    passed = f" with {' and '.join(secrets)}" if secrets else ""
    print(f"{name} runs on {machine.name}{passed}, even if you disconnect", flush=True)
    args.run = name
    return 0 if args.detach else follow(machine, args, started["from"])


def follow(machine: Machine, args: argparse.Namespace, start: str) -> int:
    """Print the log from a byte offset until the run ends; return 0 if it succeeded."""
    try:
        machine.call(FOLLOW, args.run, start, show=True)
    except KeyboardInterrupt:
        print("\nthe run continues; `tiny-audio remote attach` follows it again")
        return 0
    state = machine.facts(STATUS, args.run)["state"]
    print(state if state != "killed" else "killed: remote-train continues it")
    return 0 if state == "ended with code 0" else 1


def status(machine: Machine, args: argparse.Namespace) -> int:
    """Print the state, run time and cost, and the last step and evaluation lines of the log."""
    found = machine.facts(STATUS, args.run)
    seconds = int(found["now" if found["state"] == "running" else "seen"]) - int(found["started"])
    spent = "" if args.price is None else f", ${args.price * seconds / 3600:.2f} spent"
    print(f"{found['name']}: {found['state']}, ran {clock(seconds)}{spent}")
    step = found["step"] or "no step yet: see `tiny-audio remote logs`"
    print(step, found["eval"], sep="\n" if found["eval"] else "")
    return 0


def fetch(machine: Machine, args: argparse.Namespace) -> None:
    """Download the run's folder, except cached encoder frames; local runs stay as they are."""
    output = machine.facts(STATUS, args.run)["output"]
    here = args.into or Path("outputs/fetched") / Path(output).name
    here.mkdir(parents=True, exist_ok=True)
    machine.rsync("--exclude=encoder_frames-*", machine.path(output), f"{here}/")
    print(f"fetched into {here}")


def stop(machine: Machine, args: argparse.Namespace) -> None:
    """Ask the run to save a checkpoint and stop; wait until it has."""
    machine.call(STOP, args.run)
    print("stopped; remote-train continues it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one task."""
    parser = parser_of("tiny-audio remote", __doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, (_, text) in TASKS.items():
        task = tasks.add_parser(name, help=text, description=text)
        task.add_argument("--host", required=True)
        task.add_argument("--port", type=int, default=22)
        task.add_argument("--user", default="root")
        task.add_argument("--identity", type=Path, help="private key; default: ssh's own choice")
        task.add_argument("--folder", default="tiny-audio", help="remote folder of the checkout")
        if name == "deploy":
            task.add_argument("--cpu", action="store_true", help="allow a machine without a GPU")
            task.add_argument("--small-disk", action="store_true", help="skip the disk check")
        else:
            task.add_argument("--run", default="", help="name of the run; default: the last one")
        if name == "train":
            task.add_argument("--config", required=True, help="experiment: stage1, quickstart, ...")
            task.add_argument("--detach", action="store_true", help="do not follow the log")
            task.add_argument("overrides", nargs="*", help="key=value, as for src/train.py")
        if name == "status":
            task.add_argument("--price", type=float, help="dollars per hour")
        if name == "fetch":
            task.add_argument(
                "--into", type=Path, help="local folder; default: outputs/fetched/NAME"
            )
    args = parser.parse_args(argv)
    for key in ("host", "user", "run"):
        if not re.fullmatch(r"[\w.][\w.-]*|", value := str(vars(args).get(key, ""))):
            raise RemoteError(f"--{key}: {value!r} may contain only letters, digits, . _ and -")
    if args.folder.startswith(("-", "~")):
        raise RemoteError("--folder must be absolute, or relative to the home directory, without ~")
    return TASKS[args.task][0](Machine(args), args) or 0


TASKS = {
    "deploy": (deploy, "check the machine, send this checkout, install it"),
    "train": (train, "start or continue a recipe and follow its log"),
    "attach": (lambda machine, args: follow(machine, args, "1"), "follow the log again"),
    "status": (status, "print step, loss, speed, time left and money spent"),
    "logs": (lambda machine, args: machine.call(LOGS, args.run, show=True) and 0, "print the log"),
    "stop": (stop, "save a checkpoint and stop the run"),
    "fetch": (fetch, "download checkpoints and results"),
}
