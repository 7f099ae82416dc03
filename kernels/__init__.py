"""One operation per file: a numpy reference, and a faster implementation where one was measured to be worth it."""
