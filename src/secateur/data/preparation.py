"""From a download to a folder `domain/class/image` with a manifest: every image decoded once, the source untouched."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from secateur.data.benchmarks import Benchmark, find_benchmark
from secateur.data.folder import empty_problems, problem_error, undecodable
from secateur.data.layouts import Item, Listing, cifar_batch
from secateur.data.manifest import JOURNAL, MANIFEST, Duplicates, Entry, Manifest
from secateur.data.raw import RawFiles
from secateur.errors import DataError
from secateur.files import write_text

Progress = Callable[[int, int], None]
"""Called with the number of images done and of all."""

PROBLEMS = "problems.txt"
"""All that was wrong, one line each; there when a preparation failed."""

_FORMAT = 1
_NEW_JOURNAL = f"{JOURNAL}.new"
_AT_ONCE = 256
"""How many images are in memory at a time."""


def prepare(
    name: str | Benchmark,
    source: str | Path,
    out: str | Path,
    skip_bad: bool = False,
    *,
    progress: Progress | None = None,
) -> Manifest:
    """Converts the download of a benchmark at `source` to `out/domain/class/image` and returns its manifest.

    `source` is the folder or archive that was downloaded, or a folder of such archives; it is only read. Images keep
    their names and their bytes (those of CIFAR-10 become PNG files); each is decoded once from beginning to end.
    Numbers of images are compared with the published ones. What is done is written down as it goes: after an
    interruption of any kind, the same call goes on where it was. A finished `out` is returned as it is.

    Raises `DataError`, naming all of them at once, for missing domains and classes, files that are truncated or no
    images, and wrong numbers of images. With `skip_bad`, bad files are left out and numbers may differ; both are
    written into the manifest. Missing domains and classes are an error all the same. What was converted until then
    stays in `out`, for the next call to go on with, beside `problems.txt`. Also raises `DataError` if `out` holds
    something else, and `InputError` for an unknown name.
    """
    benchmark = find_benchmark(name) if isinstance(name, str) else name
    source, out = Path(source), Path(out)
    _check_places(source, out)
    raw = RawFiles(source)
    listing = benchmark.read(raw, benchmark.domains)
    if not listing.items:
        why = f" Found: {'; '.join(listing.bad[:5])}." if listing.bad else ""
        raise DataError(f"no images of {benchmark.title} in {source}. Expected: {benchmark.origin}.{why}")
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        if (out / MANIFEST).exists():
            return _finished(benchmark, out, {item.id for item in listing.items})
        bad = listing.bad + _clashes(listing)
        with _Journal(out, benchmark.name, {i.id: _stamp(raw, i) for i in listing.items}) as journal:
            bad += _convert(raw, listing.items, journal, progress)
        missing, wrong = _shortcomings(benchmark, journal.done), _miscounts(benchmark, journal.done)
        (out / PROBLEMS).unlink(missing_ok=True)
        if missing or ((wrong or bad) and not skip_bad):
            raise _refusal(benchmark, source, out, missing + wrong + bad, skippable=not missing)
        manifest = _manifest(benchmark, listing, journal.done, bad, wrong)
        os.sync()  # A manifest that is there means that all images are on the disk, too.
        manifest.write(out)
        (out / JOURNAL).unlink()
    return manifest


def _check_places(source: Path, out: Path) -> None:
    if not source.exists():
        raise DataError(f"nothing at {source}: expected the folder or archive that was downloaded")
    here, there = source.resolve(), out.resolve()
    if there == here or here in there.parents or there in here.parents:
        raise DataError(f"{out} and the source {source} lie in one another; choose a folder beside it for the result")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; choose a new folder for the result")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set[str]()
    # A process that was killed as it began may leave the first lines of a journal and nothing else.
    if held - {_NEW_JOURNAL} and not held & {JOURNAL, MANIFEST}:
        raise DataError(f"{out} is not empty and not an unfinished preparation; choose a new folder for the result")


def _finished(benchmark: Benchmark, out: Path, ids: set[str]) -> Manifest:
    """Returns the manifest that is there, if it is one of this benchmark and this source."""
    manifest = Manifest.read(out)
    if manifest.benchmark != benchmark.name or not manifest.images.keys() <= ids:
        raise DataError(f"{out} holds {manifest.benchmark} prepared from another source; choose a new folder")
    (out / JOURNAL).unlink(missing_ok=True)
    return manifest


def _stamp(raw: RawFiles, item: Item) -> str:
    return f"{item.member}:{raw.members[item.member].stamp}"


def _clashes(listing: Listing) -> list[str]:
    """Keeps the first of several images with one id, and returns complaints about the others."""
    first: dict[str, Item] = {}
    bad: list[str] = []
    for item in listing.items:
        known = first.setdefault(item.id, item)
        if known is not item:
            bad.append(f"{item.member}: would become {item.id}, as {known.member} does")
    listing.items = list(first.values())
    return bad


def _manifest(
    benchmark: Benchmark, listing: Listing, images: dict[str, Entry], left_out: list[str], warnings: list[str]
) -> Manifest:
    return Manifest(
        benchmark=benchmark.name,
        version=benchmark.version_of(_counts(images)) or "",
        official=benchmark.official,
        images=images,
        duplicates=Duplicates.among(images),
        left_out=tuple(left_out),
        warnings=tuple(warnings),
        removed=listing.removed,
    )


def _refusal(benchmark: Benchmark, source: Path, out: Path, problems: list[str], *, skippable: bool) -> DataError:
    """Writes down all problems and returns the error that names them."""
    write_text(out / PROBLEMS, "".join(f"{problem}\n" for problem in problems))
    hint = "leave bad files out and go on with --skip-bad" if skippable else "these cannot be skipped"
    return problem_error(f"{benchmark.title} in {source}", problems, f" (all are in {out / PROBLEMS}; {hint})")


def _counts(images: dict[str, Entry]) -> dict[str, int]:
    return Counter(i.split("/", 1)[0] for i in images)


def _miscounts(benchmark: Benchmark, images: dict[str, Entry]) -> list[str]:
    """Returns a complaint if the numbers of images are not those of any version."""
    counts = _counts(images)
    if benchmark.version_of(counts) is not None:
        return []
    found = ", ".join(f"{domain} {counts.get(domain, 0)}" for domain in sorted(benchmark.domains))
    known = " or ".join(", ".join(f"{d} {c}" for d, c in sorted(v.items())) for v in benchmark.counts.values())
    return [f"wrong numbers of images: found {found}; expected {known}"]


def _shortcomings(benchmark: Benchmark, images: dict[str, Entry]) -> list[str]:
    """Returns complaints about domains and classes that are not there, or should not be."""
    held: dict[str, set[str]] = {domain: set() for domain in benchmark.domains}
    for key in images:
        domain, label, _ = key.split("/")
        held[domain].add(label)
    problems = empty_problems(held)
    found = {label for labels in held.values() for label in labels}
    if benchmark.classes is not None and found != set(benchmark.classes):
        for what, names in (("lacks", set(benchmark.classes) - found), ("unknown", found - set(benchmark.classes))):
            if names:
                problems.append(f"classes {what}: {', '.join(sorted(names))}")
    elif len(found) != benchmark.num_classes:
        problems.append(f"{len(found)} classes, expected {benchmark.num_classes}")
    return problems


# --- converting ---------------------------------------------------------------------------------------------------


def _convert(raw: RawFiles, items: Sequence[Item], journal: _Journal, progress: Progress | None) -> list[str]:
    """Writes all images that the journal does not know and returns complaints about those that cannot be read."""
    bad: list[str] = []
    todo: dict[str, list[Item]] = {}
    for item in items:
        if item.id not in journal.done:
            todo.setdefault(item.member, []).append(item)
    finished = len(items) - sum(map(len, todo.values()))
    jobs = _jobs(raw, todo)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(jobs, _AT_ONCE)):
            for (item, _), result in zip(chunk, pool.map(lambda job: _place(journal.root, *job), chunk), strict=True):
                if isinstance(result, str):
                    bad.append(f"{item.member}: {result}")
                else:
                    journal.add(item.id, result)
            journal.flush()
            finished += len(chunk)
            if progress is not None:
                progress(finished, len(items))
    return bad


Content = Callable[[], bytes]


def _jobs(raw: RawFiles, todo: dict[str, list[Item]]) -> Iterator[tuple[Item, Content | Exception]]:
    """Yields every image to be made with a function that returns its bytes, or with what went wrong reading it."""
    for path, content in raw.stream(todo):
        pixels = None
        for item in todo[path]:
            if isinstance(content, Exception):
                yield item, content
            elif item.row is None:
                yield item, lambda content=content: content
            else:
                if pixels is None:
                    pixels, _ = cifar_batch(content)
                yield item, lambda row=pixels[item.row]: _png(row)


def _png(pixels: Any) -> bytes:
    """Returns an image (H x W x 3, uint8) as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _place(root: Path, item: Item, content: Content | Exception) -> Entry | str:
    """Decodes one image and writes it where it belongs; returns its entry, or what is wrong with it."""
    from PIL import Image

    if isinstance(content, Exception):
        return f"cannot be read: {content}"
    data = content()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            width, height = image.size
    except undecodable() as error:
        return re.sub(r" <_io.BytesIO object at \w+>", " it", f"cannot be decoded: {error}")
    path = root / item.id
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)
    return Entry(hashlib.sha256(data).hexdigest(), len(data), width, height, item.member)


# --- what is done already -----------------------------------------------------------------------------------------


class _Journal:
    """The images that are done, in a file to which one line is added for each."""

    def __init__(self, root: Path, benchmark: str, stamps: dict[str, str]) -> None:
        """Reads what an interrupted preparation did, and keeps what is still true of it.

        `stamps` describe the files in the source by id of the image. An image counts as done if the source is the same
        and the image is there with the bytes that were written. Raises `DataError` for a journal of something else.
        """
        self.root, self.stamps = root, stamps
        self.path = root / JOURNAL
        self.done: dict[str, Entry] = {}
        header = {"format": _FORMAT, "benchmark": benchmark}
        known: list[Any] = _lines(self.path) if self.path.exists() else [header]
        if known[:1] != [header]:
            raise DataError(f"{root} holds an unfinished preparation of something else; remove it first")
        for key, stamp, sha256, size, width, height, source in known[1:]:
            entry = Entry(sha256, size, width, height, source)
            if stamps.get(key) == stamp and self._is_there(key, entry):
                self.done[key] = entry
            elif key not in stamps:
                (root / key).unlink(missing_ok=True)
        for left in root.glob("*/*/.*.part"):
            left.unlink()
        self.file: IO[str] = (root / _NEW_JOURNAL).open("w", encoding="utf-8")
        self.file.write(json.dumps(header) + "\n")
        for key, entry in self.done.items():
            self.add(key, entry)
        self.flush()
        (root / _NEW_JOURNAL).replace(self.path)

    def _is_there(self, key: str, entry: Entry) -> bool:
        path = self.root / key
        if not path.is_file() or path.stat().st_size != entry.size:
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256

    def add(self, key: str, entry: Entry) -> None:
        """Adds an image that is in its place."""
        self.done[key] = entry
        values = [key, self.stamps[key], entry.sha256, entry.size, entry.width, entry.height, entry.source]
        self.file.write(json.dumps(values) + "\n")

    def flush(self) -> None:
        """Hands all lines to the operating system, which outlives this process."""
        self.file.flush()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _lines(path: Path) -> list[Any]:
    """Returns the lines of a journal up to the first that was not written to its end."""
    lines: list[Any] = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps other processes from preparing into the same folder meanwhile; the lock goes when the process does."""
    import fcntl

    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"another process is preparing {out} at the moment; wait for it") from error
    finally:
        os.close(handle)
