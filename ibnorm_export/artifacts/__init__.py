"""Data that the rest of the package exchanges: tensors, loaded models, exported files and their companions."""
