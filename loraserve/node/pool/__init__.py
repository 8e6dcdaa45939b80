"""The node's host memory for packed adapters: one arena, cut into slots."""
