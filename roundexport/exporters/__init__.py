"""Formats of others that an artifact is written in: one file per format, each storing the same integers as they are.

interface.py is the seam; a file in this folder enrolls a format.  Nothing here rounds: what a format cannot hold
exactly is refused by name before anything is written.
"""
