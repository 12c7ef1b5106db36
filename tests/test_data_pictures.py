"""Images kept decoded in memory, and loaders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import raw_fakes as fakes
from secateur.data import DataConfig, load_split, loader_options
from secateur.data.pictures import CachedPictures
from secateur.errors import DataError, InputError


@pytest.fixture
def office(tmp_path: Path) -> Path:
    """Three domains of two classes with ten images each, larger than they are used."""
    for domain in ("Art", "Clipart", "Real World"):
        for label in ("mug", "pen"):
            for i in range(10):
                key = f"{domain}/{label}/{i}.jpg"
                fakes.put(tmp_path / key, fakes.encoded(key, size=(40, 30)))
    return tmp_path


def test_cached_images_are_the_decoded_ones_bit_for_bit(office: Path) -> None:
    config = DataConfig(unseen="Clipart", image_size=16, augment=False)
    fresh, kept = load_split(office, config), load_split(office, DataConfig(**{**vars(config), "cache": True}))
    assert isinstance(kept.train, CachedPictures) and fresh.ids == kept.ids
    for part in ("train", "val", "test"):
        for i in range(len(getattr(fresh, part))):
            (one, label), (other, same) = getattr(fresh, part)[i], getattr(kept, part)[i]
            assert torch.equal(one, other) and label == same


def test_cached_images_need_no_files_any_more_and_share_their_memory(office: Path) -> None:
    split = load_split(office, DataConfig(unseen="Clipart", image_size=16, cache=True))
    for path in office.rglob("*.jpg"):
        path.unlink()
    assert split.train.source.data_ptr() == split.test.source.data_ptr()  # type: ignore[attr-defined]
    assert split.train.source.dtype == torch.uint8  # type: ignore[attr-defined]
    batches = DataLoader(split.train, 8, **loader_options(2))
    for _ in range(2):
        assert sum(len(labels) for _, labels in batches) == len(split.train)


def test_cached_training_images_are_augmented_by_torchs_seed(office: Path) -> None:
    train = load_split(office, DataConfig(unseen="Clipart", image_size=16, cache=True)).train
    torch.manual_seed(1)
    first, second = train[0][0], train[0][0]
    torch.manual_seed(1)
    assert torch.equal(train[0][0], first) and not torch.equal(first, second)
    assert first.shape == (3, 16, 16) and first.dtype == torch.float32
    assert torch.equal(train.plain()[0][0], train.plain()[0][0])


def test_a_cache_larger_than_the_memory_and_unreadable_images_are_refused(
    office: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(unseen="Clipart", image_size=16, cache=True)
    (office / "Art/pen/3.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot read image .*Art/pen/3.jpg"):
        load_split(office, config)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}[name])
    with pytest.raises(InputError, match=r"cache: 60 images of 16 x 16 need 0.0 GB, but this machine has 0.0 GB"):
        load_split(office, config)


def test_loader_options_keep_workers_alive_and_pin_memory_when_asked() -> None:
    assert loader_options(0) == {"num_workers": 0, "pin_memory": False}
    options = loader_options(3, pin_memory=True)
    assert options == {"num_workers": 3, "pin_memory": True, "persistent_workers": True, "prefetch_factor": 4}
