"""roundexport."""
