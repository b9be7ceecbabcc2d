"""What is computed: flax.nnx modules."""
