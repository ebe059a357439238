"""Exact, dense storage: bit streams in words, matrices in tiles."""
