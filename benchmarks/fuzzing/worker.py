"""The process of the suite `fuzz`: it makes a case from its number, gives it to a reader, and reports what happened."""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from benchmarks.fuzzing.readers import READERS, Unfit, check_message
from ibnorm_export.errors import IBNormError

__all__ = ["SHOW_THREADS", "run_case"]

#: Seconds of processor time after which a case counts as a hang.
_CASE_S: Final = 30.0

#: On this signal the process writes what its threads do to standard error.
SHOW_THREADS: Final = signal.SIGUSR1


def run_case(name: str, case: int, *, corpus: Path) -> dict[str, Any]:
    """Make a case from its number, give it to a reader, and put the good file back.

    Returns:
        "accepted", and "failure" with "where" if the reader did something else than accept or refuse; "seconds" of
        processor time, and "peak_mb" of memory so far.
    """
    reader = READERS[name]
    file = corpus / reader.file
    original = file.read_bytes()
    file.write_bytes(reader.change(original, random.Random(f"{name} {case}")))
    begin = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, _CASE_S)
    answer: dict[str, Any] = {}
    try:
        try:
            answer["accepted"] = reader.read(file, corpus)
        except IBNormError as error:
            answer["accepted"] = False
            check_message(str(error))
    except Unfit as error:
        answer |= {"failure": str(error), "where": ""}
    except BaseException as error:  # noqa: BLE001  # what is looked for
        where = "".join(traceback.format_exception(error))[-3000:]
        answer |= {"failure": f"{type(error).__name__}: {error}"[:500], "where": where}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        file.write_bytes(original)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**answer, "seconds": round(time.process_time() - begin, 3), "peak_mb": round(peak, 1)}


def _too_long(signum: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"more than {_CASE_S:g} s of processor time")


def main() -> int:
    """Print a line when everything slow is loaded, then answer lines until standard input ends."""
    corpus, memory_mb = Path(sys.argv[1]), int(sys.argv[2])
    import torch

    import ibnorm_export.models.loading  # noqa: F401  # so that its memory is not part of a case

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _too_long)
    faulthandler.register(SHOW_THREADS)
    out = sys.stdout
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(run_case(wanted["reader"], wanted["case"], corpus=corpus)), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
