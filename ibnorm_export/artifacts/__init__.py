"""Data that packages exchange: tensors, loaded models, exported files and the files next to them."""
