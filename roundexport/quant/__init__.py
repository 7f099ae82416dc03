"""What a number looks like: schemes, codes, packing.  Numpy only; nothing here reads or writes a file."""
