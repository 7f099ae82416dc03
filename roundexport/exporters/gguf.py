"""GGUF: one file, model.gguf, for llama.cpp and what is built on it, with tokenizer and chat template.

    weights      Q4_0, Q5_0 or Q8_0, whichever holds every code - zero_point (_gguf_blocks.py); tables too
    floats       matrices in the source's dtype, norms and biases in float32
    the rest     _gguf_model.py, _gguf_tokenizer.py

Needs groups of a multiple of 32 and float16 scales; anything else has no exact form and is refused.  The written file
is read by the gguf package, and every weight it dequantizes is the artifact's, bit for bit.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError, RoundexportError, UnsupportedError

from ._gguf_blocks import BLOCK, BYTES, blocks, fits, kind_of
from ._gguf_model import check_model, row_order, write_sizes
from ._gguf_tokenizer import splitting, write_tokenizer
from ._outgoing import Facts, Outgoing, stored
from .interface import Exporter, Written

FILE = "model.gguf"


class _Plan:
    """A file that can be written."""

    def __init__(self, outgoing: Outgoing) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise CheckpointError("to write GGUF files, install gguf: pip install 'roundexport[gguf]'")
        self._outgoing, checkpoint = outgoing, outgoing.checkpoint
        self._config = checkpoint.config
        self._architecture = check_model(self._config, checkpoint.task, checkpoint.location)
        splitting(checkpoint.folder)
        if not outgoing.facts:
            raise UnsupportedError("the artifact has no quantized weight, so there is nothing for GGUF to hold")
        for facts in outgoing.facts:
            if why := self._refusal(facts):
                raise UnsupportedError(f"GGUF cannot hold {facts.name}: {why}")
        names = (f"{facts.name}.weight" for facts in outgoing.facts)
        self._names = {name: self._name(name) for name in (*names, *outgoing.float_names())}

    def write(self, folder: Path) -> Written:
        """Fill an empty folder and read it back; see interface.py."""
        import gguf

        outgoing, path = self._outgoing, folder / FILE
        writer = gguf.GGUFWriter(path, self._architecture)
        write_sizes(writer, self._config, Path(outgoing.checkpoint.location).stem)
        write_tokenizer(writer, outgoing.checkpoint.folder, self._config)
        kinds = {f"{facts.name}.weight": kind_of(facts.spec) for facts in outgoing.facts}
        counts = Counter(kinds.values())
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{counts.most_common(1)[0][0]}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for facts in outgoing.facts:
            name = f"{facts.name}.weight"
            shape = (facts.rows, facts.width // BLOCK * BYTES[kinds[name]])
            raw = gguf.GGMLQuantizationType[kinds[name]]
            writer.add_tensor_info(self._names[name], shape, np.dtype(np.uint8), math.prod(shape), raw)
        floats = outgoing.float_names()
        for name in floats:
            held = outgoing.checkpoint.shape(name)
            raw = gguf.GGMLQuantizationType[self._float_kind(name)]
            item = 4 if raw.name == "F32" else 2
            writer.add_tensor_info(self._names[name], held, np.dtype(np.float32), math.prod(held) * item, raw)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for facts in outgoing.facts:
                name = f"{facts.name}.weight"
                writer.write_tensor_data(self._ordered(name, blocks(outgoing.linear(facts.name))))
            for name in floats:
                writer.write_tensor_data(stored(self._float(name), self._float_kind(name)))  # type: ignore[arg-type]
        finally:
            writer.close()
        self._read_back(path, floats)
        held_in = ", ".join(f"{count} in {kind}" for kind, count in counts.items())
        note = f"{held_in}; the integers are code - zero_point, and groups beyond {BLOCK} are blocks with equal scales"
        return Written(tuple(facts.name for facts in outgoing.facts), outgoing.kept_float(), (note,))

    def _refusal(self, facts: Facts) -> str | None:
        group = facts.spec.group_width(facts.width)
        if facts.width % BLOCK or group % BLOCK:
            return (
                f"its groups are of {group} of {facts.width} inputs, GGUF's blocks of integers around zero are of "
                f"{BLOCK}; tune with --group-size {BLOCK} or a multiple of it: 4 bits are Q4_0, 8 are Q8_0"
            )
        if facts.scales != "F16":
            return f"its scales ({facts.spec.scale_dtype}) are not float16 numbers; tune with float16 scales"
        if not fits(self._outgoing.linear(facts.name)):
            return "code - zero_point leaves -128 … 127; tune it with --symmetric, which is Q8_0"
        return None

    def _name(self, name: str) -> str:
        import gguf

        known = {label: arch for arch, label in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(known[self._architecture], int(self._config["num_hidden_layers"]))
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            where = self._outgoing.checkpoint.location
            raise UnsupportedError(f"{where}: {name} has no place in a GGUF file of {self._architecture}")
        return found

    def _float_kind(self, name: str) -> str:
        return self._outgoing.float_dtype(name) if len(self._outgoing.checkpoint.shape(name)) > 1 else "F32"

    def _float(self, name: str) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._ordered(name, self._outgoing.float32(name))
        return found

    def _ordered(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        order = row_order(name, self._config, len(rows))
        return rows if order is None else np.ascontiguousarray(rows[order])

    def _read_back(self, path: Path, floats: list[str]) -> None:
        import gguf

        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        wanted = {f"{facts.name}.weight": facts.name for facts in self._outgoing.facts}
        for name in (*wanted, *floats):
            tensor = found[self._names[name]]
            own = self._float(name) if name not in wanted else None
            expected = own if own is not None else self._ordered(name, self._outgoing.linear(wanted[name]).dequantize())
            if not np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), expected, equal_nan=True):
                raise RoundexportError(f"{name} was read back as other numbers than were written; please report it")


EXPORTER = Exporter("GGUF", _Plan)
