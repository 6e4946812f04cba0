"""The scripts on a device that is not the CPU, for want of a GPU: see pretended_device.py."""

import os
import subprocess
import sys

import pytest
from helpers import QUICK, ROOT
from torch.utils import backend_registration

import smae

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
FEW = "--dataset shapes --max-images 16 --batch-size 8 --workers 0".split()
REFUSED = """
import torch
x = torch.ones(3).to("pretended:0")
refused = [lambda: x + torch.ones(3), lambda: torch.ones(3)[x.long()], x.numpy, lambda: torch.ones(2).add_(x.sum())]
refused += [lambda: x.index_select(0, torch.tensor([0])), x.double, lambda: torch.zeros(2).double().to(x.device)]
refused.append(lambda: torch.rand(3, device=x.device, generator=torch.Generator()))
for number, operation in enumerate(refused):
    try:
        operation()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit(f"{number} was not refused")
assert torch.equal((x + 1).cpu(), torch.full((3,), 2.0)) and (x * 2).device == x.device and x.sum() == 3
"""

MASKS = """
import itertools, torch
import masks
torch.manual_seed(0)
features, noise = torch.randn(4, 64, 16) + 3 * (torch.rand(4, 64, 1) < 0.3) * torch.randn(16), torch.rand(4, 64)
on_device = features.to("pretended:0"), noise.to("pretended:0")

def of_both(make):
    for found, expected in zip(make(*on_device), make(features, noise)):
        assert found.device.type == "pretended"
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)

for rule, scoring in itertools.product(("border", "small", "peak"), ("contrast", "foreground")):
    of_both(lambda x, noise: masks.find_object(x, (8, 8), rule, scoring))
for hint in ("random", "similar", "none"):
    of_both(lambda x, noise: masks.self_guided_mask(x, (8, 8), hint=hint, noise=noise))
of_both(lambda x, noise: masks.amt_mask(noise, noise=noise))
of_both(lambda x, noise: [masks.cluster(x, 4)])
masks.DENSE = 4 * 64 * 16
of_both(lambda x, noise: masks.find_object(x, (8, 8)))
assert masks.random_mask(4, 64, device=on_device[0].device).visible.device.type == "pretended"
"""


@pytest.fixture
def checkpoint(small_model, tmp_path):
    smae.save(small_model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rehearse(*arguments, processes: int = 1) -> str:
    """The output of a script on the pretended device."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["tests/pretended_device.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_pretended_device_refuses_what_cuda_refuses_and_makes_masks_where_the_features_are(tmp_path):
    (tmp_path / "both.py").write_text(REFUSED + MASKS)
    rehearse(tmp_path / "both.py")


STEPS = """
import importlib, sys
from pretended_device import waits
name, out, *arguments = sys.argv[1:]
command, counts = importlib.import_module(name), []
for images in (32, 64):  # 2 and 4 steps an epoch: losses are read every tenth step
    waits.clear()
    command.main([*arguments, "--max-images", images, "--out", f"{out}/{images}"])
    counts.append(waits.copy())
assert any("run.py" in line for line in counts[0]), counts  # the epoch's loss is read
assert not counts[1] - counts[0], counts[1] - counts[0]  # some wait once in a process
"""


@pytest.mark.parametrize("name", ["train", "eval"])
def test_training_steps_do_not_wait_for_the_device(name, checkpoint, tmp_path):
    (tmp_path / "steps.py").write_text(STEPS)
    arguments = [*QUICK, "--guide-start", 1]
    if name == "eval":
        arguments = ["finetune", "--checkpoint", checkpoint, "--epochs", 1, "--workers", 0]
    options = ["--dataset", "shapes", "--batch-size", 16, "--precision", "bf16"]
    rehearse(tmp_path / "steps.py", name, tmp_path, *arguments, *options)


TRAIN = ["train.py", *QUICK, *FEW]
COMMANDS = {
    "cached": [*TRAIN, "--guide", "cached", "--guide-start", 1, "--preload", "--probe-every", 2],
    "amt": [*TRAIN, "--mask", "amt", "--guide", "cached", "--guide-start", 1, "--preload", "host"],
    "column": [*TRAIN, "--guide", "cached", "--guide-from", "column:mask", "--accumulate", 2],
    "auto": [*TRAIN, "--guide-start", "auto", "--log-with", "tensorboard"],
    "knn": ["eval.py", "knn", *FEW],
    "linear": ["eval.py", "linear", *FEW],
    "linear-mae": ["eval.py", "linear", "--recipe", "mae", "--epochs", 1, *FEW],
    "finetune": ["eval.py", "finetune", "--epochs", 1, *FEW],
    "embed": ["eval.py", "embed", *FEW],
    "reconstruct": ["eval.py", "reconstruct", *FEW],
    "segment": ["dense.py", "segment", "--epochs", 1, *FEW],
    "upernet": ["dense.py", "segment", "--head", "upernet", "--epochs", 1, *FEW],
    "detect": ["dense.py", "detect", "--epochs", 1, *FEW],
    "report": ["analyze.py", "report", "--dataset", "shapes", "--max-images", 16],
    "masks": ["analyze.py", "masks", "--dataset", "shapes", "--max-images", 16],
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_keep_their_tensors_on_the_device(name, processes, checkpoint, tmp_path):
    if processes == 2 and name in ("report", "masks"):
        pytest.skip("one process is all that analyze.py uses")
    if processes == 2 and name == "upernet":
        pytest.skip("SyncBatchNorm has kernels for CUDA alone")
    command = [*COMMANDS[name], "--out", tmp_path / "out"]
    command += [] if command[0] == "train.py" else ["--checkpoint", checkpoint]
    rehearse(*command, processes=processes)
