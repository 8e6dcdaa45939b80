"""Profiles of engines: those that ship (tools/make_profiles.py), and the reader of all."""
