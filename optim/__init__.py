"""How it learns: optax transformations."""
