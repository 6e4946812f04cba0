"""What may differ on a GPU: pytest -m gpu.

Without one these tests are skipped; SMAE_REHEARSE=1 runs them on the CPU instead, as far as that goes.
"""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, records

import checkpoint
import data
import instances
import masks
import measures
import optim
import smae
from cropping import CropOptions, crop_batch
from detector import Detector
from instances import rle
from scenes import ObjectCrop, SceneBatches, apart
from segmenter import Segmenter
from tasks import Detection, Segmentation

pytestmark = pytest.mark.gpu
RUN = [*SMALL, *"--dataset shapes --max-images 64 --batch-size 16 --epochs 2 --guide-start 1 --workers 1".split()]
DETERMINISTIC = """
import sys, torch
torch.use_deterministic_algorithms(True, warn_only=True)  # under which attention's own kernels stay as they are
torch.backends.cuda.enable_flash_sdp(False)
torch.backends.cuda.enable_mem_efficient_sdp(False)
torch.backends.cuda.enable_cudnn_sdp(False)
torch.backends.cudnn.benchmark = False
import train
train.main(sys.argv[1:])
"""


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("SMAE_REHEARSE"):
        return torch.device("cpu")
    pytest.skip("there is no GPU here (SMAE_REHEARSE=1 runs this on the CPU)")


@pytest.fixture
def gpu(device) -> torch.device:
    if device.type == "cpu":
        pytest.skip("nothing to rehearse on a CPU")
    return device


def environment(device: torch.device) -> dict:
    """That of a process on the device, with kernels that give the same result each time."""
    deterministic = dict(CUBLAS_WORKSPACE_CONFIG=":4096:8", OMP_NUM_THREADS="1")
    return os.environ | deterministic | (dict(ACCELERATE_USE_CPU="true") if device.type == "cpu" else {})


def gradients(model: smae.SMAE, images, mask, dtype=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a training step and all its gradients, on the host."""
    model.zero_grad()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        loss = model(images, mask)
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.detach().cpu(), found.cpu()


def moved(mask: masks.Mask, device: torch.device) -> masks.Mask:
    return masks.Mask(*(part.to(device) for part in mask))


# ------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_training_step_agrees_with_float32_on_the_cpu(precision, device, small_model):
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 is for GPUs")
    images, mask = torch.randn(8, 3, 32, 32), masks.random_mask(8, 16)
    loss, expected = gradients(small_model, images, mask)
    dtype = dict(float32=None, bf16=torch.bfloat16, fp16=torch.float16)[precision]
    other = copy.deepcopy(small_model).to(device)
    found, vector = gradients(other, images.to(device), moved(mask, device), dtype)
    torch.testing.assert_close(found, loss, rtol=1e-4 if dtype is None else 0.02, atol=0)
    assert torch.cosine_similarity(vector, expected, dim=0) > (0.9999 if dtype is None else 0.99)


def test_the_fused_optimizer_steps_as_the_plain_one(device, small_model):
    plain, fused = copy.deepcopy(small_model).to(device), copy.deepcopy(small_model).to(device)
    optimizers = [optim.adamw(fused, 1e-3, 0.05, device.type)]
    groups = [{**group, "fused": False} for group in optimizers[0].param_groups]
    for group, other in zip(groups, optimizers[0].param_groups):
        names = {id(parameter): name for name, parameter in fused.named_parameters()}
        group["params"] = [plain.get_parameter(names[id(parameter)]) for parameter in other["params"]]
    optimizers.append(torch.optim.AdamW(groups))
    images = torch.randn(8, 3, 32, 32, device=device)
    for step in range(5):
        mask = masks.random_mask(8, 16, noise=torch.rand(8, 16, generator=torch.Generator().manual_seed(step)))
        for model, optimizer in zip((fused, plain), optimizers):
            gradients(model, images, moved(mask, device))
            optimizer.step()
    start, ends = small_model.to(device), [torch.nn.utils.parameters_to_vector(m.parameters()) for m in (fused, plain)]
    taken = ends[0] - torch.nn.utils.parameters_to_vector(start.parameters())
    assert (ends[0] - ends[1]).norm() < 0.01 * taken.norm()  # where gradients vanish, Adam follows their rounding


def test_pinned_copies_arrive_whole(device):
    values = [np.full(2**18, number, np.float32) for number in range(50)]
    copies = [data.to_device(each, device) for each in values]  # all under way at once
    assert [each.mean().item() for each in copies] == list(range(50))
    assert data.to_device(torch.arange(3).expand(2, 3), device).tolist() == [[0, 1, 2]] * 2


def test_a_compiled_model_gives_the_same_loss(device, small_model):
    model = small_model.to(device)
    images, mask = torch.randn(4, 3, 32, 32, device=device), moved(masks.random_mask(4, 16), device)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(images, mask), model(images, mask), rtol=1e-4, atol=1e-5)


def test_cuts_and_relevance_are_those_of_the_cpu(device):
    features = torch.randn(16, 64, 32) + (torch.rand(16, 64, 1) < 0.3) * 2 * torch.randn(32)
    found = [masks.find_object(features.to(place), (8, 8)) for place in (torch.device("cpu"), device)]
    (expected, sides), (relevance, others) = found
    same = (sides == others.cpu()).all(dim=1)
    assert (sides == others.cpu()).float().mean() > 0.99
    torch.testing.assert_close(relevance.cpu()[same], expected[same], rtol=1e-3, atol=1e-4)


def test_measures_are_those_of_the_cpu(device):
    objects, features, pixels = torch.rand(4, 8, 6), torch.randn(5, 16, 8), torch.randn(5, 16, 12)
    assert torch.equal(measures.off_centre(objects.to(device)).cpu(), measures.off_centre(objects))
    shares = measures.variance_shares(features, pixels)
    assert measures.variance_shares(features.to(device), pixels.to(device)) == pytest.approx(shares, rel=1e-3)
    values, units = torch.rand(6), torch.tensor([0, 0, 1, 1, 2, 2])
    expected = measures.mean_and_error(values, units)
    assert measures.mean_and_error(values.to(device), units.to(device)) == pytest.approx(expected, rel=1e-4)


def test_crops_of_batches_are_those_of_the_cpu(device):
    images = torch.randint(0, 256, (8, 3, 48, 64), dtype=torch.uint8)
    crops = CropOptions(32, (0.2, 1.0), 0, 1).crops(np.array([(48, 64)] * 8), 1, np.arange(8))
    boxes, flips = torch.from_numpy(crops.boxes), torch.from_numpy(crops.flips)
    expected = crop_batch(images, boxes, flips, 32)
    found = crop_batch(images.to(device), boxes.to(device), flips.to(device), 32).cpu()
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", [Segmenter, Detector])
def test_dense_tasks_train_and_predict(kind, device, small_model):
    images = torch.randn(2, 3, 64, 64, device=device)
    if kind is Segmenter:
        model = Segmenter(small_model, ["a", "b"], "upernet", side=64, width=16).to(device).train()
        loss = model(images, torch.randint(0, 2, (2, 64, 64), device=device))
    else:
        model = Detector(small_model, ["a"], side=64, width=16, window=2, rois=16, proposals=16).to(device).train()
        target = dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([0]), masks=torch.ones(1, 64, 64))
        target = {name: value.to(device) for name, value in target.items()}
        loss = model(images, [(64, 64)] * 2, [target] * 2)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    model.eval()
    task = Segmentation(model) if kind is Segmenter else Detection(model)
    scene = task.prepare(dict(image=torch.randint(0, 256, (3, 50, 80), dtype=torch.uint8)))
    with torch.autocast(device.type, torch.bfloat16):
        found = task.predict(scene)
    if kind is Segmenter:
        assert found.shape == (50, 80)
    else:
        assert all(rle.area(each["segmentation"]) >= 0 and len(each["bbox"]) == 4 for each in found)


def test_pinned_scenes_arrive_with_and_without_objects(device):
    scenes = instances.load_instances("shapes:easy", "test").select(range(8))
    batches = SceneBatches(scenes, ObjectCrop(64, (1.0, 1.0)), 4, workers=1, device=device)
    for batch in batches.epoch(1):
        parts = apart(batch.targets)
        assert batch.images.device.type == device.type and len(parts) == 4
        assert all(part["boxes"].device.type == device.type for part in parts)
    batches.close()


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("extra", ["", "--preload", "--guide cached", "--guide-from centre", "--precision fp16"])
def test_a_run_resumed_in_mid_epoch_ends_as_one_that_was_not_stopped(extra, device, tmp_path):
    if "fp16" in extra and device.type == "cpu":
        pytest.skip("fp16 is for GPUs")

    def train(*arguments):
        command = [sys.executable, "-c", DETERMINISTIC, *RUN, *extra.split(), *arguments]
        done = subprocess.run([str(x) for x in command], cwd=ROOT, env=environment(device), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]

    train("--save-every-steps", 3, "--keep", 9, "--out", tmp_path / "whole")
    train("--resume", tmp_path / "whole" / "checkpoint-00000006", "--out", tmp_path / "resumed")
    states = [checkpoint.read(checkpoint.folders(tmp_path / name)[0])["model"] for name in ("whole", "resumed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [row["loss"] for row in records(tmp_path / "whole")] == [
        row["loss"] for row in records(tmp_path / "resumed")
    ]


def test_one_process_under_torchrun_trains_as_without(device, tmp_path):
    """On a GPU it talks to itself through NCCL."""
    for name, launch in (("plain", []), ("torchrun", ["-m", "torch.distributed.run", "--standalone"])):
        command = [sys.executable, *launch, "train.py", *RUN, "--precision", "no", "--out", tmp_path / name]
        done = subprocess.run([str(x) for x in command], cwd=ROOT, env=environment(device), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
    losses = [records(tmp_path / name)[-1]["loss"] for name in ("plain", "torchrun")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_micro_batches_need_less_memory(gpu):
    model = smae.SMAE(**smae.PRESETS["small"], image_size=224, patch_size=16).to(gpu)
    peaks = []
    for parts in (1, 4):
        torch.cuda.reset_peak_memory_stats()
        for images in torch.randn(64, 3, 224, 224).chunk(parts):
            model(images.to(gpu), masks.random_mask(len(images), 196, device=gpu)).backward()
        model.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.6 * peaks[0]
