"""Learning by reward: pure functions over environments given as functions (`ppo`)."""
