"""Passes over an exported graph, each a module: in, out and what holds after are in its first lines."""
