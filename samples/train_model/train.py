"""Train the sample model from scratch: train.py TOKENS_FOLDER MINUTES OUT.

A Llama shape of 4.2 M parameters on windows of 512 tokens drawn without replacement; AdamW, peak learning rate 3e-3,
100 steps of warm-up and cosine decay to 2 % by wall clock, weight decay 0.1 on matrices, gradients clipped at 1.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH, PEAK = 512, 8, 3e-3


def build() -> LlamaForCausalLM:
    """The untrained model, seed 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, rope_theta=10000.0, tie_word_embeddings=True,
        rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, pad_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main(tokens: Path, minutes: float, out: Path) -> None:
    """Train for so many minutes and save in bfloat16."""
    torch.set_num_threads(2)
    model = build()
    text = np.memmap(tokens / "tokens.bin", dtype=np.uint16, mode="r")
    windows = (len(text) - 1) // LENGTH
    order = np.random.default_rng(0).permutation(windows)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)
    started, step = time.time(), 0
    model.train()
    while (share := (time.time() - started) / (60 * minutes)) < 1 and (step + 1) * BATCH <= windows:
        rate = PEAK * min(1, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        drawn = order[step * BATCH : (step + 1) * BATCH]
        batch = torch.from_numpy(np.stack([text[i * LENGTH : (i + 1) * LENGTH] for i in drawn]).astype(np.int64))
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}  rate {rate:.2e}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
