"""Two processes (gloo, on this CPU) train as one does on the same batches."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file

from tiny_audio.asr.asr_saving import WEIGHTS
from tiny_audio.training.batches import LengthBatchSampler
from tiny_audio.training.checks import read_log
from tiny_audio.training.recipe import CONFIGS
from tiny_audio.training.run_log import LOG


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [12, 101])
def test_each_example_once_an_epoch_over_all_processes(world, count):
    seconds = np.random.default_rng(1).uniform(1, 9, count)
    for epoch in range(3):
        ids, batches = Counter(), []
        for rank in range(world):
            sampler = LengthBatchSampler(seconds, 20.0, seed=5, multiple=world)
            sampler.set_epoch(epoch)
            shard = list(BatchSamplerShard(sampler, world, rank, even_batches=False))
            batches.append(len(shard))
            ids.update(i for batch in shard for i in batch)
        assert ids == dict.fromkeys(range(count), 1)
        assert len(set(batches)) == 1, "one process would wait for another for ever"


# src/train.py, in which a process can be killed in the middle of a step.
DYING = """
import os
from tiny_audio.training import train

compute_loss = train.ASRTrainer.compute_loss

def compute_or_die(trainer, *arguments, **options):
    if trainer.state.global_step == int(os.environ["DIES_AT"]):
        os._exit(9)
    return compute_loss(trainer, *arguments, **options)

train.ASRTrainer.compute_loss = compute_or_die
train.main()
"""


@pytest.fixture
def losses(tiny_bases, corpus, tmp_path):
    """`losses("name", processes, accumulation)`: per-step losses and final weights of a run."""

    script = tmp_path / "train.py"
    script.write_text(DYING)

    def run(name, processes, accumulation, streaming=False, steps=6, dies_at=-1):
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
            launch += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
        command = [
            *launch, str(script),
            f"model.encoder_model_name={tiny_bases / 'whisper'}",
            f"model.decoder_model_name={tiny_bases / 'decoder'}", "model.projector_hidden=32",
            "encoder_lora.r=0", "peft.r=2", f"data.train=[{{path: {corpus}}}]",
            f"data.streaming={streaming}", "data.max_seconds=4", "data.block=5",
            f"data.eval=[{{path: {corpus}, sample: 2}}]", f"run.output_dir={tmp_path / name}",
            f"training.max_steps={steps}", "training.eval_steps=3", "training.logging_steps=1",
            "training.save_steps=5",
            "training.warmup_steps=0", "training.batch_seconds=5", "+training.use_cpu=true",
            f"training.gradient_accumulation_steps={accumulation}",
            "training.dataloader_num_workers=0", "training.report_to=none",
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DIES_AT": str(dies_at)},
        )  # fmt: skip
        assert done.returncode == 0, "died on purpose" * (dies_at > 0) or done.stderr[-3000:]
        assert done.stdout.count("== stage train") == 1  # one of them speaks
        rows = read_log(tmp_path / name / "train" / LOG)
        loss = [row["loss"] for row in rows if "loss" in row]
        wer = [row["eval_loss"] for row in rows if "eval_loss" in row]
        return loss, wer, load_file(tmp_path / name / WEIGHTS)

    return run


def test_two_processes_are_one_with_twice_the_batches(losses):
    # 5 s is a budget at which one process and two cut the same batches
    one, two = losses("one", 1, 2), losses("two", 2, 1)
    assert len(one[0]) == 6 and len(one[1]) == 2
    assert two[0] == pytest.approx(one[0], abs=1e-5)
    assert two[1] == pytest.approx(one[1], abs=1e-5)
    for name, tensor in one[2].items():
        assert torch.allclose(two[2][name], tensor, atol=1e-5), name


@pytest.mark.long
@pytest.mark.long
def test_two_processes_continue_in_a_later_epoch(losses):
    """accelerate tells only the dataset which epoch it is when a run resumes."""
    whole = losses("whole", 2, 1, steps=10)
    with pytest.raises(AssertionError, match="died on purpose"):
        losses("killed", 2, 1, steps=10, dies_at=7)
    resumed = losses("killed", 2, 1, steps=10)
    assert resumed[0] == whole[0]
    for name, tensor in whole[2].items():
        assert torch.equal(resumed[2][name], tensor), name


def test_two_processes_share_a_stream(losses):
    loss, _, _ = losses("stream", 2, 1, streaming=True)
    assert len(loss) == 6


@pytest.mark.long
def test_the_shipped_config_launches_two_processes(tiny_bases, corpus, tmp_path):
    """With LoRA in HuBERT and gradient checkpointing, where DDP needs every gradient.

    Without `--cpu`: accelerate would start a single process.
    """
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0",
        "--config_file", str(CONFIGS.parent / "accelerate/ddp.yaml"),
        str(CONFIGS.parents[3] / "src" / "train.py"),
        f"model.encoder_model_name={tiny_bases / 'hubert'}", "model.tune=false",
        f"model.decoder_model_name={tiny_bases / 'decoder'}", "model.projector_hidden=32",
        f"data.train=[{{path: {corpus}}}]", "data.max_seconds=4", f"run.output_dir={out}",
        "training.max_steps=6", "training.eval_strategy=no", "training.logging_steps=1",
        "training.batch_seconds=5", "training.gradient_checkpointing=true",
        "training.dataloader_num_workers=0", "training.report_to=none", "+training.use_cpu=true",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_log(out / "train" / LOG)) == 6
    assert (out / "train/checkpoint-6/rng_state_1.pth").exists()  # of the second process
    assert (out / WEIGHTS).exists()


SHARDED = """
import os
import sys
from pathlib import Path
import torch
from conftest import TEXTS, babble, build_asr
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

mesh = init_device_mesh("cpu", (2,))
bases = Path(sys.argv[1])
processor, model = build_asr(bases / "whisper", bases / "decoder", lora="both")
batch = processor.collate([processor.features(babble(1.5, 3))], [processor.tokenize(TEXTS[0])])

def step():
    loss = model(**batch, decoder_loss_weight=1.0, ctc_loss_weight=0.2).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

loss, gradients = step()
model.zero_grad()
fully_shard(model, mesh=mesh)
assert isinstance(model, FSDPModule)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
sharded, parts = step()
assert abs(loss - sharded) < 1e-5, (loss, sharded)
assert set(parts) == set(gradients)
for name, gradient in gradients.items():
    assert torch.allclose(parts[name].full_tensor(), gradient, atol=1e-5), name
tensors = model.checkpoint(self_contained=False)
if torch.distributed.get_rank() == 0:
    model.save_pretrained(sys.argv[2], self_contained=False, state_dict=tensors)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.zero_()
torch.distributed.barrier()
model.load_tensors(load_file(sys.argv[2] + "/model.safetensors"), "the checkpoint")
model.zero_grad()
assert abs(step()[0] - loss) < 1e-5
print("sharded", len(gradients))
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads outlive the interpreter's end now and then, and abort it
"""


@pytest.mark.long
def test_the_model_can_be_sharded(tiny_bases, tmp_path):
    """FSDP2 on two processes: the same loss and gradients, saved and loaded again. (accelerate
    shards on GPUs alone.)"""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    path = tiny_bases.with_name("sharded.py")
    path.write_text(SHARDED)
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, str(path), str(tiny_bases), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sharded") == 2
