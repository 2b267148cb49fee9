"""`python -m ibnorm_export` is the command `ibnorm-export`."""

from __future__ import annotations

from ibnorm_export.cli.__main__ import run

__all__: list[str] = []

if __name__ == "__main__":
    run()
