"""Augmentation: what comes out, that it depends on torch's generator alone, and mixing recomputed pixel by pixel."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

import secateur
from secateur.data import load_split
from secateur.errors import InputError
from secateur.experiments.base_models import base_model
from secateur.training.augmentation import AugmentConfig, batch_mixing, eval_transform, train_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
ZERO, HALF, ONE = (0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)


def picture(width: int = 48, height: int = 36) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalised(pixels: np.ndarray) -> Tensor:
    """Returns H x W x 3 bytes as a normalised tensor, by hand."""
    values = (pixels.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    return torch.tensor(values.transpose(2, 0, 1)).float()


PLAIN = AugmentConfig(crop_scale=(1.0, 1.0), hflip=0.0, color_jitter=0.0, grayscale=0.0)
STRONG = AugmentConfig.paper(random_erasing=0.5)


# --- single images ----------------------------------------------------------------------------------------------


def test_evaluation_resizes_straight_to_the_size() -> None:
    image = picture()
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    found = eval_transform(AugmentConfig(), 16, MEAN, STD)(image)
    assert found.shape == (3, 16, 16)
    assert torch.allclose(found, normalised(expected), atol=1e-5)


def test_evaluation_can_crop_the_middle() -> None:
    image = picture(64, 32)
    expected = np.asarray(image)[2:30, 18:46]
    found = eval_transform(AugmentConfig(eval_crop=0.875), 28, MEAN, STD)(image)
    assert torch.allclose(found, normalised(expected), atol=1e-5)


def test_tensors_of_bytes_are_taken_as_images() -> None:
    image = picture()
    as_tensor = torch.tensor(np.asarray(image).transpose(2, 0, 1).copy())
    transform = eval_transform(AugmentConfig(), 16, MEAN, STD)
    assert torch.equal(transform(as_tensor), transform(image))


def test_a_flip_is_all_that_a_flip_does() -> None:
    image = picture(16, 16)
    straight = eval_transform(AugmentConfig(), 16, MEAN, STD)(image)
    found = train_transform(replace(PLAIN, hflip=1.0), 16, MEAN, STD)(image)
    assert torch.allclose(found, straight.flip(-1), atol=1e-5)
    assert torch.allclose(train_transform(PLAIN, 16, MEAN, STD)(image), straight, atol=1e-5)


def test_grey_is_grey_and_crops_are_as_large_as_asked() -> None:
    found = train_transform(replace(PLAIN, grayscale=1.0), 16, ZERO, ONE)(picture(16, 16))
    assert torch.equal(found[0], found[1])
    slope = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3)))
    transform = train_transform(replace(PLAIN, crop_scale=(0.25, 0.25)), 20, ZERO, ONE)
    for _ in range(20):
        columns = transform(slope)[0, 0] * 255
        width = float(columns[-1] - columns[0]) / 19 * 20
        assert 100 * 0.75**0.5 - 4 < width < 100 / 0.75**0.5 + 4


def test_random_erasing_puts_noise_into_one_rectangle() -> None:
    clean = train_transform(PLAIN, 32, MEAN, STD)(picture(32, 32))
    found = train_transform(replace(PLAIN, random_erasing=1.0), 32, MEAN, STD)(picture(32, 32))
    changed = (found != clean).any(dim=0)
    rows, columns = changed.any(dim=1).nonzero()[:, 0], changed.any(dim=0).nonzero()[:, 0]
    box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box.all()
    assert 0.02 * 0.8 < box.numel() / 1024 < 1 / 3 * 1.2


def test_every_random_number_comes_from_torch() -> None:
    transform = train_transform(STRONG, 24, MEAN, STD)
    torch.manual_seed(5)
    first = [transform(picture()) for _ in range(8)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(5)
    second = [transform(picture()) for _ in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple(image.flatten()[:40].tolist()) for image in first}) == 8


def test_the_highest_magnitude_leaves_something_of_every_image() -> None:
    transform = train_transform(replace(PLAIN, rand_magnitude=10), 8, MEAN, STD)
    assert all(transform(picture(8, 8)).isfinite().all() for _ in range(400))


def test_generators_of_others_are_left_alone() -> None:
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.random()
    random.seed(3)
    np.random.seed(3)
    train_transform(STRONG, 24, MEAN, STD)(picture())
    mixing = batch_mixing(STRONG, 3)
    assert mixing is not None
    mixing(torch.zeros(4, 3, 8, 8), torch.arange(4) % 3)
    assert (random.random(), np.random.random()) == expected


def test_evaluation_is_the_same_every_time_and_moves_no_generator() -> None:
    transform = eval_transform(STRONG, 24, MEAN, STD)
    state = torch.get_rng_state()
    assert torch.equal(transform(picture()), transform(picture()))
    assert torch.equal(torch.get_rng_state(), state)


def test_transforms_travel_to_other_processes() -> None:
    transform = pickle.loads(pickle.dumps(train_transform(STRONG, 24, MEAN, STD)))
    assert transform(picture()).shape == (3, 24, 24)


# --- batches ----------------------------------------------------------------------------------------------------


def marked(count: int) -> Tensor:
    """Returns images whose pixels all hold their position in the batch."""
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()


@pytest.mark.parametrize("count", [4, 5])
def test_mixup_mixes_images_and_targets_in_the_same_proportion(count: int) -> None:
    mixing = batch_mixing(AugmentConfig(mixup=1.0), 10, label_smoothing=0.1)
    assert mixing is not None
    before = marked(count)
    images, targets = mixing(before, torch.arange(count))
    assert torch.equal(before, marked(count))
    share = (targets[0, 0] - 0.01) / 0.9
    smoothed = torch.eye(10) * 0.9 + 0.01
    assert 0 < share < 1
    for i in range(4):
        assert torch.allclose(images[i], torch.full((3, 8, 8), float(share * i + (1 - share) * (3 - i))), atol=1e-5)
        assert torch.allclose(targets[i], share * smoothed[i] + (1 - share) * smoothed[3 - i], atol=1e-6)
    if count == 5:
        assert torch.equal(images[4], before[4])
        assert torch.allclose(targets[4], smoothed[4])


def test_cutmix_gives_each_class_its_share_of_pixels() -> None:
    mixing = batch_mixing(AugmentConfig(cutmix=1.0), 10)
    assert mixing is not None
    shares = set()
    for _ in range(10):
        images, targets = mixing(marked(4), torch.arange(4))
        for i in range(4):
            own, other = (float((images[i, 0] == value).float().mean()) for value in (i, 3 - i))
            assert own + other == 1.0
            assert targets[i, i].item() == pytest.approx(own, abs=1e-6)
            assert targets[i, 3 - i].item() == pytest.approx(other, abs=1e-6)
            shares.add(own)
    assert len(shares) > 3


def test_mixing_repeats_with_torchs_generator() -> None:
    mixing = batch_mixing(STRONG, 10)
    assert mixing is not None
    results = []
    for numpy_seed in (0, 1):
        torch.manual_seed(9)
        np.random.seed(numpy_seed)
        results.append([mixing(marked(4), torch.arange(4))[0] for _ in range(6)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len({float(images.sum(dim=(1, 2, 3))[0]) for images in results[0]}) > 3


def test_a_single_image_stays_as_it_is() -> None:
    mixing = batch_mixing(AugmentConfig(mixup=1.0), 3)
    assert mixing is not None
    images, targets = mixing(marked(1), torch.tensor([2]))
    assert torch.equal(images, marked(1))
    assert targets.tolist() == [[0.0, 0.0, 1.0]]


def test_no_mixing_is_none() -> None:
    assert batch_mixing(AugmentConfig(), 10) is None
    assert batch_mixing(AugmentConfig(mixup=1.0, mix_probability=0.0), 10) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"hflip": 1.5}, "hflip is a probability"),
        ({"color_jitter": 0.6}, "color_jitter"),
        ({"rand_magnitude": 11}, "rand_magnitude"),
        ({"mixup": -1.0}, "mixup"),
        ({"eval_crop": 0.0}, "eval_crop"),
        ({"interpolation": "bilinar"}, "did you mean 'bilinear'"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AugmentConfig(**changes)  # type: ignore[arg-type]


def test_sizes_classes_and_smoothing_are_checked() -> None:
    with pytest.raises(InputError, match="size"):
        train_transform(AugmentConfig(), 0, MEAN, STD)
    with pytest.raises(InputError, match="num_classes"):
        batch_mixing(AugmentConfig(mixup=1.0), 0)
    with pytest.raises(InputError, match="label_smoothing"):
        batch_mixing(AugmentConfig(mixup=1.0), 3, label_smoothing=1.0)


# --- on digits-dg -----------------------------------------------------------------------------------------------


def test_a_cut_model_trains_on_augmented_and_mixed_digits() -> None:
    split = load_split("digits-dg")
    chosen = range(0, len(split.train), 24)
    pixels = torch.stack([((split.train[i][0] * 0.5 + 0.5) * 255).round().byte() for i in chosen])
    labels = split.train.labels[list(chosen)]
    model = base_model("vit_digits", "thick")
    secateur.prune_(model, torch.zeros(1, 3, 32, 32), criterion="l2", ratio=0.4, scope="local")
    config = AugmentConfig(hflip=0.0, rand_magnitude=5, random_erasing=0.25, mixup=0.2, cutmix=1.0)
    transform, mixing = train_transform(config, 32, HALF, HALF), batch_mixing(config, 10, 0.1)
    assert mixing is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        images, targets = mixing(torch.stack([transform(image) for image in pixels]), labels)
        loss = cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])
