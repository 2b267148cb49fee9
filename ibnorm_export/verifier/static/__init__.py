"""What the file states, read without running it: every node, constant and number against the checkpoint."""
