"""Serving: a model repository for Triton and a server on it, and an endpoint that speaks OpenAI's text protocol.

Nothing is imported here, so each way of serving loads only its own modules.
"""
