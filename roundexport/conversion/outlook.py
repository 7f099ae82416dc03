"""What a conversion will take beside tuning its blocks, and whether there is room for it: said before any work.

    disk    artifact + one package per target + hidden states before and behind a block, through both prefixes
            + what an error of each output costs, where the method looks at that
            + of a search for a KL the artifacts of its rounds, which stay until one is taken (kl_search.py)
    memory  what replays the float model (tuning/memory_need.py), and
            the moments of export and verification (their memory_need.py), against --max-ram and the machine's
    time    2 · weights · tokens / (multiply-adds per second of a product timed here), for the calibration text that the
            model writes and for verification; what the blocks take is said once one of them was timed (limits.py)

All three are rough, meant to tell minutes from hours and a full disk from an empty one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from roundexport.calibration.mixture import own_text_share
from roundexport.calibration.self_generated import can_write
from roundexport.environment.disk import bytes_in, check_disk
from roundexport.environment.memory import MemoryLimit
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.model_config import hidden_width
from roundexport.model.weight_bytes import WeightBytes
from roundexport.progress import duration
from roundexport.targets.interface import load_target
from roundexport.targets.memory_need import export_moments
from roundexport.tuning.checkpointing import replayed
from roundexport.tuning.chosen_methods import reads_text
from roundexport.tuning.disk_need import planned_output_bytes
from roundexport.tuning.memory_need import check_planned
from roundexport.tuning.planned_run import PlannedRun
from roundexport.tuning.recipes import resolve
from roundexport.tuning.settings import TuneSettings
from roundexport.tuning.state_folder import folder_of
from roundexport.verification.heldout import has_tokenizer
from roundexport.verification.memory_need import Windows, verify_moments

from .encoder_recipes import is_encoder_recipe
from .kl_search import floor_of, rounds_at_most, rounds_of, searches
from .package_size import package_bytes, weight_count
from .package_writer import PackageWriter

_DECODED = 16, 512  # windows and tokens of a verification, whose length a user cannot choose here
_VERIFIED = 16 * 512 + 8 * 80  # tokens of it and of what is written
_ONE_BY_ONE = 1.6  # a token written alone in its row, over one that is read in a batch
_PACKAGE_SECONDS = 30.0  # to make the 8-bit package that writes (package_writer.py)
_PACKAGE_SPEED = 4.0  # how much faster than the model in torch it writes


def check_room(
    checkpoint: Checkpoint,
    settings: TuneSettings,
    folder: Path,
    targets: Sequence[str],
    embeds: bool = False,
    tuned: bool = False,
) -> str:
    """Refuse a conversion that disk or memory cannot hold.

    Args:
        checkpoint: the float model.
        settings: how it is tuned.
        folder: where to.
        targets: what it is exported to.
        embeds: graphs read vectors.
        tuned: the artifact is there.

    Returns:
        Disk that it takes, in words.

    Raises:
        WontFitError: with what is needed and what there is.
    """
    package = package_bytes(checkpoint, settings)
    parts = {f"{len(targets)} packages": len(targets) * package}
    if not tuned:
        parts["the artifact"] = package
        if checkpoint.imported is None:
            parts |= _tuning_bytes(checkpoint, settings, folder, package)
    if any(load_target(name).spills for name in targets):
        parts["a package while it is written"] = package
    advice = "free some, name fewer targets, or use fewer or shorter samples"
    left = bytes_in(folder_of(folder / "artifact")) + bytes_in(rounds_of(folder))
    said = check_disk(folder, "the conversion", parts, advice, there=left)
    _check_memory(checkpoint, settings, package, embeds)
    return said


def _tuning_bytes(checkpoint: Checkpoint, settings: TuneSettings, folder: Path, package: float) -> dict[str, float]:
    """What tuning writes beside the artifact, by name.

    Raises:
        WontFitError: what replays the float model does not fit in memory.
    """
    width = hidden_width(checkpoint.config) if reads_text(settings) else 0
    parts: dict[str, float] = {"hidden states": 2 * 2 * 4 * settings.samples * settings.sample_len * width}
    if is_encoder_recipe(settings):
        return parts
    if resolve(settings).finish is not None:
        parts["the artifact that is finished"] = package
    if searches(settings):
        rounds = rounds_at_most(folder, settings)
        parts["artifacts of rounds"] = package_bytes(checkpoint, floor_of(settings)) + (rounds - 1) * package
    state = next(rounds_of(folder).glob(f"*/{folder_of(Path('artifact'))}"), folder_of(folder / "artifact"))
    planned = PlannedRun(checkpoint, settings)
    check_planned(planned, replayed(state))
    if measured := _measured(planned, state):
        parts["what errors of outputs cost"] = measured
    return parts


def _check_memory(checkpoint: Checkpoint, settings: TuneSettings, package: float, embeds: bool) -> None:
    """Refuse packages that could not be opened and compared here."""
    weights = WeightBytes.of(checkpoint)
    MemoryLimit(settings.max_ram).check(
        "a conversion, whose packages are opened and compared,",
        *export_moments(package, weights, checkpoint.task, embeds),
        *verify_moments(package, weights, _windows(checkpoint), checkpoint.task == "generate" and not embeds),
        advice="choose fewer bits, or tune alone and export on a machine with more memory",
        or_machine=True,
    )


def _measured(planned: PlannedRun, state: Path) -> int:
    """Bytes of what an error of each output costs; once all are measured, every block removes its own."""
    if "outputs" in replayed(state):
        return sum(path.stat().st_size for path in state.glob("fisher-*.safetensors"))
    return planned_output_bytes(planned)


def _windows(checkpoint: Checkpoint) -> Windows | None:
    """Text that verification gives a decoder; None: it writes its own, or is none."""
    if checkpoint.task != "generate" or not has_tokenizer(checkpoint):
        return None
    return Windows(*_DECODED, hidden_width(checkpoint.config), int(checkpoint.config.get("vocab_size") or 0))


def outlook(checkpoint: Checkpoint, settings: TuneSettings, targets: Sequence[str]) -> str:
    """What calibration and verification will take, in words."""
    weights, rate = weight_count(checkpoint), _multiply_adds_per_second()
    text = []
    written = round(own_text_share(settings.calibration) * settings.samples)
    if written and can_write(checkpoint) and reads_text(settings):
        seconds = _ONE_BY_ONE * weights * written * settings.sample_len / rate
        if PackageWriter(max_ram=settings.max_ram).worth_it(checkpoint, written, settings.sample_len):
            seconds = seconds / _PACKAGE_SPEED + _PACKAGE_SECONDS
        text.append(f"calibration text about {duration(seconds)} unless it was written before")
    seconds = (1 + len(targets)) * weights * _VERIFIED / rate
    text.append(f"verification about {duration(seconds)}")
    return f"beside the blocks, whose time is said once one was timed: {', '.join(text)}"


def _multiply_adds_per_second() -> float:
    """Of a float32 product on as many threads as torch uses."""
    import torch

    from roundexport.model.torch_threads import torch_threads

    left, right, best = torch.ones(512, 1024), torch.ones(1024, 2048), math.inf
    with torch_threads():
        for _ in range(3):
            since = time.perf_counter()
            torch.mm(left, right)
            best = min(best, time.perf_counter() - since)
    return 512 * 1024 * 2048 / max(best, 1e-6)
