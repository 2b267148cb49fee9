"""The command line. Importing it settles one thing that must be settled before torch is loaded.

GNU OpenMP lets idle threads spin for milliseconds. On a machine that does anything else besides, the spinning threads
take the cores from the working ones: training the demo's ViT on two busy cores fell from 12 steps a second to 0.5.
A short spin costs nothing measurable on an idle machine. A value that the user has set stays.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
