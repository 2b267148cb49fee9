"""The forms in which a file may hold a weight of its checkpoint."""
