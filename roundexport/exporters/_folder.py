"""A Hugging Face folder of a packed format: what the formats with a `quantization_config` have in common.

    config.json          the source's, with the format's quantization_config
    model*.safetensors   packed weights, and every other float tensor in the source's own dtype (float32 where tuning
                         changed it), a tensor in memory at a time
    tokenizer, chat template, generation config, license     copied

These formats hold linears alone.  A quantized embedding, and the lm_head that shares its weight, is written as the
floats that its integers mean, exactly.  Then the folder is opened as any checkpoint of others is, and every integer,
scale, zero point and float is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import RoundexportError, UnsupportedError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.model_config import CONFIG, QUANTIZATION
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.storage.safetensors_reader import TensorSpec
from roundexport.storage.sharded_writer import ShardedWriter

from ._outgoing import HEAD, Facts, Outgoing, stored
from .interface import Exporter, Written

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Model:
    """What a format's config says of a model, beside its layers' schemes.

    Args:
        kind: model_type.
        layers: the weights that are packed, in the model's order.
        float_modules: linears and embeddings that are not.
    """

    kind: str
    layers: tuple[Facts, ...]
    float_modules: tuple[str, ...]


@dataclass(frozen=True)
class Packing:
    """How the weights of one model are packed.

    Args:
        config: the quantization_config.
        tensors: what is stored of a weight, by the name behind its module's: dtype and shape.
        pack: their values.
        notes: what a user must know.
    """

    config: dict[str, Any]
    tensors: Callable[[Facts], Mapping[str, TensorSpec]]
    pack: Callable[[Facts, QuantizedLinear], Arrays]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FolderFormat:
    """One format.

    Args:
        title: its name.
        refusal: why it cannot hold a weight exactly and what to do, or None.
        packing: how the weights of a model are packed; UnsupportedError where the whole cannot be said.
    """

    title: str
    refusal: Callable[[Facts], str | None]
    packing: Callable[[Model], Packing]

    def exporter(self) -> Exporter:
        """What interface.py asks for."""
        return Exporter(self.title, lambda outgoing: FolderPlan(self, outgoing))


class FolderPlan:
    """A folder that can be written.

    Args:
        form: its format.
        outgoing: the artifact and its model.

    Raises:
        UnsupportedError: a layer, or the whole, that the format cannot hold.
    """

    def __init__(self, form: FolderFormat, outgoing: Outgoing) -> None:
        self._form, self._outgoing = form, outgoing
        reasons = {facts.name: _refusal(form, facts) for facts in outgoing.facts}
        self._packed = tuple(facts for facts in outgoing.facts if reasons[facts.name] is None)
        self._tables = {f.name: reason for f in outgoing.facts if (reason := reasons[f.name]) and _is_table(f)}
        refused = [(name, why) for name, why in reasons.items() if why and name not in self._tables]
        if refused:
            others = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
            raise UnsupportedError(f"{form.title} cannot hold {refused[0][0]}: {refused[0][1]}{others}")
        if not self._packed:
            raise UnsupportedError(f"the artifact has no quantized linear, so {form.title} has nothing to hold")
        model = outgoing.checkpoint
        floats = (*outgoing.float_modules(), *self._tables)
        self._packing = form.packing(Model(model.model_type, self._packed, floats))

    def write(self, folder: Path) -> Written:
        """Fill an empty folder and read it back; see interface.py."""
        outgoing = self._outgoing
        outgoing.checkpoint.copy_side_files(folder)
        self._write_config(folder / CONFIG)
        tensors: dict[str, TensorSpec] = {}
        for facts in self._packed:
            tensors |= {f"{facts.name}.{part}": spec for part, spec in self._packing.tensors(facts).items()}
        sizes = {facts.name: (facts.rows, facts.width) for facts in outgoing.facts}
        tensors |= {f"{name}.weight": ("F32", sizes[name]) for name in self._tables}
        floats = outgoing.float_names()
        tensors |= {name: (outgoing.float_dtype(name), outgoing.checkpoint.shape(name)) for name in floats}
        writer = ShardedWriter(folder, tensors)
        try:
            for facts in self._packed:
                for part, values in self._packing.pack(facts, outgoing.linear(facts.name)).items():
                    writer.write(f"{facts.name}.{part}", values)
            for name in self._tables:
                writer.write(f"{name}.weight", outgoing.linear(name).dequantize())
            for name in floats:
                writer.write(name, stored(outgoing.float32(name), outgoing.float_dtype(name)))
            writer.close()
        finally:
            writer.abandon()
        self._read_back(folder, floats)
        kept = (*outgoing.kept_float(), *((name, f"dequantized: {why}") for name, why in self._tables.items()))
        return Written(tuple(facts.name for facts in self._packed), kept, (*self._packing.notes, *self._table_notes()))

    def _write_config(self, path: Path) -> None:
        config = json.loads(path.read_text(encoding="utf-8"))
        if self._outgoing.checkpoint.tied and any(facts.name == HEAD for facts in self._packed):
            config["tie_word_embeddings"] = False  # the head has integers of its own
        config[QUANTIZATION] = self._packing.config
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _read_back(self, folder: Path, floats: Sequence[str]) -> None:
        found = Checkpoint.open(folder, progress=False)
        for facts in self._packed:
            linear = found.quantized(facts.name)
            if linear is None or not _same(linear, self._outgoing.linear(facts.name)):
                raise _fault(facts.name)
        for name in self._tables:
            if not np.array_equal(found.float32(f"{name}.weight"), self._outgoing.linear(name).dequantize()):
                raise _fault(name)
        for name in floats:
            if not np.array_equal(found.float32(name), self._outgoing.float32(name), equal_nan=True):
                raise _fault(name)

    def _table_notes(self) -> tuple[str, ...]:
        weights = sum(facts.rows * facts.width for facts in self._outgoing.facts if facts.name in self._tables)
        if not weights:
            return ()
        return (
            f"{', '.join(self._tables)}: written as the floats that its integers mean ({weights / 2**18:.0f} MiB of "
            "float32); tune with --embedding-bits none to keep the source's own floats",
        )


def uniform(values: Sequence[Any]) -> Any:
    """The value that is there most often, the first of several."""
    return max(dict.fromkeys(values), key=list(values).count)


def _refusal(form: FolderFormat, facts: Facts) -> str | None:
    if facts.table:
        return f"{form.title} holds linears alone"
    if facts.scales == "F32":
        return (
            f"its scales ({facts.spec.scale_dtype}) need float32, and programs that load the format keep 16 bits of "
            "them; tune with float16 scales"
        )
    return form.refusal(facts)


def _is_table(facts: Facts) -> bool:
    return facts.table or facts.name == HEAD


def _same(found: QuantizedLinear, wanted: QuantizedLinear) -> bool:
    """Whether two weights have the same integers, scales and zero points, whatever their specs call them."""
    return (
        found.spec.bits == wanted.spec.bits
        and found.groups == wanted.groups
        and np.array_equal(found.codes, wanted.codes)
        and np.array_equal(found.full_zero_points(), wanted.full_zero_points())
        and np.array_equal(found.scales.astype(np.float32), wanted.scales.astype(np.float32))
    )


def _fault(name: str) -> RoundexportError:
    return RoundexportError(
        f"{name} was read back as other numbers than were written; this is a fault, please report it"
    )
