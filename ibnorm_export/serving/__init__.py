"""From an exported model to an endpoint: a model repository and a real Triton on it, or OpenAI's text protocol.

Nothing is imported here: each module is loaded by whoever serves that way.
"""
