"""Compares an exported file with the checkpoint that it was exported from."""
