"""Hugging Face data sets with a column of domains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from secateur.data import DataConfig, load_split, save_split
from secateur.data.hub import HubImages
from secateur.errors import DataError, InputError


def rows(count: int, start: int = 0) -> dict[str, list[Any]]:
    rng = np.random.default_rng(start)
    images = [Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)) for _ in range(count)]
    domains = [("art", "photo", "sketch")[(start + i) % 3] for i in range(count)]
    return {"image": images, "domain": domains, "label": [(start + i) // 3 % 2 for i in range(count)]}


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "domain": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["mug", "pen"]),
    }
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """60 images in two parts, saved to a folder."""
    parts = {"train": rows(36), "test": rows(24, start=36)}
    whole = datasets.DatasetDict({k: datasets.Dataset.from_dict(v, features=FEATURES) for k, v in parts.items()})
    whole.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_all_parts_are_split_by_domain(saved: Path) -> None:
    split = load_split(saved, DataConfig(unseen="sketch", image_size=8))
    assert split.classes == ("mug", "pen") and split.domains == ("art", "photo")
    assert (len(split.train), len(split.val), len(split.test)) == (32, 8, 20)
    assert set(split.test.domains) == {"sketch"} and isinstance(split.test, HubImages)
    assert all(
        i.split("/")[:2] == [d, split.classes[c]]
        for i, d, c in zip(split.val.ids, split.val.domains, split.val.labels.tolist(), strict=True)
    )


def test_pixels_and_labels_belong_together(saved: Path) -> None:
    test = load_split(str(saved), DataConfig(unseen="art", image_size=8, mean=(0, 0, 0), std=(1, 1, 1))).test
    opened = datasets.load_from_disk(saved)
    whole = datasets.concatenate_datasets([opened["test"], opened["train"]])
    for key, (image, label) in zip(test.ids, (test[i] for i in range(len(test))), strict=True):
        row = whole[int(key.rsplit("/", 1)[1])]
        assert row["domain"] == "art" and row["label"] == label
        resized = row["image"].resize((8, 8), Image.Resampling.BILINEAR)
        assert torch.allclose(image, torch.tensor(np.asarray(resized)).permute(2, 0, 1) / 255, atol=1e-6)


def test_domains_may_be_class_labels_of_another_name(tmp_path: Path) -> None:
    content = rows(30)
    names = ["art", "photo", "sketch"]
    styles = {"image": content["image"], "style": [names.index(d) for d in content["domain"]], "kind": content["label"]}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "style": datasets.ClassLabel(names=names),
            "kind": datasets.ClassLabel(names=["mug", "pen"]),
        }
    )
    datasets.Dataset.from_dict(styles, features=features).save_to_disk(tmp_path / "saved")
    split = load_split(tmp_path / "saved", DataConfig(unseen="art", domain_column="style", image_size=8))
    assert split.domains == ("photo", "sketch") and len(split.test) == 10
    with pytest.raises(
        InputError, match=r"no column 'domain' for the domain; set domain_column to one of image, style"
    ):
        load_split(tmp_path / "saved", DataConfig(unseen="art"))


def test_splits_are_stored_and_images_cached_as_for_folders(saved: Path, tmp_path: Path) -> None:
    config = DataConfig(unseen="photo", image_size=8, augment=False)
    split = load_split(saved, config)
    save_split(split, tmp_path / "split.json")
    again = load_split(saved, DataConfig(image_size=8, augment=False, cache=True), stored=tmp_path / "split.json")
    assert again.ids == split.ids
    assert all(torch.equal(split.train[i][0], again.train[i][0]) for i in range(len(split.train)))


def test_bad_columns_names_and_data_sets_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'sketch'"):
        load_split(saved, DataConfig(unseen="scetch"))
    whole = datasets.concatenate_datasets(list(datasets.load_from_disk(saved).values()))
    whole.add_column("second", whole["label"]).remove_columns("image").save_to_disk(tmp_path / "no-image")
    with pytest.raises(InputError, match="must have one column of images, found none"):
        load_split(tmp_path / "no-image", DataConfig(unseen="art"))
    odd = whole.map(lambda row: {"domain": "a/b" if row["domain"] == "art" else row["domain"]})
    odd.save_to_disk(tmp_path / "odd")
    with pytest.raises(DataError, match=r"the domain of some images is 'a/b'"):
        load_split(tmp_path / "odd", DataConfig(unseen="photo"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="cannot open the data set"):
        load_split(tmp_path / "broken", DataConfig(unseen="photo"))
    with pytest.raises(DataError, match="cannot open the data set hf:nobody/nothing"):
        load_split("hf:nobody/nothing", DataConfig(unseen="photo"))
