"""A disk that fills while a checkpoint is written: one line, nothing lost, and the run goes on."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_audio.training.recipe import CONFIGS
from tiny_audio.training.run_folder import explain_full_disk
from tiny_audio.training.train import FINISHED

# A disk of its own for the child alone, which needs no rights outside.
DISK = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-euc"]
RUN = """
mount -t tmpfs -o size={megabytes}m tiny {folder}
"$@" run.output_dir={folder}/run || echo "code $?" >> {folder}/said
mount -o remount,size=200m {folder}
ls {folder}/run/align > {folder}/kept
"$@" run.output_dir={folder}/run
cp -r {folder}/. {copy}
"""


def can_mount() -> bool:
    return subprocess.run([*DISK, "true"], capture_output=True).returncode == 0


@pytest.mark.long
@pytest.mark.skipif(not can_mount(), reason="this machine gives its users no mounts of their own")
def test_a_full_disk_costs_nothing(tiny_bases, corpus, tmp_path):
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    command = [
        sys.executable,
        str(CONFIGS.parents[3] / "src" / "train.py"),
        f"model.encoder_model_name={tiny_bases / 'whisper'}",
        f"model.decoder_model_name={tiny_bases / 'decoder'}",
        "encoder_lora.r=0", "model.projector_hidden=4096", f"data.train=[{{path: {corpus}}}]",
        "stages=[{name: align, training: {max_steps: 6, save_steps: 2, ctc_loss_weight: 1.0}}]",
        "training.batch_seconds=20", "training.eval_strategy=no", "training.warmup_steps=0",
        "training.save_total_limit=9", "training.dataloader_num_workers=0",
    ]  # fmt: skip
    script = RUN.format(megabytes=35, folder=disk, copy=copy)
    out = subprocess.run(
        [*DISK, script, "sh", *command], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert out.returncode == 0, out.stderr[-2000:]
    (line,) = [row for row in out.stderr.splitlines() if row.startswith("error:")]
    assert f"the disk of {disk}/run is full" in line and "MB or more" in line
    assert "the same command continues" in line and "Traceback" not in out.stderr
    whole = re.findall(r"checkpoint-\d+", line)
    kept = re.findall(r"checkpoint-\d+", (copy / "kept").read_text())
    assert whole and max(kept) == whole[0]
    assert "continuing from" in out.stdout
    assert json.loads((copy / "run" / FINISHED).read_text())["stages"][0]["steps"] == 6


def test_other_failures_pass_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="of another kind"), explain_full_disk(tmp_path):
        raise RuntimeError("of another kind")
    (Path(tmp_path) / "x.tmp").write_text("half")
    with pytest.raises(OSError, match="is full"), explain_full_disk(tmp_path):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
    assert shutil.disk_usage(tmp_path).free
