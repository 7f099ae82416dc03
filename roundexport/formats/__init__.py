"""The two public folders, artifact and package; specified in FORMAT.md."""
