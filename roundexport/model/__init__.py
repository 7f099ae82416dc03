"""A Hugging Face model in pieces: its files, its blocks one at a time, and how a block is called."""
