"""What activations in eight bits cost a decoder's package, product by product, measured on its own runtime.

    p     what the package says with float32 activations in every product
    q     the same with those of one product in eight bits, as the runtime rounds them; or of all
    loss  KL(p ‖ q) = Σ_v p_v · (e^d - 1 - d),   d = log q_v - log p_v             nats per token

One session is opened per product; layers that read one input are one product.  The loss is against the package itself,
not the float model: there the few thousandths that activations add drown in what the weights lose, in which a product
made exact gains on one token and loses on the next.  Against itself every term of the sum is positive, so that 512
tokens tell 121 products apart.  Losses of single products add up to the loss of all, to second order, as those that
`tune --activations` foretells from gradients (schemes/activation_loss.py); these here foretell nothing, they were run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from roundexport.environment.threads import choose_threads
from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest

from .report import ActivationCost, Figure, ProductLoss

if TYPE_CHECKING:
    from roundexport.runtime.types import Product

Ids = NDArray[np.int64]

WINDOWS, LENGTH = 4, 128
_BYTES = 256 << 20  # the exact package's log-probabilities, which every product is compared with
_LEAST = 16  # tokens of a window


def check_asked(folder: Path, manifest: PackageManifest, precise: bool, properties: Mapping[str, str]) -> None:
    """Refuse what cannot be measured, before anything is.

    Raises:
        UsageError: with ``precise`` no activations are in eight bits; properties would say otherwise, too.
        UnsupportedError: not a decoder; its engine has one precision for all products; or none is in eight bits.
    """
    if precise:
        raise UsageError("--activations compares with float32 activations by itself; leave --precise out")
    if properties:
        raise UsageError(f"--activations sets what a product computes in by itself; leave {', '.join(properties)} out")
    if manifest.task != "generate":
        raise UnsupportedError(
            f"--activations compares a decoder's next tokens; this package's task is {manifest.task}: "
            "verify --precise shows what all its activations together cost"
        )
    _rounded(folder)


def logits_bytes(vocabulary: int) -> float:
    """Bytes of logits that are held at once: the exact package's, a product's, and what becomes of them."""
    return 3.0 * 4 * vocabulary * WINDOWS * _length(vocabulary, WINDOWS)


def measure_activations(folder: Path, ids: Ids, vocabulary: int, tell: Callable[[float, str], None]) -> ActivationCost:
    """What each product of a package loses by activations in eight bits.

    Args:
        folder: the package.
        ids: windows of held-out text; the beginnings of a few of them are used.
        vocabulary: logits of a token.
        tell: told the share that is done, and what it is about.

    Raises:
        UnsupportedError: see `check_asked`.
    """
    from roundexport.runtime.loading import open_with
    from roundexport.runtime.types import EngineOptions

    engine, rounded, spared = _rounded(folder)
    threads, windows = choose_threads(None).count, _few(ids, vocabulary)

    def logits(int8: frozenset[str]) -> NDArray[np.float32]:
        options = EngineOptions(threads=threads, precise=True, int8_products=int8)
        opened: Any = open_with(folder, engine, options)
        found: NDArray[np.float32] = opened.logits(windows)
        return found

    exact = _log_probabilities(logits(frozenset()))
    steps = len(rounded) + 1
    together = _loss(exact, logits(frozenset(product.name for product in rounded)))
    found = []
    for place, product in enumerate(rounded, 1):
        tell(place / steps, product.layers[0])
        found.append(ProductLoss(product.layers, _loss(exact, logits(frozenset([product.name])))))
    found.sort(key=lambda one: -one.kl.mean)
    return ActivationCost(windows.size, together, tuple(found), spared)


def _rounded(folder: Path) -> tuple[str, list[Product], tuple[str, ...]]:
    """The package's engine, products whose activations are in eight bits, and layers whose are not."""
    from roundexport.runtime.loading import installed, products

    engine = installed(folder)[0]
    every = products(folder, engine)
    rounded = [product for product in every if product.int8]
    if not rounded:
        raise UnsupportedError(
            f"{folder}: --activations found no product among {len(every)} that is said to read activations in eight "
            "bits, so there is nothing to measure (a graph of the standard dialect says of none)"
        )
    return engine, rounded, tuple(name for product in every if not product.int8 for name in product.layers)


def _few(ids: Ids, vocabulary: int) -> Ids:
    """Beginnings of windows spread over the text, as many tokens as there is room for."""
    chosen = ids[np.linspace(0, len(ids) - 1, min(WINDOWS, len(ids))).astype(int)]
    return np.ascontiguousarray(chosen[:, : _length(vocabulary, len(chosen))])


def _length(vocabulary: int, windows: int) -> int:
    """Tokens of a window that there is room for."""
    return max(_LEAST, min(LENGTH, _BYTES // (4 * vocabulary * windows)))


def _log_probabilities(logits: NDArray[np.float32]) -> torch.Tensor:
    return torch.log_softmax(torch.from_numpy(logits).float(), -1)


def _loss(exact: torch.Tensor, logits: NDArray[np.float32]) -> Figure:
    """Mean over tokens, with its standard error over windows."""
    return Figure.over(np.array([_kl(p, torch.from_numpy(q)) for p, q in zip(exact, logits, strict=True)]))


def _kl(p: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean over the tokens of a window; of terms that are positive, so that float32 keeps what is as small as 1e-9."""
    d = torch.log_softmax(logits.float(), -1) - p
    return float((p.exp() * (torch.expm1(d) - d)).sum(-1).mean())
