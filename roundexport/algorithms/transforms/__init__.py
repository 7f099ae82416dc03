"""Methods that make a block, or the model, easier to round without changing what it computes; one per file."""
