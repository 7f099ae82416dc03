"""safetensors files: equal to the reference library's, any write order, resumable, and hostile headers refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from roundexport.errors import ArtifactError
from roundexport.storage.safetensors_reader import DTYPES, TensorFile
from roundexport.storage.safetensors_writer import TensorFileWriter, file_header, write_tensors

VALUES: dict[str, tuple[str, np.ndarray[Any, Any]]] = {
    "b.codes": ("U8", np.arange(15, dtype=np.uint8).reshape(3, 5)),
    "a.scales": ("F16", np.linspace(-1, 1, 6, dtype=np.float16).reshape(3, 2)),
    "norm": ("F32", np.array([1.5, -2.5, 3.5], np.float32)),
    "ids": ("I64", np.array([[1], [-1]], np.int64)),
    "one": ("F32", np.array(7.25, np.float32)),
    "none": ("U8", np.zeros((0, 4), np.uint8)),
}
SPECS = {name: (dtype, values.shape) for name, (dtype, values) in VALUES.items()}


def _write(path: Path, order: list[str] | None = None) -> bytes:
    writer = TensorFileWriter(path, SPECS, {"format": "x"})
    for name in order or list(VALUES):
        writer.write(name, VALUES[name][1])
    writer.close()
    return path.read_bytes()


def test_bytes_equal_those_of_the_safetensors_library(tmp_path: Path) -> None:
    save_file({name: values for name, (_, values) in VALUES.items()}, tmp_path / "theirs", {"format": "x"})
    assert _write(tmp_path / "ours") == (tmp_path / "theirs").read_bytes()


def test_the_safetensors_library_reads_what_was_written(tmp_path: Path) -> None:
    _write(tmp_path / "f")
    with safe_open(tmp_path / "f", "np") as file:
        assert file.metadata() == {"format": "x"}
        for name, (_, values) in VALUES.items():
            found = file.get_tensor(name)
            assert found.dtype == values.dtype
            assert np.array_equal(found, values)


def test_reader_gives_back_values_dtypes_and_shapes(tmp_path: Path) -> None:
    _write(tmp_path / "f")
    file = TensorFile(tmp_path / "f")
    assert file.names == sorted(VALUES)
    assert file.metadata == {"format": "x"}
    for name, (dtype, values) in VALUES.items():
        assert (file.dtype(name), file.shape(name)) == (dtype, values.shape)
        assert np.array_equal(file.read(name), values)
    assert "norm" in file
    assert "norms" not in file
    with pytest.raises(ArtifactError, match="there is no tensor 'norms'"):
        file.read("norms")


def test_views_are_read_only_and_float32_copies_are_not(tmp_path: Path) -> None:
    _write(tmp_path / "f")
    file = TensorFile(tmp_path / "f")
    view, copy = file.read("norm"), file.read_float32("norm")
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    copy[0] = 0
    assert file.read("norm")[0] == np.float32(1.5)


def test_a_view_outlives_its_file_object(tmp_path: Path) -> None:
    _write(tmp_path / "f")
    view = TensorFile(tmp_path / "f").read("b.codes")
    (tmp_path / "f").unlink()
    assert np.array_equal(view, VALUES["b.codes"][1])


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_every_float_dtype_reads_as_float32(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundexport.storage.safetensors_reader._CHUNK", 4)  # several pieces, the last one short
    exact = np.array([[0.0, -0.0, 1.0, -1.5, 0.15625], [256.0, -96.0, 2.0**-14, 3.0, 1024.0]], np.float32)
    stored = {
        "F16": exact.astype(np.float16),
        "BF16": (exact.view(np.uint32) >> 16).astype(np.uint16),  # all values have at most 8 significant bits
        "F32": exact,
        "F64": exact.astype(np.float64),
    }[dtype]
    write_tensors(tmp_path / "f", {"w": (dtype, stored)}, {})
    found = TensorFile(tmp_path / "f").read_float32("w")
    assert found.dtype == np.float32
    assert found.tobytes() == exact.tobytes()


@pytest.mark.parametrize("name", ["b.codes", "ids"])
def test_integers_are_not_read_as_floats(name: str, tmp_path: Path) -> None:
    _write(tmp_path / "f")
    with pytest.raises(ArtifactError, match=f"{name} is .*; F16, BF16, F32 or F64 expected"):
        TensorFile(tmp_path / "f").read_float32(name)


def test_bytes_do_not_depend_on_write_order(tmp_path: Path) -> None:
    orders = list(itertools.permutations(VALUES))[:: 720 // 12]
    assert len({_write(tmp_path / str(i), list(order)) for i, order in enumerate(orders)}) == 1


def test_a_killed_write_is_taken_up_again_and_gives_the_same_bytes(tmp_path: Path) -> None:
    names = list(VALUES)
    writer = TensorFileWriter(tmp_path / "f", SPECS, {"format": "x"})
    for name in names[:3]:
        writer.write(name, VALUES[name][1])
    writer.sync()
    writer.abandon()
    again = TensorFileWriter.open_existing(tmp_path / "f", SPECS, {"format": "x"}, names[:3])
    assert again.written == set(names[:3])
    for name in names[3:]:
        again.write(name, VALUES[name][1])
    again.close()
    assert (tmp_path / "f").read_bytes() == _write(tmp_path / "g")


def test_reopening_another_file_is_refused(tmp_path: Path) -> None:
    TensorFileWriter(tmp_path / "f", SPECS, {}).abandon()
    other = {**SPECS, "norm": ("F32", (4,))}
    for specs, metadata in ((other, {}), (SPECS, {"format": "y"})):
        with pytest.raises(ArtifactError, match="was begun with other tensors or is damaged"):
            TensorFileWriter.open_existing(tmp_path / "f", specs, metadata)
    with pytest.raises(ArtifactError, match="cannot be reopened: No such file"):
        TensorFileWriter.open_existing(tmp_path / "g", SPECS, {})


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    writer = TensorFileWriter(tmp_path / "f", SPECS, {})
    with pytest.raises(ArtifactError, match="'other' was not announced"):
        writer.write("other", np.zeros(1, np.uint8))
    with pytest.raises(ArtifactError, match=r"norm was announced as F32 \(3,\), given float64 \(3,\)"):
        writer.write("norm", np.zeros(3))
    with pytest.raises(ArtifactError, match=r"norm was announced as F32 \(3,\), given float32 \(4,\)"):
        writer.write("norm", np.zeros(4, np.float32))
    with pytest.raises(ArtifactError, match=r"6 tensors were not written, the first is a\.scales"):
        writer.close()
    writer.abandon()
    with pytest.raises(ArtifactError, match="exists already"):
        TensorFileWriter(tmp_path / "f", SPECS, {})
    with pytest.raises(ArtifactError, match="dtype 'INT4' is not known"):
        TensorFileWriter(tmp_path / "g", {"x": ("INT4", (1,))}, {})


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8), st.tuples(st.sampled_from(["U8", "F16", "F32"]), st.integers(0, 9)), max_size=6
    )
)
def test_every_tensor_is_aligned_and_the_data_starts_at_a_multiple_of_8(specs: dict[str, tuple[str, int]]) -> None:
    specs.pop("__metadata__", None)
    header = file_header({name: (dtype, (size,)) for name, (dtype, size) in specs.items()}, {})
    assert len(header) % 8 == 0
    for entry in json.loads(header[8:]).values():
        size = {"U8": 1, "F16": 2, "F32": 4}[entry["dtype"]]
        assert entry["data_offsets"][0] % size == 0


# --- hostile files -------------------------------------------------------------------------------------------------


def _file(path: Path, header: Mapping[str, Any] | str | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def _entry(begin: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_the_hand_made_file_is_fine_when_honest(tmp_path: Path) -> None:
    file = TensorFile(_file(tmp_path / "f", {"a": _entry(0, 3), "b": _entry(3, 5)}, b"abcde"))
    assert file.read("b").tobytes() == b"de"


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": _entry(0, 3), "b": _entry(2, 5)}, b"abcde", "b overlaps another tensor"),
        ({"a": _entry(0, 3), "b": _entry(0, 3)}, b"abc", "b overlaps another tensor"),
        ({"a": _entry(0, 2), "b": _entry(3, 5)}, b"abcde", "b leaves a gap before it"),
        ({"a": _entry(1, 5)}, b"abcde", "a leaves a gap before it"),
        ({"a": _entry(0, 3)}, b"abcde", "2 bytes at the end belong to no tensor"),
        ({}, b"x", "1 bytes at the end belong to no tensor"),
        ({"a": _entry(0, 9)}, b"abcde", "a ends at byte 9 of 5: the file is truncated"),
        ({"a": _entry(0, 5, "F32", [1])}, b"abcde", r"a F32 \[1\] takes 4 bytes but its range has 5"),
        ({"a": _entry(0, 5, shape=[1 << 40, 1 << 40])}, b"abcde", "takes .* bytes but its range has 5"),
        ({"a": _entry(3, 0, shape=[0])}, b"", "takes 0 bytes but its range has -3"),
        ({"a": _entry(0, 0, shape=[1 << 62, 1 << 62, 0])}, b"", "a has the impossible shape"),
        ({"a": _entry(0, 5, "F99")}, b"abcde", "unknown dtype 'F99'"),
        ({"a": {**_entry(0, 5), "dtype": 3}}, b"abcde", "unknown dtype 3"),
        ({"a": _entry(0, 5, shape=[-5])}, b"abcde", "malformed shape"),
        ({"a": _entry(0, 5, shape=[5.0])}, b"abcde", "malformed shape"),
        ({"a": _entry(0, 5, shape=[True, 5])}, b"abcde", "malformed shape"),
        ({"a": _entry(0, 5, shape="5")}, b"abcde", "malformed shape"),
        ({"a": _entry(0, 1, shape=[1] * 17)}, b"a", "malformed shape"),
        ({"a": {**_entry(0, 5), "data_offsets": [0, 5, 5]}}, b"abcde", "malformed shape or data_offsets"),
        ({"a": {**_entry(0, 5), "data_offsets": [0, 1 << 63]}}, b"abcde", "malformed shape or data_offsets"),
        ({"a": {**_entry(0, 5), "extra": 1}}, b"abcde", "needs exactly dtype, shape and data_offsets"),
        ({"a": [0, 5]}, b"abcde", "needs exactly dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map text to text"),
        ({"__metadata__": ["a"]}, b"", "__metadata__ must map text to text"),
        ('{"a":1,"a":2}', b"", "the key 'a' appears twice"),
        ('{"a":NaN}', b"", "NaN is no JSON number"),
        ('{"a":', b"", "header: not valid JSON"),
        ('{"a":' * 100_000, b"", "header: not valid JSON"),
        ("[]", b"", "the header does not start with {"),
        ("", b"", "the header does not start with {"),
        (' {"a":1}', b"", "the header does not start with {"),
        (b'{"\xff":1}', b"", "header: not valid JSON"),
    ],
)
def test_a_hostile_header_is_refused(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    path = _file(tmp_path / "f", header, data)
    with pytest.raises(ArtifactError, match=message) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"1234567", b"\xff" * 8, (9).to_bytes(8, "little") + b'{"a":1}'])
def test_a_length_that_leaves_the_file_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"too few for a safetensors file|truncated or no safetensors"):
        TensorFile(tmp_path / "f")


def test_a_header_of_very_many_tensors_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(one % number for number in range(260_000)) + b"}"
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ArtifactError, match="values, of which at most 1500000 are read"):
        TensorFile(tmp_path / "f")


def test_offsets_beyond_two_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)  # sparse: takes no space
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    specs = {"a.large": ("U8", (2_200_000_000,)), "b.last": ("U8", (4,))}
    writer = TensorFileWriter(tmp_path / "f", specs, {})
    writer.write("b.last", np.array([1, 2, 3, 4], np.uint8))
    writer.abandon()
    assert (tmp_path / "f").stat().st_size > 1 << 31
    file = TensorFile(tmp_path / "f")
    assert file.read("b.last").tolist() == [1, 2, 3, 4]
    assert file.read("a.large")[-3:].tolist() == [0, 0, 0]
    again = TensorFileWriter.open_existing(tmp_path / "f", specs, {}, ["a.large"])
    again.write("b.last", np.array([5, 6, 7, 8], np.uint8))
    again.close()
    assert TensorFile(tmp_path / "f").read("b.last").tolist() == [5, 6, 7, 8]


def test_an_enormous_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "f", "wb") as file:  # sparse: takes no space
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(ArtifactError, match="the header should have 200000000 bytes"):
        TensorFile(tmp_path / "f")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    raw = _write(tmp_path / "f")
    for length in range(len(raw)):
        (tmp_path / "f").write_bytes(raw[:length])
        with pytest.raises(ArtifactError):
            TensorFile(tmp_path / "f")


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ArtifactError, match="cannot be read"):
            TensorFile(path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_damaged_bytes_never_cause_anything_but_a_refusal(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.getbasetemp() / f"damaged-{seed}"
    raw = bytearray(_write(path))
    for _ in range(int(rng.integers(1, 4))):
        raw[int(rng.integers(0, len(raw)))] = int(rng.integers(0, 256))
    path.write_bytes(raw)
    try:
        file = TensorFile(path)
        for name in file.names:
            file.read(name)
    except ArtifactError as error:
        assert str(path) in str(error)
    finally:
        path.unlink()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_rows_are_read_alone_and_into_memory_that_is_given(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    values = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values.astype(DTYPES[dtype])
    write_tensors(path, {"before": ("U8", np.zeros(8, np.uint8)), "x": (dtype, raw)}, {})
    file, out = TensorFile(path), np.empty((2, 4, 3), np.float32)
    assert file.read_float32("x", (1, 3), out) is out
    assert np.array_equal(out, values[1:3]) and np.array_equal(file.read_float32("x", (4, 5)), values[4:])
    assert file.read_float32("x", (2, 2)).shape == (0, 4, 3)
    with pytest.raises(ArtifactError, match="has no rows 4 to 6"):
        file.read_float32("x", (4, 6))
    with pytest.raises(ArtifactError, match="is read as float32"):
        file.read_float32("x", (0, 3), out)
