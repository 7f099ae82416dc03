"""The record of a verification: told back for the export it is about, and for no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from roundexport.formats.package import MANIFEST
from roundexport.formats.verification_record import RECORD, read_record, write_record

REPORT = {"quality": {"kl": {"mean": 0.1, "standard_error": 0.01}}, "text": "held out"}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / MANIFEST).write_text('{"format": "x"}')
    return tmp_path


def test_what_was_found_is_read_again(package: Path) -> None:
    assert write_record(package, REPORT)
    assert read_record(package) == REPORT


def test_a_record_of_another_export_is_not_this_ones(package: Path) -> None:
    write_record(package, REPORT)
    (package / MANIFEST).write_text('{"format": "y"}')
    assert read_record(package) is None


def test_what_is_no_number_is_no_record_and_leaves_none(package: Path) -> None:
    assert write_record(package, REPORT)
    assert not write_record(package, {"quality": {"kl": {"mean": float("nan")}}})
    assert not (package / RECORD).exists()


@pytest.mark.parametrize("text", [None, "", "[]", "{", "nul\x00", "[" * 100_000])
def test_no_record_and_a_broken_one_are_none(package: Path, text: str | None) -> None:
    if text is not None:
        (package / RECORD).write_text(text)
    assert read_record(package) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_package_is_verified_without_a_record(package: Path) -> None:
    package.chmod(0o500)
    assert not write_record(package, REPORT)
    package.chmod(0o700)
    assert not (package / RECORD).exists()
