"""Rivals of packages in a benchmark that need more than a runtime: the float model in PyTorch."""
