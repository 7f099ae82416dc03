"""Mamba's first version: its mixer multiplies with the weight of dt_proj itself, and adds the bias inside the scan.

That weight stays float (schemes/rules.py) and is a plain matrix of the graph; the rest is found without a name.
"""

from .interface import Architecture

ARCHITECTURE = Architecture({}, whole_tables=("dt_proj",), asks=True)
