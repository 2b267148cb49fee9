"""Latency of exported models and of PyTorch, with a verdict on the difference."""
