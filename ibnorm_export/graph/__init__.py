"""Passes over an exported graph. The docstring of each states what must hold before and what holds after."""
