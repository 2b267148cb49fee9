"""What each norm of a model does to its inputs."""
