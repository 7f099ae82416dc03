"""Errors that stand for several."""

from roundexport.errors import ArtifactError, RoundexportError, UnsupportedError, WontFitError, together


def test_several_errors_are_one_of_their_kind_or_of_none() -> None:
    disk, memory, damaged = WontFitError("the disk is full"), WontFitError("too large"), ArtifactError("a hash differs")
    same, other = together([disk, memory], "kept: artifact"), together([disk, damaged], "kept: artifact")
    assert type(same) is WontFitError and same.exit_code == 4
    assert type(other) is RoundexportError and other.exit_code == 1
    assert str(other) == "the disk is full; a hash differs (kept: artifact)" and str(disk) == "the disk is full"
    assert isinstance(together([UnsupportedError("no")], ""), UnsupportedError)
