"""The protocols, splits as files, and the proof that no image of the unseen domain gets where it must not."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import raw_fakes as fakes
from secateur.data import (
    CROSS_VALIDATION,
    DOMAINBED,
    IID_POOLED,
    LEAVE_ONE_OUT,
    OFFICIAL,
    TRAINING_DOMAIN,
    WITHIN_TRAIN,
    DataConfig,
    Split,
    cross_validation,
    load_split,
    prepare,
    save_split,
)
from secateur.data.protocol import Collection, LabelledImages, TensorImages, split_collection
from secateur.errors import DataError, InputError
from secateur.training import FinetuneConfig, calibration_batches, evaluate, finetune_

DOMAINS = fakes.PACS_DOMAINS


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake of PACS, prepared: four domains of 21 images."""
    folder = tmp_path_factory.mktemp("pacs")
    expected = fakes.pacs(folder / "raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sync", lambda: None)
        prepare(fakes.fitting("pacs", expected), folder / "raw", folder / "PACS")
    return folder / "PACS"


def config(**changes: object) -> DataConfig:
    return replace(DataConfig(image_size=8), **changes)  # pyright: ignore[reportArgumentType]


def parts_of(split: Split) -> dict[str, LabelledImages]:
    parts = {"train": split.train, "val": split.val, "test": split.test}
    return parts | ({"oracle": split.oracle} if split.oracle is not None else {})


# --- DomainBed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", [0, 3])
def test_domainbed_holds_out_the_same_images_as_domainbed(pacs: Path, trial: int) -> None:
    split = load_split(pacs, config(split="domainbed", unseen="cartoon", seed=trial))
    expected: dict[str, set[str]] = {"train": set(), "val": set(), "test": set(), "oracle": set()}
    for number, domain in enumerate(sorted(p.name for p in pacs.iterdir() if p.is_dir())):
        # torchvision's ImageFolder: classes by name, in each the files by name.
        found = sorted((pacs / domain).glob("*/*"), key=lambda path: (path.parent.name, path.name))
        files = [path.relative_to(pacs).as_posix() for path in found]
        digest = hashlib.md5(f"({trial}, {number})".encode()).hexdigest()
        order = np.arange(len(files))
        np.random.RandomState(int(digest, 16) % 2**31).shuffle(order)
        held, kept = ("oracle", "test") if domain == "cartoon" else ("val", "train")
        expected[held] |= {files[i] for i in order[: len(files) // 5]}
        expected[kept] |= {files[i] for i in order[len(files) // 5 :]}
    assert {name: set(part.ids) for name, part in parts_of(split).items()} == expected
    assert split.protocol == DOMAINBED and split.selection == TRAINING_DOMAIN


def test_domainbed_holds_out_the_same_images_of_a_domain_whoever_is_unseen(pacs: Path) -> None:
    held = {unseen: load_split(pacs, config(split="domainbed", unseen=unseen)) for unseen in ("photo", "sketch")}
    assert {i for i in held["photo"].val.ids if i.startswith("sketch/")} == set(held["sketch"].oracle.ids)  # type: ignore[union-attr]


def test_cross_validation_over_domains_sees_nothing_of_the_target(pacs: Path) -> None:
    whole = load_split(pacs, config(split="domainbed", unseen="photo"))
    inner = cross_validation(pacs, config(split="domainbed", unseen="photo"))
    assert list(inner) == ["art_painting", "cartoon", "sketch"]
    for domain, split in inner.items():
        assert set(split.train.ids) == {i for i in whole.train.ids if not i.startswith(f"{domain}/")}
        assert set(split.val.ids) == {i for i in whole.train.ids if i.startswith(f"{domain}/")}
        assert set(split.test.ids) == {i for i in whole.val.ids if i.startswith(f"{domain}/")}
        assert not [i for part in parts_of(split).values() for i in part.ids if i.startswith("photo/")]
        assert split.selection == CROSS_VALIDATION and domain in split.protocol and "photo" in split.protocol
        assert split.train.augmented and not split.val.augmented
        fold = load_split(pacs, config(split="domainbed", unseen="photo", without=domain))
        assert fold.ids == split.ids and fold.protocol == split.protocol
    with pytest.raises(InputError, match="it needs split='domainbed' and unseen"):
        cross_validation(pacs, config(unseen="photo"))
    with pytest.raises(InputError, match="it needs split='domainbed' and unseen"):
        config(unseen="photo", without="sketch")
    with pytest.raises(InputError, match="'photo' is the unseen domain"):
        config(split="domainbed", unseen="photo", without="photo")
    with pytest.raises(InputError, match="unknown source domain 'scetch'; did you mean 'sketch'"):
        load_split(pacs, config(split="domainbed", unseen="photo", without="scetch"))


# --- the paper, and official parts --------------------------------------------------------------------------------


def images_of(counts: dict[str, int], num_classes: int) -> TensorImages:
    """Returns empty images with so many in each domain."""
    domains = [domain for domain, count in counts.items() for _ in range(count)]
    labels = torch.arange(len(domains)) % num_classes
    ids = [f"{domain}/{label}/{i}" for i, (domain, label) in enumerate(zip(domains, labels.tolist(), strict=True))]
    return TensorImages(torch.zeros(len(ids), 1, 1, 1), labels, ids, domains, size=1)


def test_the_papers_pacs_has_the_published_sizes_and_is_labelled() -> None:
    counts = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}
    pooled = Collection("pacs", images_of(counts, 7), fakes.PACS_CLASSES)
    split = split_collection(pooled, DataConfig(split="paper"))
    assert (len(split.train), len(split.val), len(split.test)) == (7279, 1725, 987)
    assert split.protocol.startswith(IID_POOLED) and "2504.04196" in split.protocol and split.unseen is None
    shares = Counter(split.test.domains)
    assert all(abs(shares[d] - 987 * n / 9991) <= 7 for d, n in counts.items())
    with pytest.raises(InputError, match="leaves out no domain of pacs"):
        split_collection(pooled, DataConfig(split="paper", unseen="photo"))


def test_the_papers_office_home_leaves_out_clipart() -> None:
    counts = {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357}
    collection = Collection("office_home", images_of(counts, 65), tuple(map(str, range(65))))
    split = split_collection(collection, DataConfig(split="paper"))
    assert split.unseen == "Clipart" and len(split.test) == 4365 and set(split.test.domains) == {"Clipart"}
    assert split.protocol == f"{LEAVE_ONE_OUT}, as in arXiv 2504.04196"
    assert abs(len(split.val) - 0.2 * (2427 + 4439 + 4357)) <= 1
    with pytest.raises(InputError, match="leaves out Clipart of office_home, but unseen='Art'"):
        split_collection(collection, DataConfig(split="paper", unseen="Art"))
    with pytest.raises(InputError, match="split 'paper' is for pacs and office_home"):
        split_collection(replace(collection, name="vlcs"), DataConfig(split="paper"))


def test_official_parts_are_tested_on_or_left_alone() -> None:
    cifar = Collection("cifar10", images_of({"train": 50000, "test": 10000}, 10), tuple("0123456789"), official=True)
    split = split_collection(cifar, DataConfig(split="official"))
    assert (len(split.train), len(split.val), len(split.test)) == (45000, 5000, 10000)
    assert set(split.test.domains) == {"test"} and split.protocol == OFFICIAL and split.domains == ("train",)
    assert set(Counter(split.val.labels.tolist()).values()) == {500}
    tiny = Collection("tiny_imagenet", images_of({"train": 100000, "val": 10000}, 200), ("x",) * 200, official=True)
    split = split_collection(tiny, DataConfig(split="within_train"))
    assert (len(split.train), len(split.val), len(split.test)) == (80000, 10000, 10000)
    assert split.protocol == WITHIN_TRAIN and {d for p in parts_of(split).values() for d in p.domains} == {"train"}
    with pytest.raises(InputError, match="cifar10 has official parts: split 'leave_one_out' is not for it, 'official'"):
        split_collection(cifar, DataConfig(unseen="test"))
    with pytest.raises(InputError, match="pacs has domains: split 'official' is not for it"):
        split_collection(replace(cifar, name="pacs", official=False), DataConfig(split="official"))


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["pacs", "digits-dg"])
def test_stored_splits_come_back_the_same_whatever_the_seed(pacs: Path, data: str, tmp_path: Path) -> None:
    where, unseen = (pacs, "sketch") if data == "pacs" else (data, "sketch")
    split = load_split(where, config(split="domainbed", unseen=unseen, seed=2))
    save_split(split, tmp_path / "split.json")
    again = load_split(where, config(seed=9), stored=tmp_path / "split.json")
    for name, part in parts_of(split).items():
        other = parts_of(again)[name]
        assert part.ids == other.ids and part.augmented == other.augmented == (name == "train")
        assert torch.equal(part.labels, other.labels)
    for name in ("classes", "domains", "unseen", "protocol", "selection", "data", "checksum", "seed", "duplicates"):
        assert getattr(split, name) == getattr(again, name), name
    plain = load_split(where, config(augment=False), stored=tmp_path / "split.json")
    assert torch.equal(plain.val[0][0], split.val[0][0]) and not plain.train.augmented


def test_stored_splits_of_other_images_and_mended_files_are_refused(pacs: Path, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    split = load_split(pacs, config(unseen="sketch"))
    save_split(split, path)
    good = json.loads(path.read_text())
    target, source = split.test.ids[0], split.train.ids[0]

    def refused(message: str, **changes: object) -> None:
        path.write_text(json.dumps(good | changes))
        with pytest.raises(DataError, match=message):
            load_split(pacs, config(), stored=path)

    parts = good["parts"]
    refused("sketch/.*, an image of the unseen domain 'sketch'", parts=parts | {"train": [target], "test": []})
    refused("an image is in more than one part", parts=parts | {"val": [source]})
    refused("is no image of pacs", parts=parts | {"val": ["photo/dog/none.jpg"]})
    refused("other images; split it anew", checksum="0" * 64)
    refused("has format 7", format=7)
    refused("missing, corrupt or no split", parts=[])
    path.write_text("{")
    with pytest.raises(DataError, match="missing, corrupt or no split"):
        load_split(pacs, config(), stored=path)


def test_a_split_with_target_images_in_training_or_validation_cannot_be_made(pacs: Path) -> None:
    split = load_split(pacs, config(unseen="sketch"))
    with pytest.raises(DataError, match="the train part holds sketch/"):
        replace(split, train=split.test)
    with pytest.raises(DataError, match="the val part holds sketch/"):
        replace(split, val=split.test)


# --- no image of the unseen domain gets where it must not -----------------------------------------------------------


@contextmanager
def opened_files() -> Iterator[list[Path]]:
    """Collects the path of every image file that is opened."""
    opened: list[Path] = []
    original = Image.open

    def spy(file: Path, *args: object, **kwargs: object) -> Image.Image:
        opened.append(Path(file))
        return original(file, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", spy)
        yield opened


@pytest.mark.parametrize("protocol", ["leave_one_out", "domainbed"])
@pytest.mark.parametrize("unseen", DOMAINS)
def test_parts_are_apart_by_path(pacs: Path, unseen: str, protocol: str) -> None:
    split = load_split(pacs, config(split=protocol, unseen=unseen))
    paths = {name: [(pacs / i).resolve(strict=True) for i in part.ids] for name, part in parts_of(split).items()}
    flat = [path for part in paths.values() for path in part]
    assert len(flat) == len(set(flat)) == 84
    for name, part in paths.items():
        inside = {path.relative_to(pacs / unseen) for path in part if path.is_relative_to(pacs / unseen)}
        assert len(inside) == (len(part) if name in ("test", "oracle") else 0)


@pytest.mark.parametrize("unseen", ["photo", "sketch"])
def test_no_target_image_is_opened_for_training_calibration_early_stopping_or_selection(
    pacs: Path, unseen: str
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7))
    with opened_files() as opened:
        split = load_split(pacs, config(split="domainbed", unseen=unseen))
        calibration_batches(split, batches=100, batch_size=4)
        calibrated = set(opened)
        finetune_(model, split, FinetuneConfig(epochs=2, batch_size=16, warmup_epochs=0.5))
        before_test = set(opened)
        for inner in cross_validation(pacs, config(split="domainbed", unseen=unseen)).values():
            finetune_(model, inner, FinetuneConfig(epochs=1, batch_size=16, warmup_epochs=0.5))
        selecting = set(opened)
        evaluate(model, split.test, num_classes=7)
    assert calibrated and calibrated <= {pacs / i for i in split.train.ids}
    assert before_test == {pacs / i for i in (*split.train.ids, *split.val.ids)}
    assert not [path for path in selecting if path.is_relative_to(pacs / unseen)]
    assert set(opened) - selecting == {pacs / i for i in split.test.ids}
