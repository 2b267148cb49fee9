"""Serving: a model repository for Triton and a server on it, and an endpoint that speaks OpenAI's text protocol.

Nothing is imported here: whoever serves in one of the two ways imports only the modules for it.
"""
