"""One file for each architecture that the package knows."""
