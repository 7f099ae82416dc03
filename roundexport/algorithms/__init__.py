"""Methods, one per file; the file's name is the method's.

Some round a block, some transform it before it is rounded, some finish the whole model.

Each defines

    NEEDS_CALIBRATION   whether it looks at hidden states; where not, ``tune_block`` is given None for them
    Settings            frozen dataclass, every field with a default; fields called steps and batch_size take the values
                        that `tune` was given.  ``cost(samples)``: block forwards over one sample that a block takes
    tune_block(block, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings) -> BlockResult
                        a rounding method
    transform_block(block, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings) -> dict[str, Tensor]
                        a transformation: changes the block in place to an equivalent one; returns what it changed other
                        than weights in ``specs``, by parameter name in the block
    finish(inputs: FinishInputs, settings) -> FinishResult
                        a finish: tunes the whole model after its blocks, see end_to_end.py
    train_model, fold_model
                        a transformation of the whole model at once, see teq_model.py

and a header that teaches the method.  A method sees one block at a time and returns its integers; it writes no files.
"""
