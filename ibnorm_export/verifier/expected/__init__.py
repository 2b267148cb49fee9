"""Values that the training code saved: what the checkpoint and the file give for the same inputs."""
