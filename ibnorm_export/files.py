"""A file or a folder is written whole or not at all: what stood in its place stays until then."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from ibnorm_export.errors import ExportError

__all__ = ["machine_of", "new_file", "new_folder", "sha256_of"]


@contextlib.contextmanager
def new_file(target: Path, error: type[Exception] = ExportError) -> Iterator[Path]:
    """A folder beside `target` to write it in; what is there at the end is moved into place.

    The block writes a file called `target.name`, and may write others that belong beside it. On any
    exception, an interrupt included, the folder is removed and what stood at the target stays.
    Companions are moved first and the old target is removed before them, so at no moment does a
    file under the target's name stand beside companions that are not its own.

    Raises:
        error: the place cannot be written (no such folder, no permission, no space).
    """
    try:
        if target.is_dir():
            raise error(f"{target} is a folder; name the file to write")
        if target.exists() and not target.is_file():
            raise error(f"{target} is no regular file, and would be replaced by one; name another")
        if not target.parent.is_dir():
            raise error(f"cannot write {target}: the folder {target.parent} does not exist")
        beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    except OSError as cause:
        raise error(f"cannot write {target}: {cause.strerror or cause}") from cause
    try:
        yield beside
        companions = [file for file in beside.iterdir() if file.name != target.name]
        if companions:
            target.unlink(missing_ok=True)
        for file in companions:
            file.replace(target.parent / file.name)
        (beside / target.name).replace(target)
    except OSError as cause:
        raise error(f"cannot write {target}: {cause.strerror or cause}") from cause
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def new_folder(
    target: Path, earlier: Callable[[Path], Collection[str]], *, error: type[Exception] = ExportError
) -> Iterator[Path]:
    """A folder beside `target` to fill; at the end it takes the target's place, whole or not at all.

    What an earlier run wrote in that place is replaced; where anything else lies there, nothing is touched. On any
    exception, an interrupt included, what stood at the target stays.

    Args:
        target: the folder.
        earlier: the files that an earlier run has written into a folder, relative to it; raises where none has.
        error: what to raise.

    Raises:
        error: the target is a file, holds something that no earlier run wrote, or cannot be written.
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
                f"{target} holds {foreign[0]}{more}, which would be lost: this command writes no such file. Choose "
                "another folder, or move it away"
            )
    if not target.parent.is_dir():
        raise error(f"cannot write {target}: the folder {target.parent} does not exist")
    try:
        beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    except OSError as cause:
        raise error(f"cannot write {target}: {cause.strerror or cause}") from cause
    new, old = beside / target.name, beside / "old"
    try:
        new.mkdir()
        yield new
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
        if target.exists() or not old.exists():  # else what is beside is all there is
            shutil.rmtree(beside, ignore_errors=True)


#: e_machine of an ELF header -> the name that Python gives the machine. Source: the ELF specification, 64-bit.
_MACHINES: Final = {62: "x86_64", 183: "aarch64", 243: "riscv64"}


def sha256_of(content: Path | bytes) -> str:
    """SHA-256 of a file or of bytes, in hexadecimal."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def machine_of(library: Path) -> str | None:
    """The machine that a library was built for, e.g. "x86_64", read from its header; None where it is no ELF file."""
    with library.open("rb") as stream:
        header = stream.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return None
    number = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return _MACHINES.get(number, f"ELF machine {number}") if header[4] == 2 else f"32-bit ELF machine {number}"
