"""The demo: trains two small models and takes them through every command."""
