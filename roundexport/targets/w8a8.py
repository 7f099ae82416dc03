"""Packages with 8-bit weights and 8-bit inputs of products, made of float packages by the target's own tool.

    model ─ export, every weight float ─ proven against the model ─┐
    calibration samples ───────────────────────────────────────────┴─ Target.w8a8 ─ package

The tool decides what it quantizes, by which statistics, and rounds to nearest; nothing of it is in the artifact, which
is the float model's.  So the float package is what was proven, the report counts the products that became integers, and
`verify` says what that cost.  Linears that cost too much are floats again (w8a8_control.py).  The manifest names the
tool, the figure that was reached and what was reverted under ``w8a8`` of its settings.

Which tool: NNCF for OpenVINO (post-training quantization for transformers, smoothed), ONNX Runtime's static
quantization for ONNX.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from roundexport.environment.memory import MemoryLimit
from roundexport.errors import UnsupportedError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import MANIFEST, read_package, write_manifest
from roundexport.model.weight_bytes import WeightBytes
from roundexport.progress import Progress
from roundexport.storage.atomic import write_folder

from .export import export, source_of
from .interface import ExportReport, load_target
from .w8a8_control import Allowance

_REVERTED = "8 bits of it lose too much: reverted"

_COPIES = 4  # of the float model, while a tool reads, runs and rewrites it


def export_w8a8(
    artifact: Path,
    out: Path,
    allowance: Allowance,
    *,
    to: str,
    model: str | Path,
    progress: Progress,
    max_ram: float | None = None,
) -> ExportReport:
    """Export a float artifact and quantize the package.

    Args:
        artifact: one that quantizes nothing.
        out: package folder to make; must not exist.
        allowance: calibration samples, and what may be lost.
        to: the target.
        model: the float model.
        progress: where to report.
        max_ram: GiB of memory to stay within.

    Raises:
        UsageError: ``out`` exists.
        WontFitError: it takes more than ``max_ram``.
        UnsupportedError: the target has no such tool, or it is not installed, or it quantized nothing, or nothing of
            what it quantized may stay.
    """
    quantize = load_target(to).w8a8
    if quantize is None:
        raise UnsupportedError(f"target {to} has no tool for 8-bit weights and activations")
    source = source_of(Artifact.open(artifact, check_hashes=False), model, max_ram=max_ram)
    MemoryLimit(max_ram).check(
        "the target's own tool",
        {"copies of the float model that it holds": _COPIES * WeightBytes.of(source).whole},
        advice="use a machine with more memory, or another recipe",
    )
    with tempfile.TemporaryDirectory(prefix="roundexport-") as scratch:
        plain = Path(scratch) / "package"
        report = export(artifact, plain, to=to, model=model, max_ram=max_ram, progress=progress)
        manifest = read_package(plain, check_hashes=False)
        with write_folder(out) as folder:
            for name in manifest.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(plain / name, folder / name)
            (plain / MANIFEST).unlink()
            with progress.stage(f"8-bit weights and inputs for {to}: {len(allowance.ids)} samples"):
                done = quantize(folder, manifest.model_file, allowance)
            if not done.layers:
                why = f": each costs more than a cosine of {allowance.cosine:g} allows" if done.reverted else ""
                raise UnsupportedError(f"{done.tool} quantized no linear of this model{why}")
            reason = f"in 8 bits, not by this project but by {done.tool}"
            reasons = {**dict.fromkeys(done.layers, reason), **dict.fromkeys(done.reverted, _REVERTED)}
            kept = tuple((name, reasons.get(name, why)) for name, why in manifest.kept_float)
            said = {
                "tool": done.tool, "layers": len(done.layers), **done.settings, "cosine": round(done.cosine, 5),
                "cosine_wanted": allowance.cosine, "reverted": list(done.reverted),
            }  # fmt: skip
            written = write_manifest(
                folder, replace(manifest, kept_float=kept, settings={**manifest.settings, "w8a8": said})
            )
    back = (
        f"reverted to floats, as they lost too much: {', '.join(done.reverted)}" if done.reverted else "none reverted"
    )
    missed = "" if done.cosine >= allowance.cosine else ", NOT reached"
    note = (
        f"{done.tool} put {len(done.layers)} linears and tables in 8 bits, and inputs of linears, after the float "
        f"package was compared with the model; {back}; cosine {done.cosine:.5f} on {len(allowance.for_figure)} "
        f"samples, wanted {allowance.cosine:g}{missed}; what other texts lose, verify says"
    )
    sizes = {name: entry["size"] for name, entry in written.files.items()}
    return replace(report, kept_float=kept, files=sizes, notes=(*report.notes, note))
