"""Readers of checkpoint formats other than a Hugging Face folder."""
