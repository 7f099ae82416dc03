"""From a float model to an artifact of integers, block by block, resumable."""
