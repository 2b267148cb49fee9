"""The command line. Importing it sets one environment variable that must be set before torch is loaded.

The idle threads of GNU OpenMP spin for milliseconds before they sleep. On a busy machine they take the cores from the
threads that have work, and training that takes one second can take twenty. A short spin costs nothing measurable on an
idle machine. A value that the user has set is kept.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
