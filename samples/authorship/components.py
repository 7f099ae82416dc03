"""What each part of BCT costs: cosine to the float vectors with that part rounded and everything else as it was.

    python samples/authorship/components.py OUT/integers.safetensors [--texts 100] [--model FOLDER]

The file is one that compare.py made.  First whether the numpy reference and the torch simulation give the same codes
for one text; then the whole, its weights, its tables of embeddings, and all of its intermediates in the float model;
then each intermediate alone.  No tensor of the model is trained or fitted here.
"""

import argparse
from collections.abc import Collection
from pathlib import Path

import numpy as np
import task
import torch
from compare import default_model
from torch import Tensor

from roundexport.integer_encoder import files, shifts
from roundexport.integer_encoder.embedder import Embedder
from roundexport.integer_encoder.float_encoder import EMBEDDING_NORM, LINEARS, TABLES, FloatEncoder
from roundexport.kernels import integer_encoder
from roundexport.kernels.integer_encoder import IntegerEncoder
from roundexport.model.checkpoint import Checkpoint


def weights_of(floats: FloatEncoder, integers: IntegerEncoder) -> dict[str, Tensor]:
    """Every weight of an integer encoder as floats, by the float model's names."""
    found = {
        f"{name}.weight": table.weight.dequantize() for name, table in zip(TABLES, integers.embeddings, strict=True)
    }
    norms = {EMBEDDING_NORM: integers.norm}
    for index, block in enumerate(integers.blocks):
        norms |= {
            floats.norm_name(index, "middle"): block.middle_norm,
            floats.norm_name(index, "last"): block.last_norm,
        }
        for tensor in LINEARS:
            linear, name = getattr(block, tensor), floats.linear(index, tensor)
            found |= {f"{name}.weight": linear.weight.dequantize(), f"{name}.bias": linear.bias.values()}
    for name, norm in norms.items():
        found |= {f"{name}.weight": norm.weight.values(), f"{name}.bias": norm.bias.values()}
    return {name: torch.from_numpy(values) for name, values in found.items()}


def differing(embedder: Embedder, integers: IntegerEncoder, text: str) -> tuple[int, int]:
    """Codes of a text's last hidden states that the reference and the simulation do not share, of how many."""
    ids = torch.tensor([embedder.tokenizer.encode(text).ids])
    inputs = ids, torch.ones_like(ids), torch.zeros_like(ids)
    codes = integer_encoder.reference(*(given.numpy() for given in inputs), integers)
    return int((integer_encoder.run(*inputs, integers).numpy() != codes).sum()), codes.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--model", type=Path)
    chosen = parser.parse_args()
    checkpoint = Checkpoint.open(str(chosen.model or default_model()))
    floats, integers = FloatEncoder.of(checkpoint), files.read(chosen.file)
    texts = task.read().test
    texts = texts[:: max(1, len(texts) // chosen.texts)][: chosen.texts]
    reference = Embedder.of(checkpoint, lambda *inputs: floats(*inputs).numpy()).embed(texts)

    others, codes = differing(Embedder.of_integers(checkpoint, integers), integers, texts[0])
    print(f"simulation and reference: {others} of {codes:,} codes differ", flush=True)

    def tell(name: str, embedder: Embedder) -> None:
        print(f"{name:28}{task.cosine(reference, embedder.embed(texts)):8.4f}", flush=True)

    def of(encoder: FloatEncoder, rounded: Collection[str] = ()) -> Embedder:
        def hidden(ids: Tensor, mask: Tensor, types: Tensor) -> np.ndarray:
            first = integers.norm.leaving
            x = encoder.embed(
                ids, types, lambda name, values: shifts.rounded(values, first) if name in rounded else values
            )
            for index, block in enumerate(integers.blocks):
                formats = files.formats_of(block)

                def tap(name: str, values: Tensor, formats: dict = formats) -> Tensor:
                    return shifts.rounded(values, formats[name]) if name in rounded else values

                x = encoder.run_block(index, x, mask, tap)
            return x.numpy()

        return Embedder.of(checkpoint, hidden)

    weights = weights_of(floats, integers)
    tables = {name: values for name, values in weights.items() if name.removesuffix(".weight") in TABLES}
    names = ("embedded", *files.INTERMEDIATES)
    tell("everything, in integers", Embedder.of_integers(checkpoint, integers))
    tell("weights", of(floats.with_weights(weights)))
    tell("tables of embeddings", of(floats.with_weights(tables)))
    tell("all intermediates", of(floats, names))
    for name in names:
        tell(f"  {name}", of(floats, (name,)))


if __name__ == "__main__":
    main()
