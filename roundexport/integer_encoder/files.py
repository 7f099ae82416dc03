"""An integer encoder on disk: one safetensors file with everything that computing takes, and nothing in float.

    <linear or table>.codes      U8 [N, ceil(K·bits/8)]     packed as everywhere (quant/packing.py)
    <linear or table>.exponents  U8 [N, G]                  sign and exponent (quant/power_of_two.py)
    <norm or bias>               I8 [C]                     eight-bit vectors
    vectors                      U8 [vectors]               their exponents, in the order of their names
    <block>.shifts               I8 [Σ blocks]              exponents of the intermediates, in `INTERMEDIATES`' order
    embedded                     I8 [blocks]                those of the first hidden states
    <block>.activation           I8 [pairs, 256]            tables of the activation
    exp, reciprocal, root        U8, U16, U16 [256]         tables of softmax and norms

Metadata: heads, activation, bits of weights and of the tensors that are only added, and blocks per tensor.

Tables are a function of the exponents and could be made again; they are stored because a device without floats needs
them, and so that the size is the whole size.  A reader makes them and holds them against the file, which tells a
processor whose exp rounds a value differently.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError
from roundexport.kernels import integer_attention
from roundexport.kernels._block_format import Format
from roundexport.kernels.integer_attention import IntegerAttention
from roundexport.kernels.integer_encoder import Embedding, IntegerBlock, IntegerEncoder
from roundexport.kernels.integer_layer_norm import IntegerLayerNorm, Summand
from roundexport.kernels.integer_linear import IntegerLinear
from roundexport.kernels.integer_table import IntegerTable
from roundexport.quant import power_of_two
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.safetensors_writer import write_tensors

from .float_encoder import EMBEDDING_NORM, LINEARS, NORMS, SUMMED, TABLES

FORMAT = "roundexport integer encoder 1"
INTERMEDIATES = ("query", "key", "value", "mixed", "output", "middle", "up", "inner", "down", "last")

Tensors = dict[str, tuple[str, NDArray[Any]]]


def formats_of(block: IntegerBlock) -> dict[str, Format]:
    """Formats of a block's intermediates by name."""
    linears = {name: getattr(block, name).leaving for name in LINEARS}
    norms = {"middle": block.middle_norm.leaving, "last": block.last_norm.leaving}
    found = {**linears, **norms, "mixed": block.attention.leaving, "inner": block.table.leaving}
    return {name: found[name] for name in INTERMEDIATES}


def save(encoder: IntegerEncoder, path: Path) -> int:
    """Write an encoder; returns the file's size in bytes.

    Raises:
        ArtifactError: the file exists.
    """
    tensors: Tensors = {}
    vectors: dict[str, Int8Tensor] = {}
    _put_norm(vectors, EMBEDDING_NORM, encoder.norm)
    specs = {}
    for name, table in zip(TABLES, encoder.embeddings, strict=True):
        specs[name] = _put_weight(tensors, name, table.weight)
    tensors["embedded"] = ("I8", encoder.norm.leaving.exponents)
    for index, block in enumerate(encoder.blocks):
        front = f"encoder.layer.{index}"
        for tensor, module in LINEARS.items():
            linear: IntegerLinear = getattr(block, tensor)
            specs[f"{front}.{module}"] = _put_weight(tensors, f"{front}.{module}", linear.weight)
            vectors[f"{front}.{module}.bias"] = linear.bias
        _put_norm(vectors, f"{front}.{NORMS['middle']}", block.middle_norm)
        _put_norm(vectors, f"{front}.{NORMS['last']}", block.last_norm)
        tensors[f"{front}.shifts"] = ("I8", np.concatenate([f.exponents for f in formats_of(block).values()]))
        tensors[f"{front}.activation"] = ("I8", block.table.tables.astype(np.int8))
    names = sorted(vectors)
    tensors |= {name: ("I8", vectors[name].codes) for name in names}
    tensors["vectors"] = ("U8", power_of_two.to_bytes(np.array([vectors[n].scale for n in names], np.float32)))
    tensors |= _function_tables(encoder)
    write_tensors(path, tensors, {"format": FORMAT, "shape": json.dumps(_shape(encoder, specs))})
    return path.stat().st_size


def read(path: Path) -> IntegerEncoder:
    """The encoder of a file.

    Raises:
        ArtifactError: it is not such a file, lacks a tensor, or was made where functions round differently.
        SpecError: formats that do not meet, or sums that int32 might not hold.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not an integer encoder; its format is {file.metadata.get('format')!r}")
    try:
        shape = json.loads(file.metadata["shape"])
        encoder = _Reader(file, shape).encoder()
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged: {error!r}") from error
    stored = {name: file.read(name) for name in ("exp", "reciprocal", "root")}
    stored |= {
        f"encoder.layer.{i}.activation": file.read(f"encoder.layer.{i}.activation") for i in range(shape["layers"])
    }
    made = {name: array for name, (_, array) in _function_tables(encoder).items()}
    made |= {f"encoder.layer.{i}.activation": block.table.tables for i, block in enumerate(encoder.blocks)}
    for name, table in stored.items():
        if not np.array_equal(table, made[name]):
            raise ArtifactError(
                f"{path}: table {name} is not what this machine computes; its exp or erf rounds otherwise"
            )
    return encoder


@dataclass(frozen=True, eq=False)
class _Reader:
    file: TensorFile
    shape: dict[str, Any]

    def encoder(self) -> IntegerEncoder:
        """All parts, in order."""
        tables = [Embedding(self._weight(name)) for name in TABLES]
        entering = self._format(self.file.read("embedded"), tables[0].weight.in_features)
        norm = self._norm(EMBEDDING_NORM, tuple(table.summand() for table in tables), entering)
        blocks = []
        for index in range(self.shape["layers"]):
            blocks.append(self._block(f"encoder.layer.{index}", index, entering))
            entering = blocks[-1].last_norm.leaving
        return IntegerEncoder((tables[0], tables[1], tables[2]), norm, tuple(blocks))

    def _block(self, front: str, index: int, entering: Format) -> IntegerBlock:
        found = self._formats(front)
        before = {
            **dict.fromkeys(("query", "key", "value"), entering),
            "output": found["mixed"],
            "up": found["middle"],
            "down": found["inner"],
        }
        linears = {}
        for tensor, module in LINEARS.items():
            name = f"{front}.{module}"
            linears[tensor] = IntegerLinear(
                self._weight(name), self._vector(f"{name}.bias"), before[tensor], found[tensor], name
            )
        heads = self.shape["heads"]
        attention = IntegerAttention(heads, found["query"], found["key"], found["value"], found["mixed"], front)
        sums = {
            "middle": (Summand.of(found["output"]), Summand.of(entering)),
            "last": (Summand.of(found["down"]), Summand.of(found["middle"])),
        }
        middle, last = (self._norm(f"{front}.{NORMS[n]}", sums[n], found[n]) for n in ("middle", "last"))
        table = IntegerTable(self.shape["activation"], found["up"], found["inner"], f"{front}.{LINEARS['up']}")
        return IntegerBlock(
            linears["query"], linears["key"], linears["value"], attention, linears["output"], middle, linears["up"],
            table, linears["down"], last,
        )  # fmt: skip

    def _formats(self, front: str) -> dict[str, Format]:
        exponents = self.file.read(f"{front}.shifts")
        counts = self.shape["blocks"]
        parts = np.split(exponents, np.cumsum(counts)[:-1])
        inner = self.file.shape(f"{front}.{LINEARS['up']}.exponents")[0]
        width = self.file.shape(f"{front}.{LINEARS['output']}.exponents")[0]
        return {
            name: self._format(
                part, inner if name in ("up", "inner") else width, self.shape["sum_bits"] if name in SUMMED else 8
            )
            for name, part in zip(INTERMEDIATES, parts, strict=True)
        }

    def _format(self, exponents: NDArray[np.int8], width: int, bits: int = 8) -> Format:
        return Format(width, np.ascontiguousarray(exponents), bits)

    def _weight(self, name: str) -> QuantizedLinear:
        bits, group, width = self.shape["weights"][name]
        spec = QuantSpec(bits, group, True, "exponent8")
        scales = power_of_two.from_bytes(self.file.read(f"{name}.exponents"))
        return QuantizedLinear(spec, width, self.file.read(f"{name}.codes"), scales)

    def _vector(self, name: str) -> Int8Tensor:
        scales = power_of_two.from_bytes(self.file.read("vectors"))
        return Int8Tensor(self.file.read(name), float(scales[self._names.index(name)]))

    def _norm(self, name: str, summands: tuple[Summand, ...], leaving: Format) -> IntegerLayerNorm:
        return IntegerLayerNorm(summands, self._vector(f"{name}.weight"), self._vector(f"{name}.bias"), leaving, name)

    @property
    def _names(self) -> list[str]:
        return sorted(name for name in self.file.names if name.endswith((".weight", ".bias")))


def _put_weight(tensors: Tensors, name: str, weight: QuantizedLinear) -> list[int | None]:
    tensors[f"{name}.codes"] = ("U8", weight.codes)
    tensors[f"{name}.exponents"] = ("U8", power_of_two.to_bytes(np.asarray(weight.scales, np.float32)))
    return [weight.spec.bits, weight.spec.group_size, weight.in_features]


def _put_norm(vectors: dict[str, Int8Tensor], name: str, norm: IntegerLayerNorm) -> None:
    vectors[f"{name}.weight"], vectors[f"{name}.bias"] = norm.weight, norm.bias


def _function_tables(encoder: IntegerEncoder) -> Tensors:
    root = ("U16", encoder.norm.table.astype(np.uint16))
    reciprocal = ("U16", integer_attention.reciprocal_table().astype(np.uint16))
    exp = encoder.blocks[0].attention.exp_table if encoder.blocks else np.zeros(0, np.uint8)
    return {"exp": ("U8", exp), "reciprocal": reciprocal, "root": root}


def _shape(encoder: IntegerEncoder, weights: dict[str, list[int | None]]) -> dict[str, Any]:
    first = encoder.blocks[0]
    return {
        "layers": len(encoder.blocks),
        "heads": first.attention.heads,
        "activation": first.table.function,
        "sum_bits": first.output.leaving.bits,
        "blocks": [f.exponents.size for f in formats_of(first).values()],
        "weights": weights,
    }
