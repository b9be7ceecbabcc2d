"""Kernels, each behind its plain definition."""
