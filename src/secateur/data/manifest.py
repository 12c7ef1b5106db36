"""The manifest of a prepared data set: every image with its checksum, and what was noticed on the way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from secateur.data.protocol import content_checksum
from secateur.errors import DataError
from secateur.files import write_text

MANIFEST = "manifest.json"
JOURNAL = ".preparing.jsonl"
"""What a preparation has done so far; gone when the manifest is there."""

_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One image file: SHA-256 of its bytes, their number, width and height in pixels, where in the source it was."""

    sha256: str
    size: int
    width: int
    height: int
    source: str


@dataclass(frozen=True)
class Duplicates:
    """Groups of ids with the same bytes, each under the worst that can be said of it.

    `across_domains`: in several domains (or official parts): what is tested may have been trained on.
    `across_classes`: in one domain under several classes: a picture of two things, or a mistake.
    `within_class`: more than once in one class of one domain.
    """

    across_domains: tuple[tuple[str, ...], ...] = ()
    across_classes: tuple[tuple[str, ...], ...] = ()
    within_class: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def among(cls, images: Mapping[str, Entry]) -> Self:
        """Returns the duplicates among images."""
        by_content: dict[str, list[str]] = {}
        for key, entry in images.items():
            by_content.setdefault(entry.sha256, []).append(key)
        groups = sorted(tuple(sorted(ids)) for ids in by_content.values() if len(ids) > 1)
        kinds: tuple[list[tuple[str, ...]], ...] = ([], [], [])
        for group in groups:
            domains = {i.split("/")[0] for i in group}
            classes = {i.split("/")[1] for i in group}
            kinds[0 if len(domains) > 1 else 1 if len(classes) > 1 else 2].append(group)
        return cls(*map(tuple, kinds))

    def __str__(self) -> str:
        counts = (len(self.across_domains), len(self.across_classes), len(self.within_class))
        if not any(counts):
            return "no duplicates"
        return "duplicates: {} across domains, {} across classes, {} within a class".format(*counts)


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    `images` maps ids (`domain/class/file`) to entries. `version` says which published counts they agree with, "" if
    none. `left_out` are the bad files that were skipped with the reasons, `warnings` what was wrong besides, `removed`
    the number of files on the publisher's list of duplicates. `official` says that domains are official parts.
    """

    benchmark: str
    version: str
    official: bool
    images: Mapping[str, Entry]
    duplicates: Duplicates
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    removed: int = 0

    @property
    def domains(self) -> dict[str, int]:
        """The number of images in each domain, by name."""
        return dict(sorted(Counter(i.split("/", 1)[0] for i in self.images).items()))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, sorted."""
        return tuple(sorted({i.split("/", 2)[1] for i in self.images}))

    @property
    def checksum(self) -> str:
        """The SHA-256 of all ids and contents together."""
        return content_checksum({key: entry.sha256 for key, entry in self.images.items()})

    def write(self, root: Path) -> None:
        """Writes the manifest into `root`, whole or not at all."""
        content: dict[str, Any] = {
            "format": _FORMAT,
            "benchmark": self.benchmark,
            "version": self.version,
            "official": self.official,
            "checksum": self.checksum,
            "domains": self.domains,
            "classes": self.classes,
            "duplicates": asdict(self.duplicates),
            "left_out": self.left_out,
            "warnings": self.warnings,
            "removed": self.removed,
            "fields": ["sha256", "bytes", "width", "height", "source"],
            "images": {k: [e.sha256, e.size, e.width, e.height, e.source] for k, e in sorted(self.images.items())},
        }
        text = json.dumps({k: v for k, v in content.items() if k != "images"}, indent=1, ensure_ascii=False)
        lines = (json.dumps(k) + ": " + json.dumps(v) for k, v in content["images"].items())
        write_text(root / MANIFEST, text[:-2] + ',\n "images": {\n  ' + ",\n  ".join(lines) + "\n }\n}\n")

    @classmethod
    def read(cls, root: Path) -> Self:
        """Returns the manifest in `root`; raises `DataError` if it is corrupt or of another version."""
        path = root / MANIFEST
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["format"] != _FORMAT:
                raise DataError(
                    f"{path} has format {content['format']}, this version of secateur reads {_FORMAT}; prepare the "
                    "data set again"
                )
            groups = {name: tuple(map(tuple, found)) for name, found in content["duplicates"].items()}
            manifest = cls(
                benchmark=content["benchmark"],
                version=content["version"],
                official=content["official"],
                images={key: Entry(*values) for key, values in content["images"].items()},
                duplicates=Duplicates(**groups),
                left_out=tuple(content["left_out"]),
                warnings=tuple(content["warnings"]),
                removed=content["removed"],
            )
            whole = manifest.checksum == content["checksum"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is corrupt ({error}); prepare the data set again") from error
        if not whole:
            raise DataError(f"{path} was changed: its checksum is not that of its images; prepare the data set again")
        return manifest

    def __str__(self) -> str:
        counts = ", ".join(f"{domain} {count}" for domain, count in self.domains.items())
        version = f" ({self.version})" if self.version else ""
        lines = [f"{self.benchmark}{version}: {len(self.images)} images of {len(self.classes)} classes: {counts}"]
        lines.append(str(self.duplicates))
        if self.removed:
            lines.append(f"{self.removed} files on the list of duplicates were not taken")
        if self.left_out:
            lines.append(f"{len(self.left_out)} bad files were left out; {MANIFEST} names them")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)
