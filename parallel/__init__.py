"""Where it runs: layouts, sharding rules, training steps, checkpoints."""
