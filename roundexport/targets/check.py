"""What an export would refuse, found in seconds from a model's config alone: before an hour of tuning, not after it.

    checkpoint ──capture──▶ program ──each target's own lowering, weights left out──▶ refusal or nothing

The program is captured once for all targets, with one block of each kind (graph/repeated_blocks.py): thirty equal
blocks are refused for what one is refused for.  Where that cannot be traced the model is captured whole, so a reason
that is told is the whole model's.  No weight is read but the small ones of the capture (norms), nothing is written.
The tokenizer, its templates and prompts are read as the package's runtime will.  :func:`check_layers` holds layers with
their schemes against what a target can hold.  What neither finds: what a runtime says when it loads the finished graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roundexport.errors import ArtifactError, CheckpointError, UnsupportedError
from roundexport.types import PAIRS

from .interface import load_target

if TYPE_CHECKING:
    from roundexport.graph.capture import Capture
    from roundexport.model.checkpoint import Checkpoint
    from roundexport.quant.spec import LinearInfo, QuantSpec

    from .interface import Target, TargetSettings


@dataclass(frozen=True)
class Findings:
    """What a dry run found.

    Args:
        refused: target -> why it will refuse the model.
        notes: sentences that the user of a package must read, see ExportReport.
    """

    refused: dict[str, str]
    notes: tuple[str, ...] = ()


def dry_run(checkpoint: Checkpoint, targets: Sequence[str], embeds: bool = False) -> Findings:
    """Capture the model and lower it for every target, without weights and without writing anything.

    Args:
        checkpoint: the float model.
        targets: names of targets.
        embeds: of a decoder, whether its graph is to read vectors.

    Raises:
        UsageError: an unknown target.
    """
    loaded = {name: load_target(name) for name in targets}
    try:
        check_read_files(checkpoint)
        ways = {target.cross for target in loaded.values()} if checkpoint.task in PAIRS else {False}
        programs = {cross: _captured(checkpoint, cross, embeds) for cross in ways}
    except (UnsupportedError, CheckpointError, ArtifactError) as error:
        return Findings(dict.fromkeys(targets, str(error)))
    refused = {}
    for name, target in loaded.items():
        try:
            for program in programs[target.cross if len(programs) > 1 else next(iter(programs))]:
                target.check(program)
        except UnsupportedError as error:
            refused[name] = str(error)
    return Findings(refused, next(iter(programs.values()))[-1].notes)


def check_read_files(checkpoint: Checkpoint) -> None:
    """Read tokenizer, templates, prompts and letters as a package's runtime will, where there are any.

    Raises:
        CheckpointError, ArtifactError, UnsupportedError: it will not take them.
    """
    from roundexport.runtime.prompts import FILE, read_prompts
    from roundexport.runtime.tokenizer import Tokenizer

    checkpoint.check_side_files()
    if (checkpoint.folder / "tokenizer.json").is_file():
        Tokenizer(checkpoint.folder)
    if checkpoint.task == "embed" and (checkpoint.folder / FILE).is_file():
        read_prompts(checkpoint.folder / FILE)
    if checkpoint.task == "ctc":
        from roundexport.runtime.speech.ctc import read_vocabulary
        from roundexport.runtime.speech.waveform import frame_size, read_waveform

        read_vocabulary(checkpoint.folder, checkpoint.tokens["pad"], checkpoint.config["vocab_size"])
        read_waveform(checkpoint.folder)
        frame_size(checkpoint.config, checkpoint.location)


def _captured(checkpoint: Checkpoint, cross: bool, embeds: bool) -> tuple[Capture, ...]:
    """The model with one block of each kind; whole where that fails, for the reason or because only the whole runs."""
    from roundexport.graph.parts import captures

    try:
        return captures(checkpoint, cross=cross, whole=False, embeds=embeds)
    except (UnsupportedError, CheckpointError):
        return captures(checkpoint, cross=cross, embeds=embeds)


def check_layers(target: Target[TargetSettings], name: str, layers: Sequence[tuple[LinearInfo, QuantSpec]]) -> None:
    """Refuse layers that a target cannot hold in their schemes.

    Args:
        target: the target.
        name: its name.
        layers: with their schemes.

    Raises:
        UnsupportedError: naming the first layers, and why.
    """
    reasons = [
        f"{info.name} ({spec.describe()}): {reason}"
        for info, spec in layers
        if (reason := target.refusal(info, spec)) is not None
    ]
    if reasons:
        more = f"\n  and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        raise UnsupportedError(f"target {name} cannot hold these layers:\n  " + "\n  ".join(reasons[:5]) + more)
