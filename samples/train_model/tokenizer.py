"""Train the sample model's tokenizer on a folder of novels and write their tokens: tokenizer.py BOOKS OUT."""

import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def main(books: Path, out: Path) -> None:
    """Write tokenizer files and tokens.bin (uint16, novels in name order, each ended by <|endoftext|>) to ``out``."""
    files = sorted(map(str, books.glob("*.txt")))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(files, trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special[0],
        bos_token=special[0],
        pad_token=special[3],
        model_max_length=1024,
    )
    fast.save_pretrained(out)
    ids: list[int] = []
    for file in files:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
        for encoding in tokenizer.encode_batch([line + "\n" for line in lines]):
            ids += encoding.ids
        ids.append(0)
    np.array(ids, dtype=np.uint16).tofile(out / "tokens.bin")
    print(f"{len(files)} novels, {len(ids)} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
