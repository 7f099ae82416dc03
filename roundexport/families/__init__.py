"""Families of models: those that are tried, what each came to, and the run that tries them (`list families`)."""
