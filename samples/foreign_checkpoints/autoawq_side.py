"""Checkpoints that AutoAWQ writes of a model, in its own environment.

autoawq_side.py MODEL TEXT OUT
"""

import sys
from pathlib import Path

from awq import AutoAWQForCausalLM
from transformers import PreTrainedTokenizerFast

CASES = {"awq-by-autoawq-gemm-g32": 32, "awq-by-autoawq-gemm-g128": 128}


def main(model: str, text: Path, out: Path) -> None:
    """Make every case that is not there; one that fails is told and left out."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(model) / "tokenizer.json"))
    words = text.read_text(encoding="utf-8")
    for name, group in CASES.items():
        if (out / name).is_dir():
            continue
        try:
            tuned = AutoAWQForCausalLM.from_pretrained(model, device_map="cpu")
            settings = {"w_bit": 4, "q_group_size": group, "zero_point": True, "version": "GEMM"}
            samples = [words[at : at + 2000] for at in range(0, 32_000, 2000)]
            tuned.quantize(tokenizer, quant_config=settings, calib_data=samples, max_calib_samples=8,
                           max_calib_seq_len=64)  # fmt: skip
            tuned.save_quantized(str(out / f"{name}.partial"))
            tokenizer.save_pretrained(str(out / f"{name}.partial"))
            (out / f"{name}.partial").rename(out / name)
            print(f"made {name}", flush=True)
        except Exception as error:
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
