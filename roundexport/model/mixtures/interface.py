"""What a file of a family of experts offers, and how a module's file is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import nn

from roundexport import plugins


@dataclass(frozen=True)
class Mixture:
    """A family of experts that is not in transformers' registry.

    Args:
        stacked: name of the class whose parameters are stacked experts.
        replaced: name of the class whose modules are replaced; it is that class, or one that contains it.
        split: the module to put in the place of such a module.  It holds an ``Experts`` under the name that the
            checkpoint gives the stack; its parameters are views of the stacked ones.
    """

    stacked: str
    replaced: str
    split: Callable[[nn.Module], nn.Module]


def folder_of(kind: type) -> str:
    """The folder of transformers that a class is from, as in ``llama4``; another package's if it is from none."""
    return kind.__module__.rpartition(".")[0].rpartition(".")[2]


def mixture_of(kind: type) -> Mixture | None:
    """The file of a class' family; None where it has none."""
    return _of_family(folder_of(kind))


@cache
def _of_family(family: str) -> Mixture | None:
    if family not in plugins.names("mixtures"):
        return None
    found: Mixture = plugins.load_value("mixtures", family, "MIXTURE", Mixture)
    return found


def holds_stack(module: nn.Module) -> bool:
    """Whether a module's own parameters are stacked experts, by transformers' registry or by a file of ours."""
    mixture = mixture_of(type(module))
    return hasattr(module, "_apply_gate") or (mixture is not None and type(module).__name__ == mixture.stacked)
