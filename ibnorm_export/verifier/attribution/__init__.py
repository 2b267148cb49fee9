"""Where the error of a failing file comes from: which step of the export, and which layer."""
