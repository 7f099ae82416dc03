"""The product in C++ against dequantized weights, on every instruction set that the processor has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from roundexport.errors import RoundexportError, SpecError, UnsupportedError
from roundexport.kernels import native as kernel
from roundexport.kernels.native import build, library
from roundexport.kernels.native.product import INSTRUCTION_SETS, NativeWeight, force
from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

# rows N, columns K, group, scale dtype: whole tiles, a tile and columns left over, scales that float16 does not hold
SHAPES = [(64, 256, 128, np.float16), (50, 300, 64, np.float16), (96, 96, 32, np.float32), (33, 288, 256, np.float32)]
# one row, pairs, fours with a rest, more than go over a tile at once
ROWS = (1, 2, 7, 70)


@pytest.fixture(params=INSTRUCTION_SETS)
def forced(request: pytest.FixtureRequest, native: Path) -> Iterator[str]:
    if not force(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    force(next(name for name in INSTRUCTION_SETS if force(name)))


class Case:
    """A random weight, packed and dequantized."""

    def __init__(self, shape: tuple[int, int, int, type], bits: int, symmetric: bool) -> None:
        rng = np.random.default_rng(bits)
        rows, width, group, dtype = shape
        groups = -(-width // group)
        codes = rng.integers(0, 1 << bits, (rows, groups * group), dtype=np.uint8)
        codes[:, width:] = 0
        scales = (rng.uniform(-1.5, 1.5, (rows, groups)) / 64).astype(dtype)
        points = rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8)
        if symmetric:
            points[:] = 1 << (bits - 1)
        spread = [np.repeat(array.astype(np.float64), group, 1) for array in (points, scales)]
        self.group, self.width = group, width
        self.dense = ((codes - spread[0]) * spread[1])[:, :width]
        self.weight = NativeWeight.of(
            pack_codes(codes, bits).reshape(rows, groups, -1),
            scales,
            None if symmetric else pack_codes(points, bits),
            width,
            bits,
        )

    def rounded(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """x in eight bits per group."""
        filled = np.zeros((len(x), -(-self.width // self.group), self.group))
        filled.reshape(len(x), -1)[:, : self.width] = x
        scale = np.abs(filled).max(2, keepdims=True) / 127
        return (np.rint(filled / scale) * scale).reshape(len(x), -1)[:, : self.width]


def error(got: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_are_those_of_the_dequantized_weight(forced: str, bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        case = Case(shape, bits, symmetric)
        for rows in ROWS:
            x, bias = (rng.standard_normal(size).astype(np.float32) for size in ((rows, case.width), shape[0]))
            got = case.weight.product(x, bias)
            # activations halfway between two integers may go to either
            assert error(got, case.rounded(x) @ case.dense.T + bias) < 1e-3, (shape, rows)
            assert error(case.weight.product(x, bias, exact=True), x @ case.dense.T + bias) < 1e-6, (shape, rows)


def test_integers_are_exact(forced: str) -> None:
    """Activations that eight bits hold, at their largest, give the exact product: nothing overflows or saturates."""
    for bits in (2, 3, 4, 8):
        case = Case((64, 512, 256, np.float16), bits, True)
        x = np.where(np.random.default_rng(1).random((3, 512)) < 0.5, -127, 127).astype(np.float32)
        x[2] = 127
        assert error(case.weight.product(x), x @ case.dense.T) < 1e-6, bits


def test_a_row_of_zeros_gives_the_bias(forced: str) -> None:
    case = Case(SHAPES[0], 4, False)
    bias = np.arange(64, dtype=np.float32)
    assert np.array_equal(case.weight.product(np.zeros((1, 256), np.float32), bias), bias[None])


def test_it_is_a_kernel_like_the_others(native: Path) -> None:
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 8, (40, 96), dtype=np.uint8), rng.uniform(0.1, 1, (40, 3)).astype(np.float16)
    points = rng.integers(0, 8, (40, 3), dtype=np.uint8)
    linear = QuantizedLinear(QuantSpec(3, 32, symmetric=False), 96, pack_codes(codes, 3), scales, points)
    x, bias = rng.standard_normal((2, 3, 96)).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    assert kernel.available() is None
    assert error(kernel.run(x, linear, bias), kernel.reference(x, linear, bias).astype(np.float64)) < 1e-3


def test_bytes_are_what_the_bits_say(native: Path) -> None:
    for bits in (2, 3, 4, 8):
        assert Case(SHAPES[0], bits, True).weight.nbytes == 64 * 256 * bits // 8 + 64 * 2 * 2


def resident() -> dict[str, int]:
    """MiB of this process in memory, by kind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(size.split()[0]) >> 10 for name, _, size in (line.partition(":") for line in lines)}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")
def test_weights_are_in_memory_once(native: Path, tmp_path: Path) -> None:
    """Small ones share huge pages, and a file that they were read from leaves the process, but for pages written to."""
    before = resident()
    kept = [Case(SHAPES[0], 4, True).weight for _ in range(60)]
    assert resident()["Anonymous"] - before["Anonymous"] < 16  # a huge page each would be 120
    codes = np.random.default_rng(0).integers(0, 256, (4096, 128, 16), dtype=np.uint8)
    codes.tofile(tmp_path / "codes")
    mapped = np.memmap(tmp_path / "codes", np.uint8, "c", shape=codes.shape)
    mapped[7, 3], codes[7, 3] = 1, 1
    scales = np.ones((4096, 128), np.float16)
    read, before = mapped.sum(), resident()
    kept.append(NativeWeight.of(mapped, scales, None, 4096, 4))
    after = resident()
    assert (before["Rss"] - before["Anonymous"]) - (after["Rss"] - after["Anonymous"]) >= 7
    assert read == codes.sum() and np.array_equal(mapped, codes)
    one = np.eye(1, 4096, dtype=np.float32)
    kept.pop(0)
    assert np.array_equal(kept[-1].product(one)[0], (codes[:, 0, 0] & 15).astype(np.float32) - 8)


@pytest.mark.parametrize(("bits", "group"), [(5, 32), (4, 16), (4, 48)])
def test_what_it_cannot_take_is_refused(native: Path, bits: int, group: int) -> None:
    codes = np.zeros((32, 2, group * bits // 8), np.uint8)
    with pytest.raises(SpecError, match="no product for"):
        NativeWeight.of(codes, np.ones((32, 2), np.float16), None, 2 * group, bits)


CODES, SCALES = np.zeros((32, 2, 16), np.uint8), np.ones((32, 2), np.float16)


@pytest.mark.parametrize(
    ("codes", "scales", "points", "columns", "words"),
    [
        (CODES, SCALES.astype(np.float64), None, 64, r"scales must be float16 or float32 \[32, 2\], found float64"),
        (CODES, SCALES[:31], None, 64, r"scales must be .* \[32, 2\], found float16 \[31, 2\]"),
        (CODES, SCALES, np.zeros((32, 2), np.uint8), 64, r"zero points must be uint8 \[32, 1\], found uint8 \[32, 2\]"),
        (CODES, SCALES, np.zeros((32, 1), np.int8), 64, "zero points must be uint8"),
        (CODES, SCALES, None, 65, "65 columns have 3 groups of 32, found 2"),
        (CODES.astype(np.int8), SCALES, None, 64, "codes must be uint8"),
        (CODES[0], SCALES, None, 64, "codes must be uint8"),
        (CODES[:, :, :0], SCALES, None, 64, "no product for 4 bits in groups of 0"),
    ],
)
def test_arrays_that_the_library_would_read_wrongly_are_refused(
    native: Path, codes: NDArray[Any], scales: NDArray[Any], points: NDArray[Any] | None, columns: int, words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        NativeWeight.of(codes, scales, points, columns, 4)


def test_a_bias_that_the_library_would_read_wrongly_is_refused(native: Path) -> None:
    weight, x = NativeWeight.of(CODES, SCALES, None, 64, 4), np.zeros((1, 64), np.float32)
    for bias in (np.ones(32), np.ones(31, np.float32), np.ones((1, 32), np.float32)):
        with pytest.raises(SpecError, match=r"bias must be float32 \[32\], found float"):
            weight.product(x, bias)  # type: ignore[arg-type]
    strided = np.arange(64, dtype=np.float32)[::2]
    assert np.array_equal(weight.product(x, strided)[0], strided)


def test_a_library_that_is_not_built_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROUNDEXPORT_KERNELS", str(tmp_path / "none.so"))
    with pytest.raises(UnsupportedError, match=r"none\.so.*python -m roundexport\.kernels\.native\.build"):
        library.built()
    assert "native.build" in str(kernel.available())


def test_a_file_that_is_no_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("text")
    monkeypatch.setenv("ROUNDEXPORT_KERNELS", str(tmp_path / "text.so"))
    with pytest.raises(UnsupportedError, match=r"text\.so.*no library that this machine loads; run: python -m"):
        library.instruction_set()


def test_other_flags_are_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = []
    for text in ("-O3", "-O2", "-O3"):
        (tmp_path / "build.py").write_text(text)
        (tmp_path / "one.cpp").write_text("the same")
        monkeypatch.setattr(library, "FOLDER", tmp_path)
        names.append(library.default_path.__wrapped__().name)
    assert names[0] == names[2] != names[1]


def test_an_instruction_set_that_is_not_there_cannot_be_forced(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.instruction_set()
    assert found in INSTRUCTION_SETS
    monkeypatch.setenv("ROUNDEXPORT_ISA", "avx1024")
    with pytest.raises(UnsupportedError, match="ROUNDEXPORT_ISA is avx1024, which this processor or this build"):
        library.instruction_set()


def test_without_a_compiler_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["build", str(tmp_path / "kernels.so")])
    assert build.main() == 1 and not list(tmp_path.iterdir())
    assert "takes a C++ compiler: install g++ or clang++, or set CXX" in capsys.readouterr().err


def test_a_compiler_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RoundexportError, match="failed"):
        build.build(tmp_path / "kernels.so")
    monkeypatch.setenv("CXX", "/no/such -m64")
    with pytest.raises(RoundexportError, match=r"/no/such cannot be run: .*; set CXX to a C\+\+ compiler"):
        build.build(tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())


def test_a_compiler_may_be_several_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(build, "_run", lambda command: (commands.append(command), Path(command[-1]).touch()))
    monkeypatch.setenv("CXX", "ccache g++")
    assert build.build(tmp_path / "kernels.so").is_file()
    assert all(command[:2] == ["ccache", "g++"] for command in commands)


@pytest.mark.parametrize(
    ("argument", "code", "out", "err"),
    [
        ("--help", 0, "PATH | PACKAGE", ""),
        ("--nonsense", 2, "", "unrecognized arguments"),
        ("pakage", 1, "", "pakage: no such package, and a library's file ends in .so"),
    ],
)
def test_what_is_no_path_of_a_library_builds_none(
    argument: str, code: int, out: str, err: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["build", argument])
    try:
        found = build.main()
    except SystemExit as stop:
        found = int(stop.code or 0)
    told = capsys.readouterr()
    assert found == code and out in told.out and err in told.err and not list(tmp_path.iterdir())
