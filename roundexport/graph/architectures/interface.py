"""What a family's file offers, and how it is put into a model for the length of a trace.

    ARCHITECTURE = Architecture({"FalconAttention.forward": forward})
    def forward(attention: nn.Module, trace: Trace, *args, **kwargs)     instead of FalconAttention.forward

What such a function leaves out or gets wrong is found where every package is held against transformers' own forward
before it is kept (targets/output_check.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from roundexport import plugins
from roundexport.model._patches import method_of


class Trace(Protocol):
    """What a family's functions hand things to, see graph/attention.py."""

    def attend(  # noqa: D102
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        *,
        sliding_window: int | None = None,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, None]: ...

    def make_mask(self, *, attention_mask: Tensor | None = None, mask_function: Any = None) -> Tensor | None: ...  # noqa: D102


@dataclass(frozen=True)
class Architecture:
    """A family whose attention must be shown the way to the placeholder.

    Args:
        methods: ``Class.method`` of the modeling file -> the function that stands in for it, called with the module,
            the trace, and what the method is called with.
        whole_tables: names of embeddings and linears whose weight is used as a matrix, not row by row, or without their
            being called, and of parameters of more than two axes; they are kept as they are.
        asks: the classes take attention by name too, as they do where a family needs no file.
        given_up: newer versions of transformers have given the methods up and take attention by name; then nothing
            stands in for them.
    """

    methods: Mapping[str, Callable[..., Any]]
    whole_tables: tuple[str, ...] = ()
    asks: bool = False
    given_up: bool = False

    def by_name(self, model: nn.Module) -> bool:
        """Whether a model's classes take attention by name."""
        if self.asks or not self.given_up:
            return self.asks
        methods = [name.split(".") for name in self.methods]
        return not any(
            type(part).__name__ == owner and hasattr(part, name) for part in model.modules() for owner, name in methods
        )

    @contextmanager
    def routed(self, model: nn.Module, trace: Trace) -> Iterator[None]:
        """While it lasts, the model's modules run the methods given here.

        Raises:
            UnsupportedError: a class has no such method, and none was given up.
        """
        methods = {} if self.given_up and self.by_name(model) else self.methods
        with ExitStack() as opened:
            for name, function in methods.items():
                owner, method = name.split(".")
                for module in model.modules():
                    if type(module).__name__ == owner:
                        called = functools.partial(_given, function, module, trace)
                        opened.enter_context(method_of(module, method, called))
            yield


def _given(function: Callable[..., Any], module: nn.Module, trace: Trace, *args: Any, **kwargs: Any) -> Any:
    """Call a family's function: layers are given ``past_key_values``, which transformers 5.24 calls ``cache``."""
    if "cache" in kwargs:
        kwargs["past_key_values"] = kwargs.pop("cache")
    return function(module, trace, *args, **kwargs)


def architecture_of(model: nn.Module) -> Architecture | None:
    """The file of a model's family, by the folder that transformers keeps the family in; None where it needs none."""
    places = (type(part).__module__ for part in model.modules())
    own = next((place for place in places if place.startswith("transformers.models.")), type(model).__module__)
    family = own.rpartition(".")[0].rpartition(".")[2]
    if family not in plugins.names("architectures"):
        return None
    found: Architecture = plugins.load_value("architectures", family, "ARCHITECTURE", Architecture)
    return found


def heads_first(out: Tensor) -> Tensor:
    """What attention functions give, [B, S, H, D], in the order of queries, [B, H, S, D]."""
    return out.transpose(1, 2)
