"""Hidden states in mapped files: what is written is there after dropping, syncing and opening anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roundexport.errors import ArtifactError, WontFitError
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.tuning import hidden_states
from roundexport.tuning.hidden_states import Hidden

META = {"format": "x"}


def filled(path: Path, shape: tuple[int, int, int] = (3, 5, 7)) -> Hidden:
    made = Hidden.create(path, shape, META)
    made.floats.copy_(torch.arange(made.floats.numel()).view(shape))
    made.quantized.copy_(-made.floats)
    return made


def test_the_file_is_safetensors_and_opens_again(tmp_path: Path) -> None:
    path = tmp_path / "hidden.safetensors"
    made = filled(path)
    made.sync()
    file = TensorFile(path)
    assert file.metadata == META and file.names == ["floats", "quantized"]
    assert (file.read("floats") == made.floats.numpy()).all() and (
        file.read("quantized") == made.quantized.numpy()
    ).all()
    again = Hidden.open(path)
    assert torch.equal(again.floats, made.floats) and torch.equal(again.quantized, made.quantized)
    assert again.floats.data_ptr() % 4096 == 0
    again.floats[0] = 5
    assert bool((made.floats[0] == 5).all()), "one file, one content"


def test_what_was_dropped_is_read_again(tmp_path: Path) -> None:
    made = filled(tmp_path / "hidden.safetensors", (8, 64, 64))
    expected = made.floats.clone()
    made.drop()
    assert torch.equal(made.floats, expected) and torch.equal(made.quantized, -expected)
    made.path.unlink()
    made.drop()
    assert torch.equal(made.floats, expected), "a file that was removed lives on while it is mapped"


def test_dropping_keeps_the_process_small(tmp_path: Path) -> None:
    """128 MiB are written and read again, with at most a batch of 2 MiB in memory."""
    code = (
        "import resource, sys, torch; from pathlib import Path; from roundexport.tuning.hidden_states import Hidden\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "made = Hidden.create(Path(sys.argv[1]), (64, 64, 4096), {}); start, total = peak(), 0.0\n"
        "for i in range(64): made.floats[i] = i; made.quantized[i] = 1; made.drop()\n"
        "for i in range(64): total += float(made.floats[i, 0, 0] * made.quantized[i].sum()); made.drop()\n"
        "assert total == 64 * 4096 * 63 * 32; print(peak() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hidden")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 24


def test_a_file_in_the_way_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "hidden.safetensors"
    path.write_bytes(b"left by a run that was killed")
    assert not bool(Hidden.create(path, (1, 2, 3), META).floats.any())


def test_a_disk_that_is_full_is_told_before_anything_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WontFitError, match="the disk is full"):
        Hidden.create(tmp_path / "hidden.safetensors", (1, 2, 3), META)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hidden.safetensors"
    made = filled(path)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-4])
    with pytest.raises(ArtifactError, match="truncated"):
        Hidden.open(path)
    del made
    other = hidden_states.file_header({"floats": ("F32", (1, 2, 3))}, {})
    path.write_bytes(other + bytes(24))
    with pytest.raises(ArtifactError, match="these are not hidden states"):
        Hidden.open(path)
