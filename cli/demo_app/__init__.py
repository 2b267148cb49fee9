"""The demo: trains two small models, and exports, verifies and benchmarks both."""

from typing import Final

__all__ = ["MAX_STEPS"]

#: Training ends after so many steps even if the goal is not reached: several times what the demo's own data need.
MAX_STEPS: Final = 2000
