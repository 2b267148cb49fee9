"""Runtimes that run a model: each runner takes arrays by input name and returns arrays by output name."""
