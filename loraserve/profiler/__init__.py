"""Measures what an engine's steps cost: `loraserve bench profile`."""
