"""Calibration text written by the model's own 8-bit package, on a runtime: three to four times faster than torch.

    model ─ rounded to nearest, 8 bits ─ exported to a temporary folder ─ opened ─ batches sampled at temperature 1

It pays where much is to be written: making the package takes half a minute, so small models write in torch.  Where 8
bits do not fit in memory (``max_ram``, else the control group's limit, else the machine's), the package has 4, which
takes half of that: their text is a little further from the model's, and the manifest's calibration says so.

Measured on SmolLM2-135M-Instruct (EPYC, AVX-512 with VNNI, one thread, processor time beside other work), samples
written in full to position 512, milliseconds per token: in 22 rows torch float32 11.4, ONNX Runtime 4.0, OpenVINO
3.8; in the 66 rows that a package takes at a time OpenVINO 2.8.  At these, 128 samples take 12.5 min in torch and 3.1
by OpenVINO.

    OMP_NUM_THREADS=1 python samples/writer_speed.py MODEL --num-samples 22
    OMP_NUM_THREADS=1 python samples/writer_speed.py MODEL --num-samples 66 --writers openvino

Figures of shorter texts do not scale: at early positions attention has little to read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.calibration.self_generated import WRITING_BYTES, begin, draw_tokens, rows_at_a_time
from roundexport.environment.disk import check_disk
from roundexport.environment.memory import MemoryLimit
from roundexport.errors import RoundexportError, UnsupportedError
from roundexport.model.torch_threads import torch_threads
from roundexport.targets.output_check import OPENED
from roundexport.tuning.settings import TuneSettings

from .package_size import package_bytes

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint

Ids = NDArray[np.int64]
_MORE_ROWS = 3  # than torch writes at a time: no copy of the weights beside, and caches of fewer bytes
_EXPORTERS = {
    "openvino": ("openvino", "openvino_tokenizers"),
    "onnx": ("onnxruntime", "onnx", "onnx_ir", "onnxscript"),
}  # of the targets whose packages write, the fastest first, and what their export imports
_BITS = 8, 4
_WORTH = 1e12  # multiply-adds of the writing below which making a package takes longer


class PackageWriter:
    """Writes samples with an 8-bit package; see calibration/self_generated.py for what a writer is.

    Args:
        target: whose package; None: OpenVINO's where its exporter is installed, else ONNX's.
        max_ram: GiB of memory to stay within.
    """

    def __init__(self, target: str | None = None, max_ram: float | None = None) -> None:
        self._max_ram = max_ram
        self._target = target or next((name for name in _EXPORTERS if _installed(name)), None)

    def called(self, checkpoint: Checkpoint) -> str:
        """What writes, in words; two of the same name write the same text."""
        package = f"{self._settings(checkpoint).bits}-bit package"
        return package if self._target is None else f"{package} for {self._target}"

    def worth_it(self, checkpoint: Checkpoint, num_samples: int, length: int) -> bool:
        """Whether so much is to be written that a package saves time."""
        weights = sum(int(np.prod(shape)) for shape in checkpoint.owned().values())
        return weights * num_samples * length >= _WORTH

    def __call__(
        self, checkpoint: Checkpoint, begun: Ids, length: int, seed: int, report: Callable[[float, str], None]
    ) -> Ids:
        """Samples int64 [N, length] that begin as ``begun`` [N, P] says.

        Raises:
            RoundexportError: the model cannot be made a package, or cannot write, or no exporter is installed, or the
                package takes more than ``max_ram``, or its runtime fails.
        """
        if self._target is None:
            raise UnsupportedError("no target's exporter is installed; pip install 'roundexport[convert]'")
        settings = self._settings(checkpoint)
        MemoryLimit(self._max_ram).check(
            f"calibration self, which a {settings.bits}-bit package of the model writes,",
            *_moments(checkpoint, settings),
            advice="give a text file (--calibration FILE), or a larger max_ram",
        )
        from roundexport.runtime.generation import Decoder
        from roundexport.runtime.loading import load
        from roundexport.targets.export import export
        from roundexport.tuning.run import tune

        size = package_bytes(checkpoint, settings)
        with tempfile.TemporaryDirectory(prefix="roundexport-") as scratch:
            artifact, package = Path(scratch) / "artifact", Path(scratch) / "package"
            parts = {"an artifact": size, "its package": size, "the package while it is written": size}
            check_disk(Path(scratch), "writing calibration text", parts, "name another folder as TMPDIR")
            report(0.0, f"rounding to {settings.bits} bits")
            tune(checkpoint.location, artifact, settings, writer=None, progress=False)
            report(0.0, f"exporting the {settings.bits}-bit package")
            export(
                artifact, package, to=self._target, model=checkpoint.location, max_ram=self._max_ram, progress=False
            )  # fmt: skip
            with torch_threads() as threads:
                engine = load(package, check_hashes=False, threads=threads.count)
                if not isinstance(engine, Decoder):
                    raise UnsupportedError(f"{checkpoint.location} is not a decoder; it cannot write")
                rows = _MORE_ROWS * rows_at_a_time(checkpoint.config, length)
                return _sample(engine, begun, length, rows, seed, report)

    def _settings(self, checkpoint: Checkpoint) -> TuneSettings:
        """How the package is rounded: by the most bits that fit, else by the fewest."""
        limit = MemoryLimit(self._max_ram)
        asked = [TuneSettings(recipe="rtn", bits=bits, max_ram=self._max_ram) for bits in _BITS]
        return next((one for one in asked if limit.fits(*_moments(checkpoint, one))), asked[-1])


def _moments(checkpoint: Checkpoint, settings: TuneSettings) -> tuple[Mapping[str, float], ...]:
    """What is held at once; see environment/memory.py."""
    package = package_bytes(checkpoint, settings)
    opened = {"the package, twice while its runtime opens it": OPENED * package}
    return opened, {"the package": package, "caches and logits": WRITING_BYTES}


def _installed(target: str) -> bool:
    return all(find_spec(module) is not None for module in _EXPORTERS[target])


def _sample(engine: Any, begun: Ids, length: int, rows: int, seed: int, report: Callable[[float, str], None]) -> Ids:
    try:
        return _drawn(engine, begun, length, rows, seed, report)
    except RoundexportError:
        raise
    except Exception as error:  # what runtimes raise while they run shares no base class
        raise RoundexportError(f"its runtime failed while it wrote ({type(error).__name__}: {error})") from error


def _drawn(engine: Any, begun: Ids, length: int, rows: int, seed: int, report: Callable[[float, str], None]) -> Ids:
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = np.empty((len(begun), length), np.int64)
    ids[:, 0] = begun[:, 0]
    for start in range(0, len(ids), rows):
        part, own = ids[start : start + rows], begun[start : start + rows]
        with engine.start(rows=len(part), expected=length) as session:
            row = session.add(len(part))
            for position in range(1, length):
                logits = session.extend(dict(zip(row, part[:, position - 1 : position].tolist(), strict=True)))
                part[:, position] = begin(draw_tokens(torch.from_numpy(logits), generator).numpy(), own, position)
                report((start + len(part) * position / length) / len(ids), f"{start} samples written")
    return ids
