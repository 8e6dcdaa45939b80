"""Which node holds which adapter: pure functions from a problem to a placement."""
