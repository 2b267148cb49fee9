#!/usr/bin/env python3
"""Fetch the headers of ONNX Runtime and TensorRT that custom_ops/ is built against.

    python scripts/fetch_headers.py

CMake finds them in .cache/headers/{onnxruntime,tensorrt} if neither ORT_INCLUDE_DIR or TENSORRT_INCLUDE_DIR nor the
system's include folders hold them. Headers that are already there are not fetched again. The npm and pip clients fetch
packages that contain the headers, because neither project publishes them as a package. The script checks the SHA-256 of
each archive before it reads it, and takes only plain `.h` files out of it.

It needs only the standard library, `npm` and `pip`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class HeaderSource:
    """One pinned archive and the folder of headers inside it."""

    name: str  # folder under .cache/headers
    client: Literal["npm", "pip"]
    package: str
    version: str
    sha256: str  # of the .tgz or .whl
    folder: PurePosixPath  # inside the archive
    main_header: str  # must be among the files taken
    licence: str


ONNXRUNTIME = HeaderSource(
    name="onnxruntime",
    client="npm",
    package="com.github.asus4.onnxruntime",
    version="0.4.9",
    sha256="e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d",
    folder=PurePosixPath("package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers"),
    main_header="onnxruntime_c_api.h",  # ORT_API_VERSION 29; the library itself asks for level 18
    licence="MIT",
)
TENSORRT = HeaderSource(
    name="tensorrt",
    client="pip",
    package="kernel-lens",
    version="2.0.1",
    sha256="07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0",
    folder=PurePosixPath("kernel_lens/include/tensorrt"),
    main_header="NvInferRuntime.h",  # 10.14.1; what the plugin uses is the same in 10.0 to 11.x
    licence="Apache-2.0",
)
SOURCES = (ONNXRUNTIME, TENSORRT)


class FetchError(Exception):
    """The headers cannot be fetched; the message says what to do."""


def _stamp(source: HeaderSource) -> str:
    return f"{source.package}@{source.version} sha256 {source.sha256} licence {source.licence}\n"


def _is_current(source: HeaderSource, target: Path) -> bool:
    stamp = target / "SOURCE"
    return (
        (target / source.main_header).is_file()
        and stamp.is_file()
        and stamp.read_text(encoding="utf-8") == _stamp(source)
    )


def _command(source: HeaderSource, folder: Path) -> list[str]:
    if source.client == "pip":
        wanted = f"{source.package}=={source.version}"
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
        return [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted]
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(
            "npm is not on PATH; install it (Debian: apt-get install npm), or install ONNX Runtime's C headers "
            "and pass their folder with -C cmake.define.ORT_INCLUDE_DIR=DIR"
        )
    wanted = f"{source.package}@{source.version}"
    return [npm, "pack", wanted, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]


def _download(source: HeaderSource, folder: Path) -> Path:
    done = subprocess.run(_command(source, folder), capture_output=True, text=True, check=False)
    wanted = f"{source.package} {source.version}"
    if done.returncode != 0:
        words = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise FetchError(f"{source.client} cannot fetch {wanted}: {words}")
    archives = sorted(file for file in folder.iterdir() if file.suffix in (".tgz", ".whl"))
    if len(archives) != 1:
        raise FetchError(f"{source.client} left {len(archives)} archives of {wanted} in {folder}, not 1")
    return archives[0]


def _check(source: HeaderSource, archive: Path) -> None:
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != source.sha256:
        raise FetchError(
            f"{archive.name} has SHA-256 {found}, not {source.sha256}. Nothing was unpacked: the archive is damaged or "
            "is not the version that this script names"
        )


def _members(archive: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Path and content of every plain file."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    yield PurePosixPath(info.filename), wheel.read(info)
        return
    with tarfile.open(archive, mode="r:gz") as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield PurePosixPath(member.name), stream.read()


def _unpack(source: HeaderSource, archive: Path, target: Path) -> int:
    count = 0
    for path, content in _members(archive):
        if path.parent == source.folder and path.suffix == ".h":
            (target / path.name).write_bytes(content)  # the bare name: nothing can leave the folder
            count += 1
    if not (target / source.main_header).is_file():
        raise FetchError(f"{archive.name} holds no {source.folder / source.main_header}")
    return count


def fetch(source: HeaderSource, cache: Path) -> str:
    """Put the headers of `source` into `cache`/<name>, whole or not at all.

    Returns:
        One line about what was done.

    Raises:
        FetchError: the client is missing or fails, or the archive is not the pinned one.
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
    failed = 0
    for source in SOURCES:
        try:
            print(fetch(source, arguments.cache))
        except FetchError as error:
            print(f"fetch_headers: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
