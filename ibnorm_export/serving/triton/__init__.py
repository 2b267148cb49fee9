"""Model repositories for Triton, and a Triton server on this machine."""
