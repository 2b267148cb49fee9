"""The results of each sample as a parquet file, for other tools. The journal has the same as JSON lines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ibnorm_export.errors import BackendUnavailable, IBNormError
from ibnorm_export.evaluation.journal import Journal
from ibnorm_export.files import new_file
from ibnorm_export.optional_packages import import_package

__all__ = ["write_result_files"]

#: Rows that are in memory at a time.
_ROWS: Final = 10_000


def write_result_files(journals: Sequence[Journal]) -> tuple[tuple[Path, ...], str]:
    """Write a parquet file beside each journal.

    Returns:
        The files, and a note if there are none because pyarrow is not installed; then the journals are the files.

    Raises:
        IBNormError: a file cannot be written.
    """
    try:
        return tuple(_write(journal) for journal in journals), ""
    except BackendUnavailable as error:
        return tuple(journal.path for journal in journals), f"results stay in .jsonl: {error}"


def _write(journal: Journal) -> Path:
    arrow = import_package("pyarrow", extra="evaluate", purpose="writing parquet")
    parquet = import_package("pyarrow.parquet", extra="evaluate", purpose="writing parquet")
    texts = [(name, arrow.string()) for name in ("sample", "answer", "unreadable")]
    numbers = [(name, arrow.float64()) for name in journal.columns]
    schema = arrow.schema([*texts, *numbers], metadata=dict(journal.head))
    path = journal.path.with_suffix(".parquet")
    with new_file(path, IBNormError) as folder, parquet.ParquetWriter(folder / path.name, schema) as writer:
        results = journal.results()
        while rows := list(itertools.islice(results, _ROWS)):
            missing = (None,) * len(journal.columns)
            values = zip(*(row.values or missing for row in rows), strict=True)
            columns = [[row.name for row in rows], [row.answer for row in rows], [row.unreadable for row in rows]]
            writer.write_table(arrow.table([*columns, *map(list, values)], schema=schema))
    return path
