"""Turn a loaded model into the files that a runtime serves."""
