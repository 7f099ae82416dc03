"""What a report says of packages whose products multiply integers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_toys import Toy

from roundexport.formats.package import PackageManifest, read_package
from roundexport.reports.components import components


@pytest.fixture
def manifest(toy: Toy) -> PackageManifest:
    return read_package(toy.package(task="embed"))


def test_bct_says_products_tables_and_the_rest(manifest: PackageManifest) -> None:
    linear = {"bits": 4, "group_size": None, "symmetric": True}
    layers = {
        "table": {**linear, "stored": "uint4 pairs"},
        "up": {**linear, "stored": "int4, 8-bit inputs"},
        "down": {**linear, "stored": "int4, 8-bit inputs"},
    }
    assert components(replace(manifest, settings={"integer_inputs": True}, layers=layers)) == [  # type: ignore[arg-type]
        ("tables", "1, 4-bit weights; looked up, then floats"),
        ("products", "2, 4-bit weights × 8-bit inputs, int32 sums"),
        ("attention, activations, norms, sums", "floats"),
    ]


@pytest.mark.parametrize(("reverted", "told"), [([], "none"), (["up", "down"], "up, down")])
def test_w8a8_names_the_tool_and_what_went_back(manifest: PackageManifest, reverted: list[str], told: str) -> None:
    said = {"tool": "nncf 3.4.0", "layers": 37, "cosine": 0.99123, "cosine_wanted": 0.99, "reverted": reverted}
    assert components(replace(manifest, settings={"w8a8": said})) == [
        ("products and tables", "37 in 8 bits with 8-bit inputs of products, by nncf 3.4.0"),
        ("attention, activations, norms, sums", "floats"),
        ("accuracy control", f"cosine 0.99123 on samples apart, wanted 0.99; back to floats: {told}"),
    ]


def test_packages_made_before_the_control_and_others(manifest: PackageManifest) -> None:
    before = components(replace(manifest, settings={"w8a8": {"tool": "nncf 3.4.0", "layers": 39, "samples": 4}}))
    assert [name for name, _ in before] == ["products and tables", "attention, activations, norms, sums"]
    assert components(manifest) == []
