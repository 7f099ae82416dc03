"""Checkpoints that AutoAWQ writes of a model, in its own environment: the layouts gemm and gemv.

    autoawq_side.py MODEL TEXT OUT [NAME…]

AutoAWQ 0.2.9 is its last version; it runs with transformers 4.51.3.  Without its search for where to clip, which takes
most of its time and changes nothing in how integers are stored.
"""

import sys
from pathlib import Path
from typing import Any

from awq import AutoAWQForCausalLM
from cases import make
from transformers import PreTrainedTokenizerFast

CASES: dict[str, dict[str, Any]] = {
    "awq-by-autoawq-gemm-w4g32-asym": {"q_group_size": 32, "version": "GEMM"},
    "awq-by-autoawq-gemm-w4g64-asym": {"q_group_size": 64, "version": "GEMM"},
    "awq-by-autoawq-gemm-w4g128-asym": {"q_group_size": 128, "version": "GEMM"},
    "awq-by-autoawq-gemv-w4g64-asym": {"q_group_size": 64, "version": "GEMV"},
}
LENGTH = 64


def main(model: str, text: Path, out: Path, names: list[str]) -> int:
    """Make every case that is asked for, all by default; returns how many failed."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(model) / "tokenizer.json"))
    ids = tokenizer(text.read_text(encoding="utf-8")[:20_000])["input_ids"]
    samples = [ids[at : at + LENGTH] for at in range(0, 8 * LENGTH, LENGTH)]  # longer ones it leaves out

    def one(name: str, settings: dict[str, Any], folder: Path) -> None:
        tuned = AutoAWQForCausalLM.from_pretrained(model, device_map="cpu")
        tuned.quantize(tokenizer, quant_config={"w_bit": 4, "zero_point": True, **settings}, calib_data=samples,
                       max_calib_samples=len(samples), max_calib_seq_len=LENGTH, apply_clip=False)  # fmt: skip
        tuned.save_quantized(str(folder))
        tokenizer.save_pretrained(str(folder))

    return make(CASES, one, model, out, names, "q_group_size")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]) > 0)
