"""One-command serving: a controller, nodes and a gateway on this machine as one process tree."""
