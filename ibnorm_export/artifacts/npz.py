"""Read NumPy files from an untrusted source: .npz with arrays by name, .npy with one array, never pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.tensors import Arrays
from ibnorm_export.errors import ModelFileError

__all__ = ["read_npy", "read_npz"]


def _load(path: str | Path, what: str) -> Arrays | NDArray[Any]:
    try:
        with Path(path).open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                array: NDArray[Any] = loaded
                return array
            arrays = {name: loaded[name] for name in loaded.files}
            for name, value in arrays.items():
                if not isinstance(value, np.ndarray):  # NumPy returns bytes for a member that is not an array
                    raise TypeError(f"its member {name!r} is not an array; save it with numpy.savez")
            return arrays
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} does not exist") from error
    # Deliberately broad: on malformed files, NumPy, zipfile, zlib, lzma and the header parser raise a dozen types of
    # exception (RuntimeError for an encrypted file), and the block only reads.
    except Exception as error:
        raise ModelFileError(f"{path} is not {what}: {error or type(error).__name__}") from error


def read_npz(path: str | Path, what: str) -> Arrays:
    """Read an .npz file.

    Args:
        path: the file.
        what: what the file should be, with an article, for messages.

    Returns:
        Arrays by name.

    Raises:
        ModelFileError: the file is missing, damaged or encrypted, or does not contain arrays by name.
    """
    loaded = _load(path, what)
    if not isinstance(loaded, dict):
        raise ModelFileError(
            f"{path} is not {what}: it contains one array; save each input under its name with numpy.savez"
        )
    return loaded


def read_npy(path: str | Path, what: str) -> NDArray[Any]:
    """Read a .npy file, which contains one array; arguments and errors are those of `read_npz`."""
    loaded = _load(path, what)
    if isinstance(loaded, dict):
        raise ModelFileError(f"{path} is not {what}: it contains several arrays")
    return loaded
