"""Latency of exported models and of PyTorch, and a verdict on the difference."""
