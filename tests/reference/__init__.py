"""Slow, dense, obvious twins of what the package computes in a clever way."""
