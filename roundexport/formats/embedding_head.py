"""From hidden states to one vector: the modules behind the model in a sentence-transformers folder, read and computed.

    modules.json             the modules in order: Transformer, Pooling, then Dense, LayerNorm, Normalize, Dropout
    <Pooling>/config.json    ways of pooling; several stand side by side in the vector, in the order they are named
    <Dense>/config.json      v ← a(W·v + b), with a residual where it says so; W in <Dense>/model.safetensors

    mean   Σ_t mask_t · h_t / n,  n = Σ_t mask_t        cls    h_0             mean_sqrt_len   Σ_t mask_t · h_t / √n
    max    over the tokens                              last   h_{n−1}         weightedmean    token t weighs t + 1

A module that is not known is refused by name, and so is a Dense whose weights are a pickle.  A folder without these
files is pooled by the mean.  A checkpoint's folder and a package hold the same files, and both are read here.
Source: `sentence_transformers` 6.2, modules Pooling, Dense, LayerNorm, Normalize; flags of older releases too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.storage.paths import ListedFiles
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.strict_json import parse
from roundexport.types import Pooling, PoolingMode

Floats: TypeAlias = NDArray[np.float32]

MODULES = "modules.json"
_MODES: dict[str, PoolingMode] = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "last",
}  # by the flags of older releases, in the order in which several of them stand in the vector
_KNOWN: dict[str, PoolingMode] = {**_MODES, **{mode: mode for mode in _MODES.values() if mode != "last"}}
_erf = np.frompyfunc(math.erf, 1, 1)
_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: np.reciprocal(1 + np.exp(-x)),
    "SiLU": lambda x: x * np.reciprocal(1 + np.exp(-x)),
    "GELU": lambda x: x * np.float32(0.5) * (1 + _erf(x / math.sqrt(2)).astype(np.float32)),
}


@dataclass(frozen=True)
class Pool:
    """Hidden states to vectors, by one way or several side by side."""

    modes: tuple[PoolingMode, ...]


@dataclass(frozen=True, eq=False)
class Dense:
    """v ← activation(W·v + b), plus v, or another matrix times v, where it has a residual."""

    weight: Floats
    bias: Floats | None
    activation: str
    residual: bool = False
    projection: Floats | None = None

    def apply(self, vectors: Floats) -> Floats:
        """The module's vectors [n, N] of vectors [n, K]."""
        out = vectors @ self.weight.T
        out = _ACTIVATIONS[self.activation](out if self.bias is None else out + self.bias)
        if not self.residual:
            return out
        return out + (vectors if self.projection is None else vectors @ self.projection.T)


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """v ← (v - mean) / sqrt(variance + 1e-5) · weight + bias."""

    weight: Floats
    bias: Floats

    def apply(self, vectors: Floats) -> Floats:
        """The module's vectors [n, K]."""
        centered = vectors - vectors.mean(-1, keepdims=True)
        normed: Floats = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + np.float32(1e-5))
        return normed * self.weight + self.bias


@dataclass(frozen=True)
class Normalize:
    """v ← v / |v|."""

    def apply(self, vectors: Floats) -> Floats:
        """The module's vectors [n, K]."""
        unit: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return unit


@dataclass(frozen=True, eq=False)
class EmbeddingHead:
    """What makes a vector of hidden states.

    Args:
        pool: the pooling.
        behind: modules that follow, in order.
    """

    pool: Pool
    behind: tuple[Dense | LayerNorm | Normalize, ...] = ()

    def __call__(self, hidden: Floats, mask: NDArray[np.int64]) -> Floats:
        """Vectors [n, width] of hidden states [n, S, H] and the attention mask [n, S], right-padded."""
        found = np.concatenate([pooled(hidden, mask, mode) for mode in self.pool.modes], -1)
        for module in self.behind:
            found = module.apply(found)
        return np.ascontiguousarray(found, np.float32)

    def width(self, hidden_size: int) -> int:
        """Width of a vector."""
        dense = [module.weight.shape[0] for module in self.behind if isinstance(module, Dense)]
        return dense[-1] if dense else hidden_size * len(self.pool.modes)

    @property
    def pooling(self) -> Pooling:
        """What a manifest says of it: one way and whether it is scaled, or that the modules' files say it."""
        kinds = [type(module) for module in self.behind]
        if len(self.pool.modes) == 1 and kinds in ([], [Normalize]):
            return {"mode": self.pool.modes[0], "normalize": bool(kinds)}
        return {"mode": "modules", "normalize": False}


def head_of(pooling: Pooling, files: ListedFiles, hidden_size: int) -> EmbeddingHead | None:
    """The head that a package's manifest means; None where it is in the graph.

    Raises:
        ArtifactError: the modules' files are damaged.
        UnsupportedError: a module that is not known.
    """
    if pooling["mode"] == "graph":
        return None
    if pooling["mode"] == "modules":
        return read_head(files, hidden_size)
    return EmbeddingHead(Pool((pooling["mode"],)), (Normalize(),) if pooling["normalize"] else ())


def pooled(hidden: Floats, mask: NDArray[np.int64], mode: PoolingMode) -> Floats:
    """Vectors [n, H] of hidden states [n, S, H] and the attention mask [n, S], right-padded, in one way."""
    found: Floats
    if mode == "cls":
        found = hidden[:, 0]
    elif mode == "last":
        found = hidden[np.arange(len(hidden)), mask.sum(1) - 1]
    elif mode == "max":
        found = np.where(mask[:, :, None] == 1, hidden, -np.inf).max(1)
    else:
        weights = mask[:, None, :].astype(np.float32)
        if mode == "weightedmean":
            weights *= np.arange(1, mask.shape[1] + 1, dtype=np.float32)
        total = weights.sum(2)
        found = (weights @ hidden)[:, 0] / (np.sqrt(total) if mode == "mean_sqrt_len" else total)
    return found


def modules_of(files: ListedFiles) -> list[dict[str, str]]:
    """Entries of modules.json (type, path); none where this is not a sentence-transformers folder.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = files.find(MODULES)
    if path is None:
        return []
    modules = parse(b'{"modules":' + path.read_bytes() + b"}", str(path))["modules"]
    try:
        return [{"type": str(module["type"]), "path": str(module["path"])} for module in modules]
    except (TypeError, KeyError) as error:
        raise ArtifactError(f"{path}: every module needs a type and a path") from error


def module_files(files: ListedFiles) -> Iterator[str]:
    """Names of the files that modules behind the model are read from, where they are there."""
    for module in modules_of(files):
        if module["path"]:
            for name in ("config.json", "model.safetensors"):
                if files.find(f"{module['path']}/{name}") is not None:
                    yield f"{module['path']}/{name}"


def read_head(files: ListedFiles, hidden_size: int | None = None) -> EmbeddingHead:
    """How to make a vector.

    Args:
        files: the folder.
        hidden_size: width of the hidden states, held against the modules' own; None: not held.

    Raises:
        ArtifactError: the files are damaged, or a module's width is not that of what it gets.
        UnsupportedError: a pooling, or a further module, that cannot be reproduced.
    """
    pool, behind, width = Pool(("mean",)), list[Dense | LayerNorm | Normalize](), hidden_size
    for place, module in enumerate(modules_of(files)):
        kind = module["type"].rsplit(".", 1)[-1]
        if (kind == "Transformer") != (place == 0) or (kind == "Pooling") != (place == 1) or kind not in _READ:
            known = "Transformer, Pooling, then Dense, LayerNorm, Normalize or Dropout"
            raise UnsupportedError(
                f"{files.folder}: the sentence-transformers module {kind} in place {place + 1} is not supported; "
                f"{known} are, in this order"
            )
        if "cross_encoder" in module["type"]:
            raise UnsupportedError(f"{files.folder}: the sentence-transformers module {module['type']} does not embed")
        found = _READ[kind](files, module["path"])
        if isinstance(found, Pool):
            pool = found
            own = _config(files, module["path"])
            told = own.get("word_embedding_dimension", own.get("embedding_dimension"))
            if width is not None and told is not None and told != width:
                where = f"{files.folder}: {module['path']}"
                raise ArtifactError(f"{where}: it pools vectors of {told!r:.40}, the model gives {width}")
            width = None if width is None else width * len(pool.modes)
        elif found is not None:
            width = _fitted(found, width, f"{files.folder}: {module['path']}")
            behind.append(found)
    return EmbeddingHead(pool, tuple(behind))


def _fitted(module: Dense | LayerNorm | Normalize, width: int | None, where: str) -> int | None:
    """The width of what a module gives, which must take what it gets."""
    if isinstance(module, Normalize):
        return width
    taken = module.weight.shape[-1]
    if width is not None and taken != width:
        raise ArtifactError(f"{where}: it takes vectors of {taken}, and gets {width}")
    return int(module.weight.shape[0])


def _read_pool(files: ListedFiles, place: str) -> Pool:
    config, where = _config(files, place), f"{files.folder}: {place}"
    flags = [mode for mode in _MODES if config.get(f"pooling_mode_{mode}")]
    strange = [key for key, value in config.items() if value and key.startswith("pooling_mode_")]
    told = config.get("pooling_mode")
    named = flags + [key for key in strange if key.removeprefix("pooling_mode_") not in _MODES]
    if told is not None:
        named = [str(name) for name in (told if isinstance(told, list) else [told])]
    if config.get("include_prompt") is False:
        raise UnsupportedError(f"{where}: pooling without the prompt (include_prompt false) is not supported")
    unknown = [name for name in named if name not in _KNOWN]
    if unknown or not named:
        found = " and ".join(name.removeprefix("pooling_mode_") for name in unknown) or "nothing"
        raise UnsupportedError(f"{where}: pooling by {found} is not supported; {', '.join(_MODES.values())} are")
    return Pool(tuple(_KNOWN[name] for name in named))


def _read_dense(files: ListedFiles, place: str) -> Dense:
    config, where = _config(files, place), f"{files.folder}: {place}"
    _on_the_vector(config, where)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(f"{where}: the activation {activation} is not supported; {', '.join(_ACTIVATIONS)} are")
    weights = _weights(files, place)
    residual = bool(config.get("use_residual"))
    names = {"weight": "linear.weight", "bias": "linear.bias", "projection": "residual.weight"}
    found = {key: weights.read_float32(name) if name in weights else None for key, name in names.items()}
    if found["weight"] is None or (config.get("bias", True) and found["bias"] is None):
        raise ArtifactError(f"{where}: its weights lack linear.weight or linear.bias")
    weight = found["weight"]
    if weight.ndim != 2 or (found["bias"] is not None and found["bias"].shape != weight.shape[:1]):
        raise ArtifactError(f"{where}: the shapes of its weights do not fit each other")
    return Dense(weight, found["bias"], activation, residual, found["projection"] if residual else None)


def _read_layer_norm(files: ListedFiles, place: str) -> LayerNorm:
    weights = _weights(files, place)
    return LayerNorm(weights.read_float32("norm.weight"), weights.read_float32("norm.bias"))


def _read_normalize(files: ListedFiles, place: str) -> Normalize:
    if place and files.find(f"{place}/config.json") is not None:
        _on_the_vector(_config(files, place), f"{files.folder}: {place}")
    return Normalize()


def _on_the_vector(config: dict[str, Any], where: str) -> None:
    """Refuse a module that works on something else than the vector."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise UnsupportedError(f"{where}: it works on {config[key]!r:.60}; modules of the vector are supported")


def _config(files: ListedFiles, place: str) -> dict[str, Any]:
    path = files.path(f"{place}/config.json")
    return parse(path.read_bytes(), str(path))


def _weights(files: ListedFiles, place: str) -> TensorFile:
    if files.find(f"{place}/model.safetensors") is None and files.find(f"{place}/pytorch_model.bin") is not None:
        raise UnsupportedError(
            f"{files.folder}: the weights of {place} are a pickle, which can run code and is never read; if you trust "
            "it, save the model once with sentence-transformers: SentenceTransformer(folder).save(new_folder)"
        )
    return TensorFile(files.path(f"{place}/model.safetensors"))


_READ: dict[str, Callable[[ListedFiles, str], Pool | Dense | LayerNorm | Normalize | None]] = {
    "Transformer": lambda *_: None,
    "Pooling": _read_pool,
    "Dense": _read_dense,
    "LayerNorm": _read_layer_norm,
    "Normalize": _read_normalize,
    "Dropout": lambda *_: None,
}
