"""One operation per file: a numpy reference first, a fast path beside it where one was measured to pay."""
