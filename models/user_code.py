"""Import what the user names as "package.module:attribute"."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from ibnorm_export.errors import CheckpointError, shortened

__all__ = ["import_object"]


def import_object(reference: str, *, where: str, malformed: str) -> Any:
    """Import "package.module:attribute", also from the working directory. The attribute may have dots.

    Args:
        reference: what the user typed.
        where: begins the message of an error, e.g. "--model net:make".
        malformed: the message for a reference of another form.

    Raises:
        CheckpointError: the reference has another form, there is no such module or attribute, or the user's code fails.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise CheckpointError(malformed)
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's code is usually in the working directory, as for `python -m`
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{where}: no module named {error.name!r}; run from the folder that contains it, or install it"
        ) from error
    except Exception as error:  # importing runs the user's own code, which may raise anything
        raise CheckpointError(f"{where}: {type(error).__name__}: {shortened(str(error))}") from error
    return found
