"""Families whose experts transformers' registry does not have: one file each, called as transformers' folder of it is.

A file offers `MIXTURE`, see interface.py: which class of the modeling file holds stacked experts, and how a module of
it becomes one that holds each apart.  Nothing outside this folder asks for a model's name.
"""
