"""Checkpoints that others have quantized: one file per format, each reading its integers as they are.

interface.py is the seam; a file in this folder enrolls a format.  Nothing here rounds or computes: what a format holds
that `(code - zero_point) · scale` cannot hold exactly is refused by name.
"""
