"""One step of a check, whose failure does not end the check."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ibnorm_export.errors import BackendUnavailable, IBNormError
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.gate.case import Case, Outcome

__all__ = ["attempt"]


@contextmanager
def attempt(cases: list[Case], *, suite: str, name: str) -> Iterator[None]:
    """Turn an exception of the block into a red case, and continue after the block."""
    start = time.perf_counter()
    try:
        yield
    # Broad on purpose: if anything stops one export, backend or budget, even a defect of this program or of a
    # runtime, the others are still checked and the reports are written. The case is red, so nothing is hidden, and an
    # interrupt is not an Exception.
    except Exception as error:  # noqa: BLE001
        message = str(error) if isinstance(error, IBNormError) else f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
        code = FindingCode.BACKEND_MISSING if isinstance(error, BackendUnavailable) else FindingCode.STEP_FAILED
        cases.append(Case(suite, name, outcome=Outcome.ERROR, message=message, seconds=seconds, code=code))
