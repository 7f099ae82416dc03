"""Which component of an encoder runs how, in packages whose products multiply integers: recipes bct and w8a8.

    bct    settings say `integer_inputs`; a layer that is stored with 8-bit inputs is a product, any other a table
    w8a8   settings say under `w8a8` which tool it was, what it reached and what went back to floats; layers that it
           put in 8 bits are under `kept_float` (an artifact has no integers of them) with a reason of that kind

Of any other package there is nothing to say here: its linears have integer weights and float inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roundexport.formats.package import PackageManifest

from .numbers import Pairs, number

_INPUTS = "8-bit inputs"
_REST = ("attention, activations, norms, sums", "floats")


def components(manifest: PackageManifest) -> Pairs:
    """Component and how it runs, in the order of the graph; empty where products do not multiply integers."""
    said = manifest.settings.get("w8a8")
    if isinstance(said, Mapping):
        return _by_a_tool(manifest, said)
    if not manifest.settings.get("integer_inputs"):
        return []
    bits = [(layer["bits"], _INPUTS in layer["stored"]) for layer in manifest.layers.values()]
    return [
        _counted("tables", [count for count, product in bits if not product], "weights; looked up, then floats"),
        _counted("products", [count for count, product in bits if product], "weights × 8-bit inputs, int32 sums"),
        _REST,
    ]


def _counted(name: str, bits: list[int], how: str) -> tuple[str, str]:
    kinds = ", ".join(f"{count}-bit" for count in sorted(set(bits)))
    return name, f"{len(bits)}, {kinds} {how}"


def _by_a_tool(manifest: PackageManifest, said: Mapping[str, Any]) -> Pairs:
    pairs = [
        ("products and tables", f"{said.get('layers')} in 8 bits with 8-bit inputs of products, by {said.get('tool')}"),
        _REST,
    ]
    back = said.get("reverted") or ()
    reached, wanted = number(said.get("cosine")), number(said.get("cosine_wanted"))
    if reached is not None and wanted is not None:
        control = f"cosine {reached:.5f} on samples apart, wanted {wanted:g}"
        pairs.append(("accuracy control", f"{control}; back to floats: {', '.join(back) or 'none'}"))
    return pairs
