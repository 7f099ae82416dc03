"""What the default description of a transformers model cannot find by itself."""
