"""Timing packages and rivals in turn, each in a process of its own."""
