"""The controller: a pure core (state), and the shell that gives it time, disk and network."""
