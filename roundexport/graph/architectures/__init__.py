"""Families whose code keeps its attention to itself: one file each, called as transformers' folder of the family is.

A file offers `ARCHITECTURE`, see interface.py: methods of the family's classes that, while the model is traced, hand
queries, keys, values and biases to the placeholder instead of multiplying them on the spot.  No other file of the
graph or of a target's lowering asks for a model's name.  What families call their tensors on disk is in tables of
roundexport/model, what clients call families is where their files are written; tests/test_model_names.py lists them.
"""
