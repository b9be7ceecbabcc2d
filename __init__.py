"""narrows: bottlenecks in JAX, measured in bits, bytes and seconds."""

__version__ = "0.1.0"
