"""auto-round's side of compare.py, run by an environment of its own.

usage: python auto_round_side.py MODEL IDS.npy OUT SETTINGS_JSON      writes dequantised ("fake") weights to OUT
"""

import json
import sys

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoTokenizer

model, ids_file, out, settings = sys.argv[1:]
ids = torch.from_numpy(np.load(ids_file))
AutoRound(
    model,
    tokenizer=AutoTokenizer.from_pretrained(model),
    nsamples=len(ids),
    seqlen=ids.shape[1],
    batch_size=8,
    dataset=[row[None] for row in ids],
    device_map="cpu",
    **json.loads(settings),
).quantize_and_save(out, format="fake")
