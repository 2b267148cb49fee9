"""The demo: trains two small models, and exports, verifies and benchmarks both."""

from typing import Final

__all__ = ["MAX_STEPS"]

#: Training ends after this many steps even if the goal is not reached. The demo's own data need only a fraction of it.
MAX_STEPS: Final = 2000
