"""Families whose code keeps its attention to itself: one file each, called as transformers' folder of the family is.

A file offers `ARCHITECTURE`, see interface.py: methods of the family's classes that, while the model is traced, hand
queries, keys, values and biases to the placeholder instead of multiplying them on the spot.  Nothing outside this
folder asks for a model's name.
"""
