import numpy as np
import pytest
import scipy.stats
import torch
from helpers import picture
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

import pixels
from cropping import CropOptions, RandomStream, crop_batch, random_crops, uniform


def test_random_numbers_are_uniform_and_depend_on_key_and_index_only():
    numbers = uniform((3, 1), np.arange(2000), 50)
    assert numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    assert scipy.stats.kstest(numbers.ravel(), "uniform").pvalue > 0.001
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.08
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.08
    assert np.array_equal(uniform((3, 1), np.array([7, 1999]), 50), numbers[[7, 1999]])
    for key in ((3, 2), (4, 1), (1, 3), (3, 1, 0)):
        assert abs(np.corrcoef(uniform(key, np.arange(2000), 1)[:, 0], numbers[:, 0])[0, 1]) < 0.08


def test_random_numbers_are_those_of_the_first_version():
    """Other numbers would end every run elsewhere, resumed ones in the middle."""
    assert list(RandomStream) == [0, 1, 2, 3]
    found = uniform((1, 2, RandomStream.MASK), np.array([0, 5]), 3) * 2**24
    assert found.astype(int).tolist() == [[5408458, 1089901, 8238607], [7185816, 14004662, 2905075]]


@pytest.mark.parametrize("size", [(64, 64), (30, 200), (500, 100)])
def test_crops_are_those_of_torchvision_in_distribution(size):
    count = 3000
    boxes, flips = random_crops(np.tile(size, (count, 1)), uniform((0,), np.arange(count), 23))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= np.array(size)).all()
    torch.manual_seed(0)
    canvas = torch.empty(3, *size)
    peer = np.array([RandomResizedCrop.get_params(canvas, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    for column in range(4):
        assert scipy.stats.ks_2samp(boxes[:, column], peer[:, column]).pvalue > 0.001, column
    assert abs(flips.mean() - 0.5) < 0.05


def test_a_picture_too_slim_for_any_draw_gets_its_central_crop():
    sizes = np.array([[1, 10000], [10000, 1], [1, 1]])
    boxes, _ = random_crops(sizes, np.full((3, 23), 0.5, np.float32))
    assert boxes.tolist() == [[0, 4999, 1, 1], [4999, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("size", [16, 64])
def test_batched_crops_equal_those_of_pil(size):
    count = 30
    images = [picture(40, 40, seed=i) for i in range(count)]
    crops = random_crops(np.full((count, 2), 40), uniform((0,), np.arange(count), 23))
    expected = torch.stack([pixels.crop(image, *how, size) for image, *how in zip(images, *crops)])
    stack = torch.stack([TF.pil_to_tensor(image) for image in images])
    result = crop_batch(stack, torch.from_numpy(crops.boxes), torch.from_numpy(crops.flips), size)
    assert result.dtype == torch.uint8
    assert (result.int() - expected.int()).abs().max() <= 2  # PIL rounds after each of its two passes
    assert crops.flips.any() and not crops.flips.all()


def test_without_an_epoch_pictures_stay_whole_and_are_not_augmented():
    options = CropOptions(16, (0.2, 1.0), seed=0, bad_limit=1, augment=lambda image: 255 - image)
    sizes, indices = np.array([[30, 40], [20, 10]]), np.arange(2)
    crops = options.crops(sizes, None, indices)
    assert crops.boxes.tolist() == [[0, 0, 30, 40], [0, 0, 20, 10]] and not crops.flips.any()
    assert crops.as_fractions(sizes).boxes.tolist() == [[0, 0, 1, 1]] * 2
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert options.augmented(images, None, indices) is images
    assert (options.augmented(images, 1, indices) == 255).all()


def test_augmenting_leaves_the_global_generator_alone():
    options = CropOptions(16, (0.2, 1.0), seed=0, bad_limit=1, augment=lambda image: torch.rand(3))
    before = torch.get_rng_state()
    first = options.augmented(torch.zeros(4, 3), 1, np.arange(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(options.augmented(torch.zeros(2, 3), 1, np.array([3, 1])), first[[3, 1]])
    assert not torch.equal(options.augmented(torch.zeros(4, 3), 2, np.arange(4)), first)
