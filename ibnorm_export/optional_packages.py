"""Packages that only some functions need: imported when they are used, with one clear error if one is missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from ibnorm_export.errors import BackendUnavailable

__all__ = ["demand_package", "import_package"]


def _error(name: str, *, extra: str, purpose: str) -> BackendUnavailable:
    package = name.partition(".")[0]
    return BackendUnavailable(
        f"{purpose} needs the package {package}, which is not installed: pip install 'ibnorm-export[{extra}]'"
    )


def import_package(name: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        name: the module, e.g. "matplotlib.figure".
        extra: the extra of this package that installs it.
        purpose: what needs it, for the message.

    Raises:
        BackendUnavailable: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise  # the package is installed, but one of its dependencies is not
        raise _error(name, extra=extra, purpose=purpose) from error


def demand_package(name: str, *, extra: str, purpose: str) -> None:
    """Raise the error of `import_package` early, before long work, without importing the package.

    Raises:
        BackendUnavailable: the package is not installed.
    """
    try:
        found = importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # ValueError: an entry of sys.modules without a specification
        found = False
    if not found:
        raise _error(name, extra=extra, purpose=purpose)
