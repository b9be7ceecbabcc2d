"""Entry points with absl flags."""
