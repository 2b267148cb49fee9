"""An endpoint that speaks OpenAI's text protocol."""
