"""Rounding methods, one per file; the file's name is the method's.

Each defines

    NEEDS_CALIBRATION   whether it looks at hidden states; where not, ``tune_block`` is given None for them
    Settings            frozen dataclass, every field with a default; fields called steps and batch_size take the values
                        that `tune` was given.  ``cost(samples)``: block forwards over one sample that a block takes
    tune_block(block, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings) -> BlockResult

and a header that teaches the method.  A method sees one block at a time and returns its integers; it writes no files.
"""
