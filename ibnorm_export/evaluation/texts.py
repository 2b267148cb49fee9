"""Texts on disk, document by document: .txt, .jsonl, .parquet, and folders of `datasets`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ibnorm_export.errors import IBNormError, quoted, shortened
from ibnorm_export.files import sha256_of
from ibnorm_export.optional_packages import import_package
from ibnorm_export.parsing import parse_json

__all__ = ["Document", "TextData"]

_SUFFIXES: Final = (".txt", ".jsonl", ".parquet", ".arrow")

#: Keys of a record that may have the text; the first that is there is taken.
_KEYS: Final = ("text", "content", "page")

#: Half of a pair of code units, which JSON can state and UTF-8 cannot.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")

#: Characters of a document of a .txt file. A longer file is cut at the end of a line.
_PIECE: Final = 1 << 20

#: Characters of a line of a .jsonl file.
_LINE: Final = 64 << 20

_WHAT: Final = (
    "nothing is downloaded: put there a .txt file, a .jsonl or .parquet file with a text in each record (text), or a "
    "folder of these or of datasets.save_to_disk"
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text, whose first tokens have no context."""

    name: str
    text: str


class TextData:
    """The texts of a file or folder, in the order of their names. No more than one document is in memory.

    Args:
        path: the file or folder.

    Raises:
        IBNormError: nothing is there, or no text.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise IBNormError(f"{self.path} does not exist; {_WHAT}")
        if (self.path / "dataset_dict.json").is_file():
            splits = sorted(entry.name for entry in self.path.iterdir() if entry.is_dir())
            raise IBNormError(
                f"{self.path} has the splits {', '.join(splits)}; give one of them, e.g. {self.path / splits[-1]}"
                if splits
                else f"{self.path} is a folder of datasets without splits; {_WHAT}"
            )
        if self.path.is_dir():
            inside = (file for file in sorted(self.path.rglob("*")) if file.suffix.lower() in _SUFFIXES)
            self.files = tuple(file for file in inside if file.is_file() and not _is_cache(file))
        else:
            self.files = (self.path,)
        if not self.files:
            raise IBNormError(f"{self.path} has no file that ends in {', '.join(_SUFFIXES)}; {_WHAT}")
        if self.files[0].suffix.lower() not in _SUFFIXES:
            raise IBNormError(f"{self.path} ends in {quoted(self.path.suffix)}; it must be {', '.join(_SUFFIXES)}")

    def sha256(self) -> str:
        """Hash of names and contents."""
        found = hashlib.sha256()
        for file in self.files:
            found.update(f"{self._name(file)}\0{sha256_of(file)}\0".encode(errors="surrogateescape"))
        return found.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not empty.

        Raises:
            IBNormError: a file is damaged, or a record has no text.
            BackendUnavailable: pyarrow is needed and not installed.
        """
        readers = {".txt": _plain, ".jsonl": _lines, ".parquet": _parquet, ".arrow": _arrow}
        for file in self.files:
            pieces = readers[file.suffix.lower()](file)
            while True:
                try:
                    number, text = next(pieces)
                except StopIteration:
                    break
                except (OSError, ValueError, TypeError, NotImplementedError) as error:  # pyarrow's are among these
                    raise IBNormError(f"{file} cannot be read: {shortened(str(error))}") from error
                if not text.isascii() and _SURROGATE.search(text):
                    raise IBNormError(
                        f"{file} cannot be read: text {number} has an unpaired surrogate, which is not valid text"
                    )
                if text.strip():
                    yield Document(f"{self._name(file)}:{number}", text)

    def _name(self, file: Path) -> str:
        return file.name if file == self.path else file.relative_to(self.path).as_posix()


def _is_cache(file: Path) -> bool:
    """Whether a file is a result that `datasets` keeps beside a data set, whose texts it would repeat."""
    return file.suffix == ".arrow" and file.name.startswith("cache-")


def _plain(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        number = 0
        while piece := stream.read(_PIECE):
            if len(piece) == _PIECE:
                piece += stream.readline(_PIECE)
            number += 1
            yield number, piece


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8-sig") as stream:
        number = 0
        while line := stream.readline(_LINE):
            number += 1
            if line.strip():
                yield number, _text_of(parse_json(line), number)


def _text_of(record: Any, number: int) -> str:
    if isinstance(record, dict):
        for key in _KEYS:
            if isinstance(record.get(key), str):
                return str(record[key])
        raise ValueError(f"record {number} has the keys {quoted(sorted(record))}; it must have a text under {_KEYS[0]}")
    if isinstance(record, str):
        return record
    raise ValueError(f"record {number} is {quoted(record)}; it must be an object with a text under {_KEYS[0]}")


def _column(names: list[str]) -> str:
    for key in _KEYS:
        if key in names:
            return key
    raise ValueError(f"it has the columns {quoted(names)}; it must have a column {_KEYS[0]}")


def _parquet(file: Path) -> Iterator[tuple[int, str]]:
    parquet = import_package("pyarrow.parquet", extra="evaluate", purpose=f"reading {file}")
    with parquet.ParquetFile(file) as table:
        column = _column(table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=64, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield number, str(text or "")


def _arrow(file: Path) -> Iterator[tuple[int, str]]:
    """The format of `datasets.save_to_disk`: a stream of record batches."""
    pyarrow = import_package("pyarrow", extra="evaluate", purpose=f"reading {file}")
    ipc = import_package("pyarrow.ipc", extra="evaluate", purpose=f"reading {file}")
    with pyarrow.memory_map(str(file)) as source, ipc.open_stream(source) as stream:
        column = _column(stream.schema.names)
        number = 0
        for batch in stream:
            for text in batch.column(column):
                number += 1
                yield number, str(text.as_py() or "")
