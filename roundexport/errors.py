"""Every error roundexport raises on purpose, and the exit code its command line gives it.

A message says what was asked, what was found, where (layer, file), and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class RoundexportError(Exception):
    """Root of all deliberate errors; exit code 1 unless a subclass says otherwise."""

    exit_code = 1


class UsageError(RoundexportError):
    """A parameter or combination of parameters makes no sense; nothing was started."""

    exit_code = 2


class SpecError(UsageError):
    """A quantization setting contradicts itself or the layer it is for."""


class CheckpointError(RoundexportError):
    """The model folder is missing, incomplete, or of a kind that is not read."""


class ArtifactError(RoundexportError):
    """An artifact or package on disk breaks its format."""


class UnsupportedError(RoundexportError):
    """A model or setting lies outside what a target, architecture or engine can do; the text says why."""


class WrongOutputsError(UnsupportedError):
    """A package gives other outputs than the model it stands for; it is not kept."""


class GateError(RoundexportError):
    """A verification gate failed."""

    exit_code = 3


class WontFitError(RoundexportError):
    """The work needs more memory or disk than there is."""

    exit_code = 4


class Interrupted(RoundexportError):  # noqa: N818  (not a failure: the run can be resumed)
    """Stopped on request; the text says how to resume."""

    exit_code = 130


def together(errors: Sequence[RoundexportError], left: str) -> RoundexportError:
    """One error for several: of their kind where they are of one, else a failure of no kind, with exit code 1.

    Args:
        errors: at least one.
        left: what there is in spite of them, in words.
    """
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else RoundexportError
    return kind(f"{'; '.join(map(str, errors))} ({left})")
