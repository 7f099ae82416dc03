"""What the importers make of tensors, without a model around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from import_tools import Open
from safetensors.numpy import save_file

from roundexport.importers._opening import Opened, open_quantized
from roundexport.importers._tensors import Tensors
from roundexport.importers.interface import QuantizedFolder
from roundexport.storage.safetensors_reader import TensorFile


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """``opened(config, tensors)``: what the importers make of a file."""

    def get(config: dict[str, Any], tensors: dict[str, Any]) -> Opened:
        save_file(tensors, tmp_path / "model.safetensors")
        file = TensorFile(tmp_path / "model.safetensors")
        held = Tensors({"model.safetensors": file}, dict.fromkeys(file.names, "model.safetensors"))
        return open_quantized(QuantizedFolder("checkpoint", config, held))

    return get
