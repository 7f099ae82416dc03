"""Energy counters: sockets are summed, a counter begins again at its end, what cannot be read is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from roundexport.runtime.benchmarking.energy import EnergyMeter, per_token

RANGE = 1000


def domain(root: Path, folder: str, name: str, energy: int) -> Path:
    path = root / folder
    path.mkdir()
    for file, text in (("name", name), ("max_energy_range_uj", RANGE), ("energy_uj", energy)):
        (path / file).write_text(f"{text}\n")
    return path / "energy_uj"


@pytest.fixture
def sockets(tmp_path: Path) -> tuple[Path, Path]:
    first, second = domain(tmp_path, "intel-rapl:0", "package-0", 900), domain(tmp_path, "intel-rapl:1", "package-1", 5)
    domain(tmp_path, "intel-rapl:0:0", "core", 7)  # inside the package
    domain(tmp_path, "intel-rapl:2", "psys", 7)  # holds the packages
    domain(tmp_path, "intel-rapl-mmio:0", "package-0", 7)  # the same counter by another way
    return first, second


def test_sockets_are_summed_and_counters_begin_again(tmp_path: Path, sockets: tuple[Path, Path]) -> None:
    meter = EnergyMeter(tmp_path)
    assert meter.missing is None and meter.joules() == 0
    sockets[0].write_text("100")  # 100 up to the end at 1000, one to 0, 100 on
    sockets[1].write_text("25")
    assert meter.joules() == pytest.approx(221e-6)
    sockets[0].write_text("101")
    assert meter.joules() == pytest.approx(222e-6)
    for path in tmp_path.glob("*/energy_uj"):
        if path not in sockets:
            path.write_text("999")
    assert meter.joules() == pytest.approx(222e-6)


def test_what_cannot_be_read_is_said(tmp_path: Path, sockets: tuple[Path, Path]) -> None:
    meter = EnergyMeter(tmp_path)
    sockets[0].write_text("nonsense")
    assert meter.joules() is None and "could be read no longer" in str(meter.missing)
    assert "cannot be read" in str(EnergyMeter(tmp_path).missing)
    empty = EnergyMeter(tmp_path / "none")
    assert empty.joules() is None and "no RAPL counter" in str(empty.missing)


def test_a_counter_of_roots(tmp_path: Path, sockets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def guarded(self: Path, encoding: str | None = None) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, encoding)

    monkeypatch.setattr(Path, "read_text", guarded)
    meter = EnergyMeter(tmp_path)
    assert meter.joules() is None and "readable by root alone" in str(meter.missing)


@pytest.mark.parametrize(
    ("before", "after", "tokens", "found"),
    [(1.0, 5.0, 8, 0.5), (None, 5.0, 8, None), (1.0, None, 8, None), (1.0, 5.0, 0, None)],
)
def test_per_token(before: float | None, after: float | None, tokens: int, found: float | None) -> None:
    assert per_token(before, after, tokens) == found
