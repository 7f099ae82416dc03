"""Runtimes that open a package, one per file; the file's name is the engine's."""
