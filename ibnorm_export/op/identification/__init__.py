"""Which member of the IBNorm family a norm of unknown code is."""
