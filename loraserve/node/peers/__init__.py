"""Packed adapters from node to node: what a node gives to others, and how it reads from them."""
