"""From a loaded model to files that a runtime serves."""
