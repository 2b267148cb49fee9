"""Writing files and folders as a whole or not at all, hashes, and headers of libraries."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from ibnorm_export.errors import ExportError

__all__ = [
    "Kind",
    "check_target",
    "has_file",
    "lock_file",
    "machine_of",
    "named_file",
    "new_file",
    "new_folder",
    "sha256_of",
]

#: Bytes of a file in which the mark of its kind must be.
_MARK_WITHIN_BYTES: Final = 512


def _make_readable(folder: Path) -> None:
    """Give the files of a folder the permissions that a new file gets here.

    Some writers, safetensors among them, let only the owner read a file, and it would stay so when the folder is served
    by another user.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        probe = Path(place) / "file"
        probe.touch()
        usual = probe.stat().st_mode & 0o777
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            mode = file.stat().st_mode & 0o777
            if mode & 0o077 == 0:
                file.chmod(mode | usual)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a command writes, so that it replaces an earlier result and no other file.

    Args:
        name: the kind of file with an article, for messages, e.g. "an ONNX file".
        matches: whether an existing file is of this kind.
    """

    name: str
    matches: Callable[[Path], bool]

    @classmethod
    def marked(cls, name: str, mark: bytes) -> Kind:
        """The kind of files that contain a mark near their beginning."""

        def matches(path: Path) -> bool:
            with path.open("rb") as stream:
                return mark in stream.read(_MARK_WITHIN_BYTES)

        return cls(name, matches)


def has_file(folder: Path, name: str) -> bool:
    """Return whether a folder has a file of this name, which may be a name that no file system takes."""
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):
        return False


def check_target(target: Path, kind: Kind, *, error: type[Exception] = ExportError) -> None:
    """Check that a file may be written: nothing is there, or an empty file, or an earlier one of the same kind.

    Args:
        target: the file to write.
        kind: what is written.
        error: class of the exception to raise.

    Raises:
        error: another file is there, or it cannot be read.
    """
    try:
        if target.is_file() and target.stat().st_size and not kind.matches(target):
            raise error(f"{target} exists and is not {kind.name}: it would be lost. Name another file, or move it away")
    except OSError as cause:
        raise error(f"cannot replace {target}: {cause.strerror or cause}") from cause


def lock_file(stream: IO[bytes]) -> None:
    """Lock an open file until it is closed, or the process ends, against others that lock it.

    Where the operating system or the file system has no such locks, nothing is locked.

    Args:
        stream: the file, open for writing.

    Raises:
        BlockingIOError: it is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return


def named_file(target: str | Path, example: str, *, error: type[Exception] = ExportError) -> Path:
    """Return the path of a file to write.

    Args:
        target: the path, as the user wrote it.
        example: name of a file, for the message.
        error: class of the exception to raise.

    Raises:
        error: it is a folder, or ends in a slash as the name of a folder does.
    """
    if Path(target).is_dir() or str(target).endswith(("/", os.sep)):
        raise error(f"{target} is a folder; name the file to write, e.g. {Path(target) / example}")
    return Path(target)


@contextlib.contextmanager
def new_file(target: Path, error: type[Exception] = ExportError, *, kind: Kind | None = None) -> Iterator[Path]:
    """Give a temporary folder next to `target`, and move its files into place at the end of the block.

    The block writes a file named `target.name`, and may write companions, which belong next to it. After an exception
    or an interrupt the temporary folder is removed and the old target stays. The old target is removed before
    companions are moved, and the new one is moved last, so the target never appears next to companions of another
    version.

    Args:
        target: the file to write.
        error: class of the exception to raise.
        kind: what is written, which is all that may be replaced; None replaces any file.

    Raises:
        error: the target cannot be written: the folder does not exist, or there is no permission or space; or a file of
            another kind is there.
    """
    try:
        if target.is_dir():
            raise error(f"{target} is a folder; name the file to write")
        if target.exists() and not target.is_file():
            raise error(f"{target} is not a regular file; name another file to write")
        if kind is not None:
            check_target(target, kind, error=error)
        if not target.parent.is_dir():
            raise error(f"cannot write {target}: the folder {target.parent} does not exist")
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    except OSError as cause:
        raise error(f"cannot write {target}: {cause.strerror or cause}") from cause
    try:
        yield temporary
        _make_readable(temporary)
        companions = [file for file in temporary.iterdir() if file.name != target.name]
        if companions:
            target.unlink(missing_ok=True)
        for file in companions:
            file.replace(target.parent / file.name)
        (temporary / target.name).replace(target)
    except OSError as cause:
        raise error(f"cannot write {target}: {cause.strerror or cause}") from cause
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_folder(
    target: Path, earlier: Callable[[Path], Collection[str]], *, error: type[Exception] = ExportError
) -> Iterator[Path]:
    """Give an empty temporary folder, which takes the place of `target` at the end of the block.

    Files of an earlier run are replaced. A target that contains other files is not changed. After an exception or an
    interrupt the old target stays.

    Args:
        target: the folder to write.
        earlier: returns the files that an earlier run wrote into a folder, relative to it; raises if none did.
        error: class of the exception to raise.

    Raises:
        error: the target is a file, contains a file that no earlier run wrote, or cannot be written.
    """
    if target.is_file():
        raise error(f"{target} is a file; name the folder to write")
    if target.is_dir() and any(target.iterdir()):
        there = {
            path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink() or not path.is_dir()
        }
        if foreign := sorted(there - set(earlier(target))):
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise error(
                f"{target} contains {foreign[0]}{more}, which this command did not write and would delete. Choose "
                "another folder, or move the file away"
            )
    if not target.parent.is_dir():
        raise error(f"cannot write {target}: the folder {target.parent} does not exist")
    try:
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    except OSError as cause:
        raise error(f"cannot write {target}: {cause.strerror or cause}") from cause
    new, old = temporary / target.name, temporary / "old"
    try:
        new.mkdir()
        yield new
        _make_readable(new)
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    except OSError as cause:
        raise error(f"cannot write {target}: {cause.strerror or cause}") from cause
    finally:
        if target.exists() or not old.exists():  # otherwise the temporary folder has the only copy
            shutil.rmtree(temporary, ignore_errors=True)


#: Python's name of a machine, by e_machine of a 64-bit ELF header. Source: the ELF specification.
_MACHINES: Final = {62: "x86_64", 183: "aarch64", 243: "riscv64"}


def sha256_of(content: Path | bytes) -> str:
    """Return the SHA-256 of a file or of bytes, in hexadecimal."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def machine_of(library: Path) -> str | None:
    """Return the machine that a library was built for, e.g. "x86_64"; None if it is not an ELF file."""
    with library.open("rb") as stream:
        header = stream.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return None
    number = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return _MACHINES.get(number, f"ELF machine {number}") if header[4] == 2 else f"32-bit ELF machine {number}"
