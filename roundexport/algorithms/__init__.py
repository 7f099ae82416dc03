"""Methods, one per file; the file's name is the method's, its folder the method's role.

    rounding/      rounds the linears of a block
    transforms/    changes a block to an equivalent one that rounds better
    finishers/     tunes the whole model after its blocks
    common/        what several of them share

A file has a header that teaches the method, a frozen dataclass of settings, the functions of its role, and one value
METHOD that says so: see interface.py.  A method sees one block at a time and returns its integers; it writes no files.
"""
