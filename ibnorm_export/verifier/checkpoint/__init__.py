"""What PyTorch computes from the checkpoint, on which inputs, and what it uses."""
