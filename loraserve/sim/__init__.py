"""A cluster in simulated time: the real controller core and router decide, engines follow a profile."""
