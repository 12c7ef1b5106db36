"""The built-in digits-dg, folders of images, and the splits of both."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.data import IID_POOLED, LEAVE_ONE_OUT, DataConfig, Split, domain_folder, load_split, save_contact_sheet
from secateur.data.digits import CLASSES, DOMAINS, rendered_digits
from secateur.data.protocol import SplitName, hold_out
from secateur.errors import DataError, InputError


def cell_counts(ids: tuple[str, ...]) -> Counter[str]:
    """Returns the number of ids per domain and class."""
    return Counter(i.rsplit("/", 1)[0] for i in ids)


def source_of(image_id: str) -> int:
    """Returns the number that a digit has in scikit-learn."""
    return int(image_id.rsplit("/", 1)[1])


def all_ids(split: Split) -> list[str]:
    return [i for part in split.ids.values() for i in part]


# --- digits-dg --------------------------------------------------------------------------------------------------


def test_every_digit_is_rendered_in_exactly_one_domain_with_equal_shares_of_each_class() -> None:
    pixels, labels, domains = rendered_digits()
    assert pixels.shape == (1797, 3, 32, 32) and pixels.dtype == np.uint8
    assert sorted(Counter(domains.tolist()).values()) == [449, 449, 449, 450]
    for c in range(10):
        shares = np.bincount(domains[labels == c], minlength=4)
        assert shares.max() - shares.min() <= 1


def test_domains_look_different() -> None:
    pixels, _, domains = rendered_digits()
    images = {name: pixels[domains == d].astype(float) / 255 for d, name in enumerate(DOMAINS)}
    colourful = {name: np.ptp(x, axis=1).mean() for name, x in images.items()}
    assert colourful["plain"] == 0 and colourful["sketch"] == 0
    assert colourful["texture"] > 0.2 and colourful["thick"] > 0.2
    border = {name: x[:, :, 0].std(axis=2).mean() for name, x in images.items()}
    assert border["texture"] > 0.1 > 0.01 > border["thick"]
    assert images["sketch"].mean() > 0.8 > images["plain"].mean()


def test_pixels_are_the_same_in_another_process() -> None:
    here = hashlib.sha256(rendered_digits()[0].tobytes()).hexdigest()
    program = (
        "import hashlib; from secateur.data.digits import rendered_digits; import numpy as np; np.random.seed(7); "
        "print(hashlib.sha256(rendered_digits()[0].tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_pixels_are_those_that_the_shipped_weights_were_trained_on() -> None:
    pixels, _, domains = rendered_digits()
    means = [pixels[domains == d].mean() for d in range(4)]
    assert means == pytest.approx([129.577, 220.794, 113.513, 172.285], abs=0.01)


@pytest.mark.parametrize("unseen", DOMAINS)
def test_no_image_of_the_unseen_domain_is_trained_or_validated_on(unseen: str) -> None:
    split = load_split("digits-dg", DataConfig(unseen=unseen))
    assert split.unseen == unseen and split.protocol == LEAVE_ONE_OUT
    assert split.domains == tuple(d for d in DOMAINS if d != unseen)
    assert not [i for part in ("train", "val") for i in split.ids[part] if i.startswith(f"{unseen}/")]
    assert all(i.startswith(f"{unseen}/") for i in split.ids["test"])


@pytest.mark.parametrize("name", ["leave_one_out", "iid_pooled"])
def test_every_source_digit_is_used_exactly_once(name: SplitName) -> None:
    split = load_split("digits-dg", DataConfig(split=name))
    assert sorted(source_of(i) for i in all_ids(split)) == list(range(1797))


def test_validation_holds_a_fifth_of_every_source_domain_and_class() -> None:
    split = load_split("digits-dg", DataConfig(unseen="plain"))
    train, val = cell_counts(split.ids["train"]), cell_counts(split.ids["val"])
    assert len(val) == 30
    assert all(abs(val[cell] - 0.2 * (val[cell] + train[cell])) <= 1 for cell in val)
    assert (len(split.train), len(split.val), len(split.test)) == (1078, 269, 450)


def test_pooled_split_is_stratified_and_says_that_it_is_no_domain_generalisation() -> None:
    split = load_split("digits-dg", DataConfig(split="iid_pooled"))
    assert split.protocol == IID_POOLED and "not domain generalisation" in split.protocol
    assert split.unseen is None and split.domains == DOMAINS
    sizes = [len(split.train), len(split.val), len(split.test)]
    assert sizes == pytest.approx([0.73 * 1797, 0.17 * 1797, 0.10 * 1797], abs=2)
    counts = [cell_counts(split.ids[part]) for part in ("train", "val", "test")]
    for cell in counts[0]:
        total = sum(c[cell] for c in counts)
        assert [c[cell] for c in counts] == pytest.approx([0.73 * total, 0.17 * total, 0.10 * total], abs=2)


def test_seed_alone_decides_the_hold_out() -> None:
    first, same, other = (load_split("digits-dg", DataConfig(seed=s)) for s in (1, 1, 2))
    assert first.ids == same.ids
    assert first.ids["val"] != other.ids["val"] and first.ids["test"] == other.ids["test"]


def test_items_are_normalised_tensors_with_labels_that_match_the_ids() -> None:
    split = load_split("digits-dg")
    for part in (split.train, split.val, split.test):
        image, label = part[3]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        assert -1 <= image.min() < image.max() <= 1
        assert isinstance(label, int) and CLASSES[label] == part.ids[3].split("/")[1]
    pixels = rendered_digits()[0]
    expected = torch.tensor(pixels[source_of(split.val.ids[5])]).float() / 127.5 - 1
    assert torch.allclose(split.val[5][0], expected, atol=1e-6)


def test_only_training_digits_are_augmented_and_only_when_asked() -> None:
    split = load_split("digits-dg")
    assert split.train.augmented and not split.val.augmented and not split.test.augmented
    assert any(not torch.equal(split.train[0][0], split.train[0][0]) for _ in range(10))
    plain = split.train.plain()
    assert plain.ids == split.train.ids and torch.equal(plain[0][0], plain[0][0])
    assert not load_split("digits-dg", DataConfig(augment=False)).train.augmented


def test_digits_come_in_the_size_and_normalisation_asked_for() -> None:
    config = DataConfig(image_size=48, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image, _ = load_split("digits-dg", config).test[0]
    assert image.shape == (3, 48, 48) and image.min() >= 0


def test_contact_sheet_shows_all_domains(tmp_path: Path) -> None:
    path = save_contact_sheet(tmp_path / "sheet.png", columns=10)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG" and sheet.size[1] > 8 * 64


def test_hold_out_takes_the_exact_share_even_from_cells_of_two() -> None:
    cells = np.repeat(np.array([f"cell{i:02d}" for i in range(50)]), 2)
    kept, held = hold_out(np.arange(100), cells, 0.2, seed=0)
    assert len(held) == 20 and sorted([*kept, *held]) == list(range(100))
    assert max(Counter(cells[held]).values()) == 1


# --- folders ----------------------------------------------------------------------------------------------------


def picture(path: Path, colour: tuple[int, int, int] = (200, 100, 50), size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def office(tmp_path: Path) -> Path:
    """Three domains of two classes with ten pictures each, in the layout of PACS and Office-Home."""
    for d, domain in enumerate(("Art", "Clipart", "Real World")):
        for c, name in enumerate(("mug", "pen")):
            for i in range(10):
                suffix = ("jpg", "png", "JPEG")[i % 3]
                picture(tmp_path / domain / name / f"{i:03d}.{suffix}", (20 * i, 100 * d, 200 * c))
    return tmp_path


def test_folder_is_read_by_sorted_domains_and_classes(office: Path) -> None:
    split = load_split(str(office), DataConfig(unseen="Clipart", image_size=16))
    assert split.classes == ("mug", "pen") and split.domains == ("Art", "Real World")
    assert (len(split.train), len(split.val), len(split.test)) == (32, 8, 20)
    assert sorted(all_ids(split)) == sorted(p.relative_to(office).as_posix() for p in office.glob("*/*/*"))
    assert set(split.test.domains) == {"Clipart"} and not set(split.train.domains) & {"Clipart"}
    image, label = split.train[0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    assert split.classes[label] == split.train.ids[0].split("/")[1]


def test_folder_can_be_pooled(office: Path) -> None:
    split = domain_folder(office, DataConfig(split="iid_pooled"))
    assert split.protocol == IID_POOLED and len(all_ids(split)) == len(set(all_ids(split))) == 60
    assert [len(split.train), len(split.val), len(split.test)] == pytest.approx([43.8, 10.2, 6], abs=1)


def test_evaluation_images_are_resized_and_normalised_by_imagenet(tmp_path: Path) -> None:
    for domain in ("a", "b"):
        for i in range(5):
            picture(tmp_path / domain / "x" / f"{i}.png", (255, 0, 128))
    image, _ = domain_folder(tmp_path, DataConfig(unseen="b")).test[0]
    assert image.shape == (3, 224, 224)
    red, green, blue = image[:, 7, 9].tolist()
    assert red == pytest.approx((1 - 0.485) / 0.229, abs=1e-3)
    assert green == pytest.approx(-0.456 / 0.224, abs=1e-3)
    assert blue == pytest.approx((128 / 255 - 0.406) / 0.225, abs=1e-3)


def test_train_images_are_augmented_by_torchs_seed(office: Path) -> None:
    train = domain_folder(office, DataConfig(unseen="Art", image_size=16)).train
    torch.manual_seed(1)
    first, second = train[0][0], train[0][0]
    torch.manual_seed(1)
    assert torch.equal(train[0][0], first) and not torch.equal(first, second)
    assert torch.equal(train.plain()[0][0], train.plain()[0][0])


def test_all_problems_of_a_folder_are_told_at_once(office: Path) -> None:
    for path in (office / "Art" / "pen").iterdir():
        path.unlink()
    (office / "Empty" / "mug").mkdir(parents=True)
    (office / "Clipart" / "mug" / "notes.txt").write_text("no image")
    (office / "Clipart" / "pen" / "003.jpg").write_text("no image either")
    truncated = office / "Real World" / "pen" / "004.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    with pytest.raises(DataError) as caught:
        domain_folder(office, DataConfig(unseen="Clipar", verify=True))
    message = str(caught.value)
    for problem in (
        "domain 'Art' lacks images of 1 classes: pen",
        "domain 'Empty' holds no images",
        "not an image file",
        "notes.txt",
        "003.jpg",
        "004.png",
        "did you mean 'Clipart'",
    ):
        assert problem in message
    assert message.startswith("6 problem(s)")


def test_fewer_than_two_domains_and_missing_roots_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "only" / "x" / "1.png")
    with pytest.raises(DataError, match=r"at least two domains .* found only"):
        domain_folder(tmp_path, DataConfig(unseen="only"))
    with pytest.raises(DataError, match=r"no data set at .*nowhere"):
        domain_folder(tmp_path / "nowhere", DataConfig())
    with pytest.raises(DataError, match="no data set at"):
        load_split(f"{tmp_path}/nowhere", DataConfig())


def test_unreadable_image_is_named_when_it_is_asked_for(office: Path) -> None:
    broken = office / "Art" / "pen" / "000.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing")
    split = domain_folder(office, DataConfig(unseen="Art"))
    with pytest.raises(DataError, match=r"cannot read image .*000\.jpg"):
        split.test[split.test.ids.index("Art/pen/000.jpg")]


def test_hidden_files_and_thumbnail_caches_are_passed_over(office: Path) -> None:
    for name in (".DS_Store", "Thumbs.db"):
        (office / "Art" / "pen" / name).write_bytes(b"x")
    (office / ".cache").mkdir()
    assert len(all_ids(domain_folder(office, DataConfig(unseen="Art", verify=True)))) == 60


# --- requests that cannot be met --------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_nearest_known_one(office: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'digits-dg'"):
        load_split("digit-dg")
    with pytest.raises(InputError, match="did you mean 'sketch'"):
        load_split("digits-dg", DataConfig(unseen="sketsch"))
    with pytest.raises(InputError, match="did you mean 'Clipart'"):
        domain_folder(office, DataConfig(unseen="clipart"))
    with pytest.raises(InputError, match="name the domain to leave out"):
        domain_folder(office, DataConfig())
    with pytest.raises(InputError, match="did you mean 'iid_pooled'"):
        DataConfig(split="iid-pooled")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction"),
        ({"val_fraction": 1.5}, "val_fraction"),
        ({"image_size": 0}, "image_size"),
        ({"seed": -1}, "seed"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"split": "iid_pooled", "unseen": "plain"}, "no unseen domain"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataConfig(**changes)  # pyright: ignore[reportArgumentType]


def test_too_few_images_for_a_validation_part_are_refused(tmp_path: Path) -> None:
    for domain in ("a", "b"):
        picture(tmp_path / domain / "x" / "1.png")
    with pytest.raises(DataError, match="val part would be empty"):
        domain_folder(tmp_path, DataConfig(unseen="b"))
