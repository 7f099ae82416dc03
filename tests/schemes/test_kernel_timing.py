"""Kernel times: what is measured runs in the runtime, is remembered under its conditions, and is not measured twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roundexport.errors import UsageError
from roundexport.quant.spec import QuantSpec
from roundexport.schemes import kernel_table as kernel_table_module
from roundexport.schemes import kernel_timing as kt
from roundexport.schemes.kernel_table import kernel_table
from roundexport.schemes.kernel_timing import Bench, Product, kernel_times

SCHEMES = (QuantSpec(4, 32), QuantSpec(3, 32, False), QuantSpec(2, 64, False), QuantSpec(8, None), QuantSpec(2, 32))


def quick(folder: Path, target: str = "onnx") -> Bench:
    return Bench(target, threads=1, rounds=3, folder=folder, bytes_of_copies=40_000)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_every_scheme_is_timed_in_the_targets_own_runtime(target: str, tmp_path: Path) -> None:
    wanted = [Product(48, 64, spec) for spec in SCHEMES]
    found = kernel_times([*wanted, wanted[0]], quick(tmp_path, target))
    assert list(found) == wanted and all(isinstance(ns, int) and ns > 0 for ns in found.values())


def test_a_larger_weight_takes_longer(tmp_path: Path) -> None:
    small, large = Product(64, 128, QuantSpec(4, 32)), Product(2048, 1024, QuantSpec(4, 32))
    found = kernel_times([small, large], quick(tmp_path))
    assert found[large] > 3 * found[small]


def test_what_was_timed_is_read_back_and_only_the_rest_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[list[Product]] = []

    def fake(group: list[Product], *_: Any) -> dict[Product, int]:
        timed.append(group)
        return {product: 1000 + product.spec.bits for product in group}

    monkeypatch.setattr(kt, "_time", fake)
    two, four, other = (Product(n, 64, QuantSpec(bits, 32)) for n, bits in ((32, 2), (32, 4), (48, 4)))
    assert kernel_times([two, other], quick(tmp_path)) == {two: 1002, other: 1004}
    assert kernel_times([two, four, other], quick(tmp_path)) == {two: 1002, four: 1004, other: 1004}
    assert timed == [[two], [other], [four]], "one shape at a time, nothing twice"
    kernel_times([two], Bench(threads=2, folder=tmp_path))
    kernel_times([two], quick(tmp_path, "openvino"))
    assert timed[3:] == [[two], [two]], "other threads and another runtime are other conditions"
    document = json.loads((tmp_path / kt.FILE).read_text())
    assert len(document["times"]) == 3
    assert any("1 threads, onnx, onnxruntime" in conditions for conditions in document["times"])
    (tmp_path / kt.FILE).write_text("{ damaged")
    assert kernel_times([two], quick(tmp_path)) == {two: 1002} and len(timed) == 6


def test_the_file_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kt, "_time", lambda group, *_: dict.fromkeys(group, 7))
    kernel_times([Product(8, 32, QuantSpec(4, 32))], Bench(threads=1))
    assert (tmp_path / "roundexport" / "kernel_times.json").is_file()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert kt.cache_folder() == Path("/home/somebody/.cache/roundexport")


def test_copies_differ_and_are_enough_to_leave_the_cache() -> None:
    product = Product(256, 256, QuantSpec(2, 128, False))
    weights = kt._weights(product, 1 << 20)
    assert sum(weight.storage_bits for weight in weights) >= 8 << 20
    assert not (weights[0].codes == weights[1].codes).all()


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="rounds must be at least 1"):
        Bench(rounds=0)
    with pytest.raises(UsageError, match="onnx"):
        kernel_times([Product(8, 32, QuantSpec(4, 32))], Bench("no_such_target"))


def test_the_table_has_the_models_shapes_merged_where_the_target_merges(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kt, "_time", lambda group, *_: {p: 1000 * p.spec.bits for p in group})
    schemes = (QuantSpec(2, 128, False), QuantSpec(8, 32))
    rows = kernel_table(models("qwen3"), quick(tmp_path), schemes)
    assert [(row["layer"], row["N×K"]) for row in rows[::3]] == [
        ("q_proj + k_proj + v_proj", "256×64"), ("o_proj", "64×128"),
    ]  # fmt: skip
    assert [row["scheme"] for row in rows[:3]] == ["int4 g32 sym", "int2 g64 asym", "int8 g32 sym"]
    assert [row["× int4 g32 sym"] for row in rows[:3]] == [1.0, 2.0, 0.5] and rows[0]["µs"] == 4.0
    monkeypatch.setattr(kernel_table_module, "merged", lambda target: False)
    alone = kernel_table(models("qwen3"), quick(tmp_path, "openvino"), schemes)
    assert [(row["layer"], row["N×K"]) for row in alone[::3]] == [
        ("q_proj", "128×64"), ("k_proj", "64×64"), ("o_proj", "64×128"),
    ]  # fmt: skip
