"""Profiles of engines: the ones that ship, and the reader of all."""
