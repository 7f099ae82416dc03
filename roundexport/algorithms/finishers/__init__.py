"""Methods that refine the whole model after its blocks were rounded; one per file."""
