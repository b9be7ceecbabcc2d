"""One file a system: paper, command, claims, measurement."""
