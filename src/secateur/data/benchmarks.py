"""The benchmarks that can be prepared: their domains, classes and numbers of images, and where the originals lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.data import layouts
from secateur.data.layouts import Aliases, Reader
from secateur.errors import unknown_name


@dataclass(frozen=True)
class Benchmark:
    """What is known of a benchmark.

    `domains` maps the name of each domain to other names of its folder in the downloads. `counts` gives, for each
    version of the data that circulates, the number of images in each domain. `official` says that domains are official
    parts (train, test or val) rather than domains. `origin` says where the originals lie and what they consist of.
    """

    name: str
    title: str
    domains: Aliases
    num_classes: int
    counts: Mapping[str, Mapping[str, int]]
    read: Reader
    origin: str
    classes: tuple[str, ...] | None = None
    official: bool = False

    def version_of(self, counts: Mapping[str, int]) -> str | None:
        """Returns the version with these numbers of images, None if there is none."""
        return next((version for version, known in self.counts.items() if dict(known) == dict(counts)), None)


BENCHMARKS: dict[str, Benchmark] = {
    known.name: known
    for known in (
        Benchmark(
            name="pacs",
            title="PACS (Li et al., ICCV 2017)",
            domains={"art_painting": (), "cartoon": (), "photo": (), "sketch": ()},
            num_classes=7,
            classes=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
            counts={"9,991 images": {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}},
            read=layouts.domain_class,
            origin="PACS.zip, which unpacks to kfold/, or pacs.zip with images/ and splits/ (Google Drive of the "
            "authors, linked from https://domaingeneralization.github.io)",
        ),
        Benchmark(
            name="office_home",
            title="Office-Home (Venkateswara et al., CVPR 2017)",
            domains={"Art": (), "Clipart": (), "Product": (), "Real World": ()},
            num_classes=65,
            counts={"15,588 images": {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357}},
            read=layouts.domain_class,
            origin="OfficeHomeDataset_10072016.zip from https://www.hemanthdv.org/officeHomeDataset.html",
        ),
        Benchmark(
            name="vlcs",
            title="VLCS (Fang et al., ICCV 2013)",
            domains={
                "Caltech101": ("CALTECH",),
                "LabelMe": ("LABELME",),
                "SUN09": ("SUN",),
                "VOC2007": ("PASCAL", "VOC"),
            },
            num_classes=5,
            classes=layouts.VLCS_CLASSES,
            counts={"10,729 images": {"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376}},
            read=layouts.vlcs,
            origin="VLCS.tar.gz (domain/class/image, as DomainBed downloads it) or VLCS.zip (CALTECH/train/0/image)",
        ),
        Benchmark(
            name="terra_incognita",
            title="TerraIncognita (Beery et al., ECCV 2018; four locations as in DomainBed)",
            domains={"location_100": (), "location_38": (), "location_43": (), "location_46": ()},
            num_classes=10,
            classes=layouts.TERRA_CLASSES,
            counts={
                "24,330 images, the annotations published today": {
                    "location_100": 4741,
                    "location_38": 9736,
                    "location_43": 3970,
                    "location_46": 5883,
                },
                "24,788 images, as in DomainBed's paper": {
                    "location_100": 4879,
                    "location_38": 9767,
                    "location_43": 4020,
                    "location_46": 6122,
                },
            },
            read=layouts.terra,
            origin="eccv_18_all_images_sm.tar.gz and eccv_18_annotations.tar.gz in one folder, from "
            "https://lila.science/datasets/caltech-camera-traps",
        ),
        Benchmark(
            name="domainnet",
            title="DomainNet (Peng et al., ICCV 2019), the cleaned version",
            domains={"clipart": (), "infograph": (), "painting": (), "quickdraw": (), "real": (), "sketch": ()},
            num_classes=345,
            counts={
                "586,575 images": {
                    "clipart": 48129,
                    "infograph": 51605,
                    "painting": 72266,
                    "quickdraw": 172500,
                    "real": 172947,
                    "sketch": 69128,
                }
            },
            read=layouts.domainnet,
            origin="six archives (clipart.zip and painting.zip those of the cleaned version) from "
            f"http://ai.bu.edu/M3SDA in one folder, with {layouts.DUPLICATES_LIST} from the folder domainbed/misc of "
            "https://github.com/facebookresearch/DomainBed",
        ),
        Benchmark(
            name="cifar10",
            title="CIFAR-10 (Krizhevsky, 2009)",
            domains={"test": (), "train": ()},
            num_classes=10,
            classes=layouts.CIFAR_CLASSES,
            counts={"60,000 images": {"test": 10000, "train": 50000}},
            read=layouts.cifar10,
            origin="cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
            official=True,
        ),
        Benchmark(
            name="tiny_imagenet",
            title="Tiny ImageNet (CS231n, 200 classes of 64 x 64)",
            domains={"train": (), "val": ()},
            num_classes=200,
            counts={"110,000 labelled images": {"train": 100000, "val": 10000}},
            read=layouts.tiny_imagenet,
            origin="tiny-imagenet-200.zip from http://cs231n.stanford.edu",
            official=True,
        ),
    )
}
"""The benchmarks by name."""


def find_benchmark(name: str) -> Benchmark:
    """Returns the benchmark of that name, whatever its case and signs; raises `InputError` for an unknown one."""
    plain = {_plain(known): benchmark for known, benchmark in BENCHMARKS.items()}
    if _plain(name) not in plain:
        raise unknown_name("benchmark", name, BENCHMARKS)
    return plain[_plain(name)]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
