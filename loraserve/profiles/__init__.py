"""Profiles of engines: the ones that ship, and the reader of all. Made by tools/make_profiles.py."""
