"""Training on another machine: a real sshd on loopback, the real rsync, real runs.

The far side is this machine under another folder. Needs sshd and rsync; root installs them.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tiny_audio.commands import cache_dir, cli, remote

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]
SECRET = f"hf_{uuid.uuid4().hex}"


def tool(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options)


@pytest.fixture(scope="session")
def sshd(tmp_path_factory):
    """A server that takes one key; `.port`, `.key`, `.restart()` with a new host key."""
    if not (shutil.which("sshd") and shutil.which("rsync")):
        if os.geteuid():
            pytest.fail("apt-get install openssh-server rsync")
        tool("apt-get", "update", "-qq")
        install = ["install", "-y", "-qq", "--no-install-recommends", "openssh-server", "rsync"]
        tool("apt-get", *install, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    if not os.geteuid():
        Path("/run/sshd").mkdir(exist_ok=True)
    folder = tmp_path_factory.mktemp("sshd")
    key = folder / "a key with spaces"
    tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    port = 2200 + os.getpid() % 700
    passed = {k: v for k, v in os.environ.items() if k.startswith("PIP_") and " " not in v}
    passed |= {
        "TINY_AUDIO_CACHE": str(cache_dir()),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    config = [
        f"Port {port}", "ListenAddress 127.0.0.1", "UsePAM no", "StrictModes no", "PrintMotd no",
        f"HostKey {folder}/host", f"PidFile {folder}/pid", f"AuthorizedKeysFile {folder}/known",
        "SetEnv " + " ".join(f'{k}="{v}"' for k, v in passed.items() if v),
    ]  # fmt: skip
    (folder / "config").write_text("\n".join(config) + "\n")
    (folder / "known").write_text(key.with_suffix(".pub").read_text())
    processes = []

    def restart() -> None:
        for process in processes:
            process.terminate()
            process.wait()
        (folder / "host").unlink(missing_ok=True)
        tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host")
        log = (folder / "log").open("a")
        server = [shutil.which("sshd"), "-D", "-e", "-f", folder / "config"]
        processes[:] = [subprocess.Popen(server, stderr=log)]
        time.sleep(0.5)
        assert processes[0].poll() is None, (folder / "log").read_text()

    restart()
    yield SimpleNamespace(port=port, key=key, restart=restart)
    processes[0].terminate()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of this side's own, for its known_hosts."""
    monkeypatch.setenv("TINY_AUDIO_CACHE", str(tmp_path / "the cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path


def call(task: str, sshd, folder, *args: str) -> list[str]:
    where = [
        "--host",
        "127.0.0.1",
        "--port",
        str(sshd.port),
        "--user",
        os.environ.get("USER", "root"),
    ]
    return ["remote", task, *where, "--identity", str(sshd.key), "--folder", str(folder), *args]


# -- what can go wrong on the way ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (("--port", "1"), "nothing listens on that port: check --port"),
        (("--host", "no-such-host.invalid"), "there is no such host: check --host"),
        (("--user", "nobody"), "it refuses your key"),
        (("--host", "-oProxyCommand=touch /tmp/x"), "may contain only letters"),
        (("--host", "a;touch x"), "may contain only letters"),
        (("--host", "::1"), "may contain only letters"),
        (("--folder", "~/x"), "--folder must be absolute"),
    ],
)
def test_a_wrong_address_is_named(sshd, home, capsys, change, hint):
    with contextlib.suppress(SystemExit):
        assert cli.main(call("deploy", sshd, home / "far", *change)) == 1
    assert hint in capsys.readouterr().err


def test_a_host_key_is_kept_and_a_changed_one_refused(sshd, home, capsys):
    machine = call("logs", sshd, home / "far")
    assert cli.main(machine) == 1  # no such run, but a connection
    assert "there is no such run" in capsys.readouterr().err
    known = home / "the cache/known_hosts"
    assert "found" in tool("ssh-keygen", "-f", known, "-F", f"[127.0.0.1]:{sshd.port}").stdout
    sshd.restart()
    assert cli.main(machine) == 1
    said = capsys.readouterr().err
    assert "its host key has changed" in said
    tool("bash", "-c", "ssh-keygen" + said.split("ssh-keygen")[-1])  # as it says
    assert cli.main(machine) == 1
    assert "there is no such run" in capsys.readouterr().err


def test_a_machine_without_gpu_disk_or_python_is_refused(sshd, home, capsys, monkeypatch):
    assert cli.main(call("deploy", sshd, home / "far")) == 1
    assert "finds no GPU; --cpu deploys" in capsys.readouterr().err
    monkeypatch.setitem(remote.DISK_GB, "cpu", 10**6)
    assert cli.main(call("deploy", sshd, home / "far", "--cpu")) == 1
    assert "GB of disk are free, 1000000 are needed" in capsys.readouterr().err
    monkeypatch.setattr(remote, "CHECK", remote.CHECK.replace("python3", "python9"))
    assert cli.main(call("deploy", sshd, home / "far", "--cpu", "--small-disk")) == 1
    assert "no Python 3.11" in capsys.readouterr().err


def test_a_folder_with_other_things_in_it_is_left_alone(sshd, home, capsys):
    """A deploy deletes what is not in the checkout, so it takes none but a folder of its own."""
    far = home / "volume"
    far.mkdir()
    (far / "years of work").write_text("kept")
    assert cli.main(call("deploy", sshd, far, "--cpu", "--small-disk")) == 1
    assert "is not empty and not ours: name a new folder" in capsys.readouterr().err
    assert [path.name for path in far.iterdir()] == ["years of work"]


def test_what_a_script_there_says_is_not_taken_for_the_way(sshd, home):
    """A run's own "Permission denied" is shown, and not that the key is refused."""
    machine = remote.Machine(argparse.Namespace(host="127.0.0.1", port=sshd.port, folder=str(home),
                             user=os.environ.get("USER", "root"), identity=sshd.key))  # fmt: skip
    with pytest.raises(remote.RemoteError, match="/data: Permission denied"):
        machine.call("echo '/data: Permission denied' >&2; exit 2")


def test_an_unknown_key_is_refused_before_anything_is_paid_for(sshd, home, capsys):
    task = call("train", sshd, home / "far", "--config", "quickstart", "+training.lerning_rate=1")
    assert cli.main(task) == 1
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


# -- runs ------------------------------------------------------------------------------------------

ODD = "a folder; touch $(echo pwned) `echo pwned` 'quoted' \"twice\" & *"


@pytest.fixture
def far(home, sshd, monkeypatch):
    """A deployed machine: this checkout, and this environment in the place of an installed one."""
    link = f'cd -- "$1" && ln -sfn {shlex.quote(sys.prefix)} .venv'
    monkeypatch.setattr(remote, "INSTALL", link)
    assert cli.main(call("deploy", sshd, home / ODD, "--cpu", "--small-disk")) == 0
    return home / ODD


@pytest.fixture
def recipe(tiny_bases, corpus):
    """Overrides that make a plain run of tiny models on a few clips: `recipe(steps)`."""

    def make(steps: int, *more: str) -> list[str]:
        return [
            f"model.encoder_model_name={tiny_bases / 'whisper'}",
            f"model.decoder_model_name={tiny_bases / 'decoder'}",
            "model.projector_hidden=32", "encoder_lora.r=2", "peft.r=2",
            f"data.train=[{{path: {corpus}}}]", f"data.eval=[{{path: {corpus}, sample: 2}}]",
            "training.batch_seconds=6",
            "training.save_steps=5", "training.logging_steps=1", f"training.max_steps={steps}",
            "training.dataloader_num_workers=0", "+training.use_cpu=true",
            "training.push_to_hub=false", *more,
        ]  # fmt: skip

    return make


def wait_for(sign, seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not sign():
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.2)


def test_a_second_deploy_keeps_what_is_beside_the_checkout(far, home, sshd):
    for path in (far / "data of mine/clips.csv", far / "src/tiny_audio/old.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert cli.main(call("deploy", sshd, far, "--cpu", "--small-disk")) == 0
    assert (far / "data of mine/clips.csv").exists()
    assert not (far / "src/tiny_audio/old.py").exists()


def test_a_folder_with_shell_characters_is_only_a_name(far, home):
    assert (far / "src/tiny_audio/training/plan.py").exists()
    assert not (far / ".git").exists() and not (far / "outputs").exists()
    assert not list(home.rglob("pwned*")) and not (Path.home() / "pwned").exists()


def test_train_status_stop_continue_fetch(far, home, sshd, recipe, capfd):
    """One run from its start to its fetched result, another refused meanwhile."""
    train = call("train", sshd, far, "--config", "mac_minimal")
    overrides = recipe(4000)
    assert cli.main([*train, "--detach", *overrides]) == 0
    log = far / "runs/mac_minimal/log"
    wait_for(lambda: log.exists() and "evaluation loss" in log.read_text())
    assert cli.main([*train, "--detach", *overrides]) == 1
    assert "the run mac_minimal is still running" in capfd.readouterr().err
    # A deploy would replace the code of the run.
    assert cli.main(call("deploy", sshd, far, "--cpu", "--small-disk")) == 1
    assert "the run mac_minimal is still running" in capfd.readouterr().err
    assert cli.main(call("status", sshd, far, "--price", "36")) == 0
    said = capfd.readouterr().out
    assert "mac_minimal: running, ran 0:" in said and "$0." in said and "s audio/s" in said
    assert "evaluation loss" in said  # the last step and the last evaluation, whichever came last
    assert cli.main(call("stop", sshd, far)) == 0
    assert cli.main(call("stop", sshd, far)) == 1
    assert "it is not running" in capfd.readouterr().err
    done = int(log.read_text().rsplit("step ", 1)[1].split("/")[0])
    assert cli.main([*train, *recipe(done + 30)]) == 0
    out = capfd.readouterr().out
    assert "continuing from" in out and "ended with code 0" in out
    assert cli.main(call("fetch", sshd, far, "--into", str(home / "the model"))) == 0
    assert (home / "the model/model.safetensors").exists()
    before = far / "runs/mac_minimal/before"
    assert 0 < int(before.read_text()) < 180  # what ran until the stop
    before.write_text("3600")  # as if it had been an hour
    assert cli.main(call("status", sshd, far, "--price", "36")) == 0
    said = capfd.readouterr().out
    assert "ended with code 0, ran 1:00:" in said and "$36." in said
    assert cli.main(call("logs", sshd, far)) == 0
    said = capfd.readouterr().out
    assert "step     7/4000" in said and f"/{done + 30} 100 %" in said


def test_killed_and_continued_gives_the_same_weights(far, home, sshd, recipe, capfd):
    train = call("train", sshd, far, "--config", "mac_minimal")
    whole = recipe(12, "run.output_dir=outputs/whole")
    assert cli.main([*train, "--run", "whole", *whole]) == 0
    broken = [*train, "--run", "broken", *recipe(12, "run.output_dir=outputs/broken")]
    assert cli.main([*broken, "--detach"]) == 0
    state = far / "outputs/broken/train/checkpoint-5/trainer_state.json"
    wait_for(state.exists)
    os.killpg(os.getpgid(int((far / "runs/broken/pid").read_text())), signal.SIGKILL)
    wait_for(lambda: cli.main(call("status", sshd, far, "--run", "broken")) == 0
             and "broken: killed" in capfd.readouterr().out)  # fmt: skip
    assert cli.main(broken) == 0
    assert "continuing from" in capfd.readouterr().out
    one, other = (load_file(far / f"outputs/{n}/model.safetensors") for n in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_secrets_are_in_the_environment_of_the_run_alone(far, home, sshd, recipe, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    train = call("train", sshd, far, "--config", "mac_minimal")
    assert cli.main([*train, "--detach", *recipe(4000)]) == 0
    log = far / "runs/mac_minimal/log"
    wait_for(lambda: "step     3/" in log.read_text())
    pid = (far / "runs/mac_minimal/pid").read_text().strip()
    assert SECRET.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert SECRET.encode() not in arguments.read_bytes(), arguments
    assert cli.main(call("stop", sshd, far)) == 0
    found = subprocess.run(["grep", "-rlF", "-e", SECRET, far, home / "the cache"],
                           capture_output=True, text=True)  # fmt: skip
    assert found.returncode == 1 and not found.stdout, found.stdout
    if shutil.which("tmux"):
        shown = subprocess.run(["tmux", "show-environment", "-g"], capture_output=True, text=True)
        assert SECRET not in shown.stdout


def test_this_side_may_die(far, home, sshd, recipe):
    """The program here is killed while it follows the run; the run goes on and is attached to."""
    command = [sys.executable, "-c", "import sys; from tiny_audio.commands.cli import main; "
               "sys.exit(main(sys.argv[1:]))"]  # fmt: skip
    train = call("train", sshd, far, "--config", "mac_minimal", *recipe(60))
    here = subprocess.Popen([*command, *train], start_new_session=True, stdout=subprocess.PIPE)
    log = far / "runs/mac_minimal/log"
    wait_for(lambda: log.exists() and "step     3/" in log.read_text())
    os.killpg(here.pid, signal.SIGKILL)  # the program and its ssh
    here.wait()
    attached = subprocess.run(
        [*command, *call("attach", sshd, far)], capture_output=True, text=True
    )
    assert attached.returncode == 0, attached.stderr
    assert "step     1/60" in attached.stdout and "step    60/60" in attached.stdout
    assert "ended with code 0" in attached.stdout


# -- the whole way, from a clean clone -------------------------------------------------------------


def test_the_quickstart_from_a_clean_clone(sshd, home, real_bases, real_rows, monkeypatch, capfd):
    """deploy (installing for real), 20 steps with this side killed, the run attached to, stopped
    and continued, fetch, transcribe."""
    monkeypatch.delenv("TINY_AUDIO_CACHE")
    clone, far = home / "clone", home / "far"
    tool("git", "clone", "--quiet", ROOT, clone)
    program = [sys.executable, "-c", "import sys; from tiny_audio.commands.cli import main; "
               "sys.exit(main(sys.argv[1:]))"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(clone / "src")}

    def start(*args: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*program, *args], env=env, cwd=clone, start_new_session=True,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(*args: str) -> str:
        done = subprocess.run([*program, *args], env=env, cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(*call("deploy", sshd, far, "--cpu", "--small-disk"))
    started = time.monotonic()
    assert "already installed" in run(*call("deploy", sshd, far, "--cpu", "--small-disk"))
    assert time.monotonic() - started < 20
    steps = ["stages.0.training.max_steps=14", "stages.1.training.max_steps=3"]
    steps += ["stages.2.training.max_steps=6"]
    short = ["data.max_train_samples=90", f"data.train=[{{path: {real_bases.train}}}]", *steps]
    short += ["training.logging_steps=1"]
    train = call("train", sshd, far, "--config", "quickstart", *short)
    here, log = start(*train), far / "runs/quickstart/log"
    wait_for(lambda: log.exists() and "step     2/14" in log.read_text(), 600)
    os.killpg(here.pid, signal.SIGKILL)
    attached = start(*call("attach", sshd, far))
    run(*call("stop", sshd, far))
    said = attached.communicate()[0]
    assert "step     1/14" in said and "ended with code 75" in said
    said = run(*train)
    assert "continuing from" in said and "ended with code 0" in said
    run(*call("fetch", sshd, far))
    model = clone / "outputs/fetched/quickstart"
    assert json.loads((model / "finished.json").read_text())["stages"][1]["steps"] == 6
    code = "from tiny_audio.commands.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    said = tool(sys.executable, "-c", code, "transcribe", real_rows[0]["audio"], "--model", model)
    assert said.stdout.strip()
