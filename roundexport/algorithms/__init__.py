"""Rounding methods, one per file; each defines ``Settings`` and ``tune_block``."""
