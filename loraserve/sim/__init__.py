"""A cluster in simulated time: the real controller core and router decide, over engine models."""
