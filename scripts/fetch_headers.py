#!/usr/bin/env python3
"""Fetch the ONNX Runtime C/C++ headers that custom_ops/ is built against.

    python scripts/fetch_headers.py

The headers land in .cache/headers/onnxruntime, where CMake looks after ORT_INCLUDE_DIR and the
system's own include folders. Nothing is fetched when they are already there. The archive comes
through the npm client, because ONNX Runtime publishes its headers in no Python package; it is read
only after its SHA-256 has been checked, and only plain `.h` files are taken out of it.

Needs the standard library and `npm` alone.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class HeaderSource:
    """One pinned npm archive and the folder of headers inside it."""

    name: str  # folder under .cache/headers
    package: str
    version: str
    sha256: str  # of the .tgz
    folder: PurePosixPath  # inside the archive
    main_header: str  # must be among the files taken
    licence: str


ONNXRUNTIME = HeaderSource(
    name="onnxruntime",
    package="com.github.asus4.onnxruntime",
    version="0.4.9",
    sha256="e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d",
    folder=PurePosixPath("package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers"),
    main_header="onnxruntime_c_api.h",  # ORT_API_VERSION 29; the library itself asks for level 18
    licence="MIT",
)


class FetchError(Exception):
    """The headers cannot be had; the message says what to do."""


def _stamp(source: HeaderSource) -> str:
    return f"{source.package}@{source.version} sha256 {source.sha256} licence {source.licence}\n"


def _is_current(source: HeaderSource, target: Path) -> bool:
    stamp = target / "SOURCE"
    return (
        (target / source.main_header).is_file()
        and stamp.is_file()
        and stamp.read_text(encoding="utf-8") == _stamp(source)
    )


def _download(source: HeaderSource, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(
            "npm is not on PATH; install it (Debian: apt-get install npm), or install ONNX Runtime's C headers "
            "and pass their folder with -C cmake.define.ORT_INCLUDE_DIR=DIR"
        )
    wanted = f"{source.package}@{source.version}"
    command = [npm, "pack", wanted, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise FetchError(f"npm cannot fetch {wanted}: {words}")
    archives = sorted(folder.glob("*.tgz"))
    if len(archives) != 1:
        raise FetchError(f"npm pack {wanted} left {len(archives)} archives in {folder}; one was expected")
    return archives[0]


def _check(source: HeaderSource, archive: Path) -> None:
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != source.sha256:
        raise FetchError(
            f"{archive.name} has SHA-256 {found}; {source.sha256} was expected. Nothing was unpacked: the archive is "
            "damaged or is not the one this script was written for"
        )


def _unpack(source: HeaderSource, archive: Path, target: Path) -> int:
    count = 0
    with tarfile.open(archive, mode="r:gz") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if path.parent != source.folder or path.suffix != ".h" or not member.isfile():
                continue
            stream = tar.extractfile(member)
            if stream is None:
                continue
            (target / path.name).write_bytes(stream.read())  # the bare name: nothing can leave the folder
            count += 1
    if not (target / source.main_header).is_file():
        raise FetchError(f"{archive.name} holds no {source.folder / source.main_header}")
    return count


def fetch(source: HeaderSource, cache: Path) -> str:
    """Put the headers of `source` into `cache`/<name>, whole or not at all.

    Returns:
        One line that says what was done.

    Raises:
        FetchError: npm is missing or fails, or the archive is not the pinned one.
    """
    target = cache / source.name
    if _is_current(source, target):
        return f"{target}: already there ({source.package} {source.version})"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{source.name}-") as scratch:
        work = Path(scratch)
        archive = _download(source, work)
        _check(source, archive)
        fresh = work / "headers"
        fresh.mkdir()
        count = _unpack(source, archive, fresh)
        (fresh / "SOURCE").write_text(_stamp(source), encoding="utf-8")
        if target.exists():
            target.rename(work / "old")
        fresh.rename(target)
    return f"{target}: {count} headers from {source.package} {source.version}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the headers that custom_ops/ is built against.")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "headers", help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        print(fetch(ONNXRUNTIME, arguments.cache))
    except FetchError as error:
        print(f"fetch_headers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
