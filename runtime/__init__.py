"""Serving packages: engines, generation, bench.  Imports neither torch nor transformers."""
