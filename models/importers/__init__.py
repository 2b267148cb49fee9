"""Readers of checkpoint folders: those of transformers and those of timm."""
