"""What a sweep has done so far, on disk, so that a sweep that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from ibnorm_export.errors import IBNormError
from ibnorm_export.files import Kind, check_target, new_file, sha256_of
from ibnorm_export.parsing import parse_json

__all__ = ["SweepState"]

_MARK: Final = "progress of ibnorm-export evaluate --sweep"

_STATE: Final = Kind.marked("the progress of a sweep", _MARK.encode())


class SweepState:
    """Results of steps, each under the hash of everything that it depends on.

    Args:
        path: the file; created by the first result.

    Raises:
        IBNormError: the file cannot be read, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Any] = {}
        if not path.exists():
            return
        check_target(path, _STATE, error=IBNormError)
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            self._entries = dict(content["results"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise IBNormError(f"{path} is damaged; remove it, and the sweep starts again") from error

    def get(self, **facts: Any) -> dict[str, Any] | None:
        """The result of a step that depends on these facts; None if there is none."""
        found = self._entries.get(_key(facts))
        return found if isinstance(found, dict) else None

    def put(self, result: dict[str, Any], **facts: Any) -> dict[str, Any]:
        """Keep the result of a step, and return it.

        Raises:
            IBNormError: the file cannot be written.
        """
        self._entries[_key(facts)] = result
        with new_file(self.path, IBNormError, kind=_STATE) as folder:
            text = json.dumps({"what": _MARK, "results": self._entries}, indent=1)
            (folder / self.path.name).write_text(text, encoding="utf-8")
        return result


def _key(facts: dict[str, Any]) -> str:
    return sha256_of(json.dumps(facts, sort_keys=True).encode())
