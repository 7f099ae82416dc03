"""Methods that round the linears of a block, one per file; the file's name is the method's."""
