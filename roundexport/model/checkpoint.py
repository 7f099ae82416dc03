"""A Hugging Face model folder: its config, its float weights one at a time, and the files a client needs beside them.

Weights are read straight from the folder's safetensors, validated as in safetensors_reader.py, without torch; only
`load_model` imports torch and transformers.  Tensor names are those of the class that `load_model` gives, see
tensor_names.py.
A folder of a path: links inside it must stay inside it, except for snapshots of the Hugging Face cache.
Of a folder that holds a decoder beside a vision tower only the decoder is read, see text_part.py.
Weights that others have made smaller are dequantized when read, see foreign_weights.py.  Pickle is never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError, CheckpointError
from roundexport.formats.embedding_head import EmbeddingHead
from roundexport.progress import Progress
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.storage.checksums import hash_files
from roundexport.storage.paths import safe_join
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.types import HEADLESS, OF_IMAGES, PAIRS, Pooling, Task

from .derived_tensors import derived_tensors
from .encoder_alone import encoder_names
from .encoder_decoder import settle_tables
from .foreign_weights import foreign_weights
from .gguf_header import is_gguf
from .gguf_model import open_gguf
from .hub import resolve
from .imported_weights import DEQUANTIZED, ImportedWeights
from .low_bit_floats import LowBitFloats
from .model_config import CONFIG, check_sizes, read_config, read_generation_config, task_of
from .packed_names import RowPart
from .parts import check_kind, choose_part
from .pooling import embedding_head, image_pooling
from .reranker import LogitScore, as_reranker, logit_score
from .side_files import check_side_files, copy_side_files, side_files
from .special_tokens import special_tokens
from .stacked_tensors import TensorPart, parts_of
from .tensor_names import OWN_HEADS, canonical_names, is_for_training, is_pooler
from .text_part import RENAMING, text_config, text_names
from .tied_head import settle_head
from .tied_masked_head import settle_masked_head
from .transformers_loading import PartOf, read_model, read_text_config, read_vision_config
from .transformers_loading import read_config as read_transformers_config
from .vision_part import PROJECTION, has_features, vision_config, vision_names
from .vision_part import RENAMING as IMAGE_SIDE
from .weight_files import INDEX, WEIGHTS, stored_tensors, weight_files

if TYPE_CHECKING:
    import torch

_TASK_OF: dict[str, Task] = {"text": "generate", "vision": "embed_image"}
_GO_NOWHERE = {"text": "images", "vision": "texts"}


@contextmanager
def _checkpoint_errors() -> Iterator[None]:
    """What is wrong with a file in a model folder is wrong with the checkpoint."""
    try:
        yield
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error


class Checkpoint:
    """A float model on disk; made by :meth:`open`.

    Attributes:
        folder: where the files are.
        location: folder or hub id as it was asked for.
        trust_remote_code: whether Python code in the folder may be run.
        config: config.json; of a part, what it says of that part.
        part: ``text`` or ``vision`` where the folder holds other parts too, which are left out; else None.
        task: what the model is for, by its architecture (see types.py); decides the class that `load_model` gives.
        tokens: special token ids, see special_tokens.py.
        tied: whether lm_head is the embedding, see tied_head.py and tied_masked_head.py.
        imported: the weights that others have quantized to integers; None of a float model.
        low_bit: the weights of a float model that are stored in 4 or 8 bits; None where there are none.
    """

    def __init__(
        self,
        folder: Path,
        location: str,
        trust_remote_code: bool,
        identity: dict[str, str] | None = None,
        part: str | None = None,
    ) -> None:
        self.folder = folder
        self.location = location
        self.trust_remote_code = trust_remote_code
        self._identity = identity
        self.config = read_config(folder)
        self.part = choose_part(self.config, part, location)
        self.task: Task = _TASK_OF[self.part] if self.part else task_of(self.config, folder)
        check_kind(part, self.task, location)
        self._whole_type = str(self.config.get("model_type", ""))
        if self.part:
            self.config = text_config(self.config) if self.part == "text" else vision_config(self.config)
        self.tokens = special_tokens(self.config, read_generation_config(folder), location)
        weights = {name: TensorFile(safe_join(folder, name)) for name in weight_files(folder)}
        self._weight_files = tuple(weights)
        self._files: dict[str, TensorFile | ImportedWeights | LowBitFloats] = {**weights}
        self._stored = stored_tensors(folder, weights)
        self.imported, self.low_bit = foreign_weights(folder, location, weights, self._stored, self._whole_type)
        if (found := self.imported or self.low_bit) is not None:
            self._stored, self._files[DEQUANTIZED] = found.stored(self._stored), found
        named = {name: name for name in self._stored}
        if self.part:
            named = (text_names if self.part == "text" else vision_names)(self._stored, location)
        canonical = canonical_names(named, self.model_type, self.task)
        self._names = encoder_names(self.config, {name: named[spelled] for name, spelled in canonical.items()})
        self._parts = self._split_stacks()
        self._computed: dict[str, NDArray[np.float32]] = {}
        self._computed |= derived_tensors(self, self._names)
        check_sizes(self.config, {name: self.shape(name) for name in self._names}, location)
        if self.task in HEADLESS:
            self.pooling()  # refuses what packages cannot do
        self.tied = self._settle_head()

    @classmethod
    @_checkpoint_errors()
    def open(
        cls,
        model: str | Path,
        trust_remote_code: bool = False,
        progress: bool | Progress = False,
        part: str | None = None,
        max_ram: float | None = None,
    ) -> Checkpoint:
        """Open a model folder or GGUF file, or fetch a Hugging Face hub id.

        Args:
            model: folder, GGUF file (see gguf_model.py), or hub id ``owner/name``.
            trust_remote_code: let transformers run Python code that the folder brings.
            progress: report on stderr, or where to report, while a model is fetched or a GGUF file is dequantized.
            part: ``text`` or ``vision`` of a folder that holds several models; None: the one that is exported.
            max_ram: GiB of memory to stay within while a GGUF file is dequantized.

        Raises:
            UsageError: an unknown part.
            CheckpointError: no such folder or id, no model, a missing or damaged file, only pickles, files outside.
            UnsupportedError: a model of a kind that is not read.
        """
        if is_gguf(model):
            folder, identity = open_gguf(Path(model), progress, max_ram)
            return cls(folder, str(model), False, identity)
        return cls(resolve(model, trust_remote_code, progress), str(model), trust_remote_code, part=part)

    @property
    def model_type(self) -> str:
        """``model_type`` of the config, as in ``llama``."""
        return str(self.config.get("model_type", ""))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided about the folder and must be said."""
        stored = self.low_bit.notes if self.low_bit else ()
        if self.part is None:
            return stored
        left, own = len(self._stored) - len(set(self._names.values())), len(set(self._names.values()))
        return (
            f"the {self.part} part of this {self._whole_type} checkpoint is taken (--part {self.part}): {own} tensors; "
            f"the {left} of its other parts are not read, so {_GO_NOWHERE[self.part]} go nowhere",
            *stored,
        )

    def files(self) -> dict[str, str]:
        """The sha256 of config.json and of every weight file, or of the GGUF file, by name."""
        return dict(self._hashes(Progress(False)))

    def identify(self, shown: Progress) -> str:
        """:attr:`digest`; files that were not hashed before are hashed in a stage of their own."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self._hashes(shown).items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    @cached_property
    def digest(self) -> str:
        """One sha256 over the names and hashes of :meth:`files`: the identity of the model."""
        return self.identify(Progress(False))

    def names(self) -> list[str]:
        """Tensor names as the model of :meth:`load_model` has them, sorted; a tied lm_head is among them."""
        return sorted(self._names)

    def owned(self) -> dict[str, tuple[int, ...]]:
        """Shape by name of every tensor once: a tied lm_head is left out, the embedding owns its weight."""
        seen: dict[tuple[str, TensorPart | None], str] = {}
        for name, stored in self._names.items():
            seen.setdefault((stored, self._parts.get(name)), name)
        return {name: self.shape(name) for name in sorted(seen.values())}

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._names or name in self._computed

    def same(self, one: str, other: str) -> bool:
        """Whether two names mean one tensor of the file."""
        return self._names.get(one) == self._names.get(other)

    def may_lack(self, name: str) -> bool:
        """Whether the model's output does not depend on a parameter, so that the file need not have it.

        A pooler is born with random weights where the file has none; only heads that classify texts read it.
        """
        return is_for_training(name) or (is_pooler(name) and self.task != "classify")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            CheckpointError: no such tensor.
        """
        if name in self._computed:
            return self._computed[name].shape
        found = self._file(name).shape(self._names[name])
        return self._parts[name].shape(found) if name in self._parts else found

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as its file calls it, as in ``BF16``.

        Raises:
            CheckpointError: no such tensor.
        """
        return self._file(name).dtype(self._names[name])

    @_checkpoint_errors()
    def float32(
        self, name: str, rows: tuple[int, int] | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """One tensor, or some rows of it, as a float32 array of its own; nothing else is read.

        Args:
            name: the tensor.
            rows: first and one past the last index along its first axis; None: all of it.
            out: contiguous float32 array of the result's shape to read into; None: a new one.

        Raises:
            CheckpointError: no such tensor or rows, or it holds no floats.
        """
        if name in self._computed:
            values = self._computed[name][slice(*rows) if rows else slice(None)]
            return np.array(values) if out is None else _filled(out, values)
        if name not in self._parts:
            return self._file(name).read_float32(self._names[name], rows, out)
        file, stored, part = self._file(name), self._names[name], self._parts[name]
        own = file.read_float32(stored, part.source_rows(file.shape(stored)))
        values = np.ascontiguousarray(part.cut(own)[slice(*rows) if rows else slice(None)])
        return values if out is None else _filled(out, values)

    @_checkpoint_errors()
    def quantized(self, module: str) -> QuantizedLinear | None:
        """The integers [N, K] of a module's weight, where others have quantized it; None where it is float.

        Raises:
            CheckpointError: no such weight, or numbers that make no sense.
        """
        name = f"{module}.weight"
        stored = self._names.get(name, "")
        if self.imported is None or stored not in self.imported.opened.layers:
            return None
        linear, part = self.imported.linear(stored), self._parts.get(name)
        if isinstance(part, RowPart):
            return linear.rows(slice(*part.source_rows((linear.out_features, linear.in_features))))
        if part is not None:
            raise CheckpointError(f"{self.location}: the experts of {stored} are quantized in one piece")
        return linear

    def load_model(self, dtype: str = "float32") -> torch.nn.Module:
        """The transformers model in evaluation mode, with scaled-dot-product attention where the class has it.

        Args:
            dtype: name of a torch dtype.

        Raises:
            CheckpointError: transformers cannot load it, or the weights leave parameters unset.
        """
        from .experts import split_experts
        from .filled_model import filled_model
        from .tensor_fit import refuse_unknown

        if self.imported or self.low_bit:
            return filled_model(self, dtype)
        part = PartOf(self.part_config(), self._renaming()) if self.part else None
        model, loading = read_model(self.folder, self.trust_remote_code, self.task, dtype, part)
        heads = set(self._stored) - set(self._names.values())  # of another task, left out on purpose
        if self.part != "vision":  # of which the language model is left over, by names of transformers' choice
            refuse_unknown(set(loading["unexpected_keys"]) - heads, model, self.location)
        unset = sorted(name for name in loading["missing_keys"] if not self.may_lack(name))
        if unset:
            raise CheckpointError(f"{self.location}: the weights lack {len(unset)} parameters, the first is {unset[0]}")
        loaded: torch.nn.Module = model.eval()
        split_experts(loaded)
        if score := self.logit_score():
            as_reranker(loaded, score)
        return loaded

    def _renaming(self) -> dict[str, str]:
        """Regular expressions on the file's names, for transformers."""
        if self.part == "text":
            return RENAMING
        return IMAGE_SIDE if has_features(self.config) else {}

    def part_config(self) -> Any:
        """Transformers' configuration of the model, or of the part of it that is taken."""
        where = self.folder, self.trust_remote_code
        if self.part == "text":
            return read_text_config(*where, self.tied)
        if self.part == "vision" and not has_features(self.config):
            return read_vision_config(*where, any(name.startswith(PROJECTION) for name in self._names))
        return read_transformers_config(*where)

    def logit_score(self) -> LogitScore | None:
        """Of a reranker that is made of a decoder, the tokens that it compares."""
        return logit_score(self.folder) if self.task == "rerank" else None

    @_checkpoint_errors()
    def side_files(self) -> list[Path]:
        """Files a client needs beside the weights, relative to :attr:`folder`: config, tokenizer, template, pooling."""
        return side_files(self.folder)

    @_checkpoint_errors()
    def check_side_files(self) -> None:
        """Make sure that :meth:`copy_side_files` will work; raises CheckpointError."""
        check_side_files(self.folder, self.location)

    @_checkpoint_errors()
    def copy_side_files(self, out: Path) -> list[str]:
        """Copy :meth:`side_files` into ``out``, sub-folders kept; returns their names."""
        return copy_side_files(self.folder, out)

    def embedding_head(self) -> EmbeddingHead:
        """How vectors are made, from the sentence-transformers files; the mean, not scaled, where there are none.

        Raises:
            CheckpointError: the files are damaged.
            UnsupportedError: a pooling, or a further module, that packages cannot reproduce.
        """
        size = self.config.get("hidden_size", self.config.get("dim"))
        return embedding_head(self.folder, size if isinstance(size, int) else None)

    def pooling(self) -> Pooling:
        """What a manifest says of :meth:`embedding_head`, which see.

        Of images, where the model does not make a vector itself: what stands in front of the patches, where there is
        such a thing, else the mean of the patches.
        """
        return image_pooling(self._names) if self.task in OF_IMAGES else self.embedding_head().pooling

    def _hashes(self, shown: Progress) -> dict[str, str]:
        if self._identity is None:
            names = sorted({CONFIG, *self._weight_files, *([] if WEIGHTS in self._weight_files else [INDEX])})
            hashes = hash_files([self.folder / name for name in names], f"hashing the files of {self.location}", shown)
            self._identity = dict(zip(names, hashes, strict=True))
        return self._identity

    def _settle_head(self) -> bool:
        """Give a head of words the tensors it shares; returns whether it is the embedding."""
        if self.task in PAIRS:
            return settle_tables(self, self._names)
        words = self.task in ("generate", "rerank")
        if self.task == "fill" or (words and self.model_type in OWN_HEADS):
            return settle_masked_head(self, self._names)
        return words and settle_head(self, self._names)

    def _split_stacks(self) -> dict[str, TensorPart]:
        """Put the parts of stacked and packed tensors in their place; returns where they lie."""
        parts: dict[str, tuple[TensorPart, str]] = {}

        def shape(stored: str) -> tuple[int, ...]:
            return self._files[self._stored[stored]].shape(stored)

        for stack, name, part in parts_of(self._names, shape, self.model_type):
            if name in self._names:
                raise CheckpointError(f"{self.location}: the weights hold {name} twice, alone and in {stack}")
            parts[name] = part, self._names[stack]
        stacks = {stored for _, stored in parts.values()}
        self._names = {name: stored for name, stored in self._names.items() if stored not in stacks}
        self._names.update({name: stored for name, (_, stored) in parts.items()})
        return {name: part for name, (part, _) in parts.items()}

    def _file(self, name: str) -> TensorFile | ImportedWeights | LowBitFloats:
        if name not in self._names:
            raise CheckpointError(f"{self.location}: there is no tensor {name} in the weights")
        return self._files[self._stored[self._names[name]]]


def _filled(out: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float32]:
    out[...] = values
    return out
