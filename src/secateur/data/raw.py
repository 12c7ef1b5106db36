"""A download as it came: a folder, an archive, or a folder with archives in it, read without being changed."""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from secateur.data.folder import is_clutter
from secateur.errors import DataError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_CORRUPT = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError, RuntimeError)
"""What reading a broken, truncated or encrypted archive raises, besides `OSError`."""


@dataclass(frozen=True)
class Member:
    """One file of a download: the archive that it is in (None: it lies in a folder), its name there, and a stamp.

    The stamp is another when the file is: size with time of change, or with the archive's checksum.
    """

    archive: Path | None
    name: str
    stamp: str


class RawFiles:
    """The files of a download by the paths that they have once every archive is unpacked where it lies.

    Where a file lies unpacked beside its archive, the unpacked one counts. What operating systems leave behind (hidden
    files, `__MACOSX`, `Thumbs.db`) is passed over. Nothing is ever written to the source.
    """

    def __init__(self, source: Path) -> None:
        """Lists all files; raises `DataError` for a missing source and for archives that cannot be read."""
        self.source = source
        found: dict[str, Member] = {}
        if source.is_dir():
            loose, archives = _walk(source)
        elif source.name.lower().endswith(ARCHIVES) and source.is_file():
            loose, archives = {}, [source]
        elif source.exists():
            raise DataError(f"{source} is neither a folder nor an archive ({', '.join(ARCHIVES)})")
        else:
            raise DataError(f"nothing at {source}: expected the folder or archive that was downloaded")
        for archive in archives:
            folder = archive.parent.relative_to(source) if source.is_dir() else Path()
            for member in _listed(archive):
                path = PurePosixPath(folder.as_posix(), member.name.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts:
                    raise DataError(f"{archive} holds {member.name!r}, a path that leads out of it; do not unpack it")
                if not any(is_clutter(part) for part in path.parts):
                    found[path.as_posix()] = member
        self.members = dict(sorted({**found, **loose}.items()))

    def named(self, name: str) -> list[str]:
        """Returns the paths of the files of that name, shallowest first."""
        found = (path for path in self.members if path.rsplit("/", 1)[-1] == name)
        return sorted(found, key=lambda path: (path.count("/"), path))

    def read(self, path: str) -> bytes:
        """Returns the content of one file; raises `DataError` if it cannot be read."""
        ((_, content),) = self.stream([path])
        if isinstance(content, Exception):
            raise DataError(f"cannot read {path} in {self.source}: {content}") from content
        return content

    def stream(self, paths: Iterable[str]) -> Iterator[tuple[str, bytes | Exception]]:
        """Yields path and content of files, or what went wrong with one, in the order that is fastest to read."""
        by_archive: dict[Path | None, list[str]] = defaultdict(list)
        for path in dict.fromkeys(paths):
            by_archive[self.members[path].archive].append(path)
        for archive, inside in by_archive.items():
            if archive is None:
                yield from ((path, _content(self.source, path)) for path in inside)
            elif archive.suffix.lower() == ".zip":
                yield from self._unzipped(archive, inside)
            else:
                yield from self._untarred(archive, inside)

    def _unzipped(self, archive: Path, paths: list[str]) -> Iterator[tuple[str, bytes | Exception]]:
        with zipfile.ZipFile(archive) as file:
            for path in paths:
                try:
                    content: bytes | Exception = file.read(self.members[path].name)
                except (*_CORRUPT, OSError) as error:
                    content = error
                yield path, content

    def _untarred(self, archive: Path, paths: list[str]) -> Iterator[tuple[str, bytes | Exception]]:
        wanted = {self.members[path].name: path for path in paths}
        with tarfile.open(archive) as file:
            for info in file:
                if info.isfile() and info.name in wanted and (stream := file.extractfile(info)):
                    yield wanted.pop(info.name), stream.read()
                if not wanted:
                    return


def _walk(source: Path) -> tuple[dict[str, Member], list[Path]]:
    """Returns the files below a folder, and the archives among them."""
    loose: dict[str, Member] = {}
    archives: list[Path] = []
    seen: set[Path] = set()
    for folder, folders, files in os.walk(source, followlinks=True):
        resolved = Path(folder).resolve()
        folders[:] = [] if resolved in seen else sorted(name for name in folders if not is_clutter(name))
        if resolved in seen:  # A link that leads back would go round for ever.
            continue
        seen.add(resolved)
        for name in sorted(files):
            path = Path(folder, name)
            if name.lower().endswith(ARCHIVES):
                archives.append(path)
            elif not is_clutter(name):
                relative = path.relative_to(source).as_posix()
                status = path.stat() if path.exists() else path.lstat()
                loose[relative] = Member(None, relative, f"{status.st_size}:{status.st_mtime_ns}")
    return loose, archives


def _listed(archive: Path) -> list[Member]:
    """Returns the files in an archive; a tar archive is read from beginning to end for that."""
    try:
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as file:
                infos = (info for info in file.infolist() if not info.is_dir())
                return [Member(archive, i.filename, f"{i.file_size}:{i.CRC:08x}") for i in infos]
        with tarfile.open(archive) as file:
            return [Member(archive, i.name, f"{i.size}:{i.mtime}") for i in file if i.isfile()]
    except (*_CORRUPT, OSError) as error:
        raise DataError(f"{archive} is corrupt or was not downloaded to its end ({error}); get it again") from error


def _content(source: Path, path: str) -> bytes | Exception:
    try:
        return (source / path).read_bytes()
    except OSError as error:
        return error
