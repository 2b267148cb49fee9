"""Figures that describe what each norm of a model does to its input."""
