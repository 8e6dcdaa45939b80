"""The OpenAI-compatible HTTP front of a cluster: a lookaside client like the SDK, in a process of
its own."""
