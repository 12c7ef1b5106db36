"""Small fakes of the benchmarks' downloads, in the layouts of the originals.

Each function writes a download and returns what has to come out of it: the bytes of every image by its id.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from secateur.data import BENCHMARKS, Benchmark

Expected = dict[str, bytes]

PACS_DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
VLCS_CLASSES = ("bird", "car", "chair", "dog", "person")


def encoded(key: str, suffix: str = ".jpg", size: tuple[int, int] = (8, 6)) -> bytes:
    """Returns an image file of random pixels that depend on `key` alone."""
    rng = np.random.default_rng(list(key.encode()))
    file = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    image.save(file, format="PNG" if suffix == ".png" else "JPEG", **({} if suffix == ".png" else {"quality": 90}))
    return file.getvalue()


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def fitting(name: str, expected: Mapping[str, object]) -> Benchmark:
    """Returns the benchmark with the numbers of images of a fake."""
    counts: dict[str, int] = dict.fromkeys(BENCHMARKS[name].domains, 0)
    for key in expected:
        counts[key.split("/", 1)[0]] += 1
    return replace(BENCHMARKS[name], counts={"fake": counts})


def zipped(folder: Path, archive: Path) -> Path:
    """Packs what is in `folder`, as it would unpack beside the archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
    return archive


def tarred(folder: Path, archive: Path, start: str = "") -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as file:
        for path in sorted(folder.iterdir()):
            file.add(path, start + path.name)
    return archive


# --- the downloads ------------------------------------------------------------------------------------------------


def domain_class(
    root: Path, domains: Sequence[str], classes: Sequence[str], each: int, name: str, suffix: str = ".jpg"
) -> Expected:
    """Writes `root/domain/class/name`, where `name` is a format of the number."""
    expected: Expected = {}
    for domain in domains:
        for label in classes:
            for number in range(1, each + 1):
                key = f"{domain}/{label}/{name.format(number)}{suffix}"
                expected[key] = encoded(key, suffix)
                put(root / key, expected[key])
    return expected


def pacs(root: Path, each: int = 3) -> Expected:
    """PACS.zip as DomainBed has it: kfold/art_painting/dog/pic_001.jpg; sketches are PNG files."""
    expected = domain_class(root / "kfold", PACS_DOMAINS[:3], PACS_CLASSES, each, "pic_{:03d}")
    return expected | domain_class(root / "kfold", PACS_DOMAINS[3:], PACS_CLASSES, each, "n0_{}-1", ".png")


def pacs_with_lists(root: Path) -> Expected:
    """pacs.zip as other toolkits have it: images/ and splits/, whose lists name a file that does not exist."""
    expected = domain_class(root / "pacs" / "images", PACS_DOMAINS, PACS_CLASSES, 1, "pic_{:03d}")
    put(root / "pacs/splits/sketch_train_kfold.txt", "sketch/dog/n02103406_4068-1.png 1\n")
    return expected


def office_home(root: Path, each: int = 2) -> Expected:
    """OfficeHomeDataset_10072016.zip: a domain with a space in its name, lists beside the domains."""
    top = root / "OfficeHomeDataset_10072016"
    classes = ("Alarm_Clock", "Backpack", "Batteries", *(f"Thing_{i:02d}" for i in range(62)))
    expected = domain_class(top, ("Art", "Clipart", "Product", "Real World"), classes, each, "{:05d}")
    put(top / "ImageInfo.csv", "File Name,Height,Width\nArt/Alarm_Clock/00001.jpg,6,8\n")
    put(top / "imagelist.txt", "Art/Alarm_Clock/00001.jpg\n")
    put(root / "__MACOSX/OfficeHomeDataset_10072016/Art/Alarm_Clock/._00001.jpg", b"Mac OS X")
    put(top / "Art/Alarm_Clock/.DS_Store", b"\0\0\0\1Bud1")
    put(top / "Clipart/Backpack/Thumbs.db", b"\xd0\xcf\x11\xe0")
    return expected


def vlcs(root: Path) -> Expected:
    """VLCS.tar.gz as DomainBed has it."""
    return domain_class(root / "VLCS", ("Caltech101", "LabelMe", "SUN09", "VOC2007"), VLCS_CLASSES, 3, "{:08x}")


def vlcs_numbered(root: Path, *, only_full: bool = False) -> Expected:
    """VLCS.zip as others have it: CALTECH/train/0/imgs_1.jpg, the same names in each part, everything again in full."""
    names = {"CALTECH": "Caltech101", "LABELME": "LabelMe", "PASCAL": "VOC2007", "SUN": "SUN09"}
    expected: Expected = {}
    for folder, domain in names.items():
        for number, label in enumerate(VLCS_CLASSES):
            for part in ("train", "crossval", "test"):
                content = encoded(f"{folder}/{part}/{label}")
                if only_full:
                    put(root / f"VLCS/{folder}/full/{number}/{part}_1.jpg", content)
                    expected[f"{domain}/{label}/full-{part}_1.jpg"] = content
                else:
                    put(root / f"VLCS/{folder}/{part}/{number}/imgs_1.jpg", content)
                    put(root / f"VLCS/{folder}/full/{number}/{part}_1.jpg", content)
                    expected[f"{domain}/{label}/{part}-imgs_1.jpg"] = content
    return expected


TERRA_CLASSES = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")


def terra(images: Path, annotations: Path) -> Expected:
    """The two downloads of TerraIncognita: all images in one folder, annotations in several files.

    Locations are numbers in one file and text in another. Among the images: one with two boxes of one class, one with
    boxes of two classes, one of a class and one at a place that the benchmark leaves out, one without annotations.
    """
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate((*TERRA_CLASSES, "car"))]
    ids = {c["name"]: c["id"] for c in categories}
    expected: Expected = {}
    files: dict[str, dict[str, list[dict[str, object]]]] = {}

    def snapshot(part: str, place: int | str, labels: Sequence[str], key: str) -> None:
        content = files.setdefault(part, {"images": [], "annotations": []})
        name = f"{key}-23d2-11e8-a6a3-ec086b02610b"
        put(images / f"eccv_18_all_images_sm/{name}.jpg", encoded(name))
        content["images"].append({"id": name, "file_name": f"{name}.jpg", "location": place, "width": 8, "height": 6})
        for number, label in enumerate(labels):
            box = [1.0, 2.0, 3.0, 4.0]
            content["annotations"].append(
                {"id": f"{name}:{number}", "image_id": name, "category_id": ids[label], "bbox": box}
            )
            if str(place) in ("38", "43", "46", "100") and label != "car":
                expected[f"location_{place}/{label}/{name}.jpg"] = encoded(name)

    for place in (38, "43", 46, "100"):
        for label in TERRA_CLASSES:
            part = "train" if isinstance(place, int) else "cis_val"
            snapshot(part, place, (label,), f"{place}{label}")
    snapshot("trans_test", 38, ("coyote", "coyote"), "two-boxes")
    snapshot("trans_test", 38, ("cat", "dog"), "two-classes")
    snapshot("trans_test", 46, ("car",), "a-car")
    snapshot("trans_test", 51, ("cat",), "elsewhere")
    snapshot("trans_test", 46, (), "unannotated")
    for part, content in files.items():
        text = json.dumps({**content, "categories": categories, "info": {"version": "1"}})
        put(annotations / f"eccv_18_annotation_files/{part}_annotations.json", text)
    return expected


DOMAINNET_DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


def domainnet(root: Path, lists: Path) -> Expected:
    """DomainNet's six folders, its lists of train and test images, and the list of duplicates to leave out."""
    expected: Expected = {}
    for domain in DOMAINNET_DOMAINS:
        lines: list[str] = []
        for number in range(345):
            label = "The_Eiffel_Tower" if number == 0 else f"class_{number:03d}"
            key = f"{domain}/{label}/{domain}_{number + 1:03d}_000001.jpg"
            expected[key] = encoded(key, size=(4, 4))
            put(root / key, expected[key])
            lines.append(f"{key} {number}\n")
        put(lists / f"{domain}_train.txt", "".join(lines[:200]))
        put(lists / f"{domain}_test.txt", "".join(lines[200:]))
    twice = [f"clipart/class_{i:03d}/clipart_{i + 1:03d}_000002.jpg" for i in (17, 31)]
    for key in twice:
        put(root / key, encoded(key, size=(4, 4)))
    gone = "real/class_005/real_006_000009.jpg"
    put(lists / "domain_net_duplicates.txt", "".join(f"{key}\n" for key in (*twice, gone)))
    return expected


def cifar10(root: Path, each: int = 10) -> dict[str, np.ndarray]:
    """cifar-10-python.tar.gz, whose files Python 2 pickled; returns pixels (32 x 32 x 3) by id."""
    rng = np.random.default_rng(0)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    expected: dict[str, np.ndarray] = {}
    for batch, part in {**{f"data_batch_{i}": "train" for i in range(1, 6)}, "test_batch": "test"}.items():
        pixels = rng.integers(0, 256, (each, 3072), dtype=np.uint8)
        labels = [i % 10 for i in range(each)]
        put(root / "cifar-10-batches-py" / batch, python2_pickle(pixels, labels, f"batch {batch}"))
        for row, label in enumerate(labels):
            planes = pixels[row].reshape(3, 32, 32)
            key = f"{part}/{names[label]}/{batch}-{row:05d}.png"
            expected[key] = np.stack([planes[0], planes[1], planes[2]], axis=-1)
    put(root / "cifar-10-batches-py/readme.html", "<html></html>")
    return expected


def python2_pickle(pixels: np.ndarray, labels: Sequence[int], title: str) -> bytes:
    """Returns what cPickle of Python 2 wrote (protocol 2): strings are byte strings, arrays are numpy's of old."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    def integer(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)

    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"\x87R"
    kind = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    kind += b"(" + integer(3) + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + integer(0) + b"tb"
    shape = integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86"
    array = empty + b"(" + integer(1) + shape + kind + b"\x89" + text(pixels.tobytes()) + b"tb"
    values = b"](" + b"".join(map(integer, labels)) + b"e"
    entries = text(b"data") + array + text(b"labels") + values + text(b"batch_label") + text(title.encode())
    return b"\x80\x02}(" + entries + b"u."


def tiny_imagenet(root: Path) -> Expected:
    """tiny-imagenet-200.zip: boxes beside the training images, one list for all validation images, test unlabelled."""
    top = root / "tiny-imagenet-200"
    classes = [f"n{i:08d}" for i in range(200)]
    expected: Expected = {}
    notes: list[str] = []
    for number, label in enumerate(classes):
        name = f"{label}_0.JPEG"
        expected[f"train/{label}/{name}"] = encoded(name)
        put(top / f"train/{label}/images/{name}", encoded(name))
        put(top / f"train/{label}/{label}_boxes.txt", f"{name}\t0\t10\t63\t58\n")
        name = f"val_{number}.JPEG"
        expected[f"val/{label}/{name}"] = encoded(name)
        put(top / f"val/images/{name}", encoded(name))
        notes.append(f"{name}\t{label}\t0\t32\t44\t62\n")
    put(top / "val/val_annotations.txt", "".join(notes))
    put(top / "test/images/test_0.JPEG", encoded("test"))
    put(top / "wnids.txt", "".join(f"{label}\n" for label in classes))
    put(top / "words.txt", f"{classes[0]}\tgoldfish, Carassius auratus\n")
    return expected
