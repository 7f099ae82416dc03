"""Everything that is changed in other libraries, each change for as long as a block lasts.

    weights_on_meta      linears, embeddings, stacked experts: their __init__ puts weights on the meta device
    function_in          one function of a transformers modeling module, such as apply_rotary_pos_emb, is another
    method_of            one method of one module is another
    attention_of         a model's attention and masks go through functions of ours, by transformers' own registry
    forwards             the forward of some modules is another
    classes              some modules are of another class, which differs in its forward alone
    sets_in_order        modeling files go through their sets of names in alphabetical order
    code_when_called     torch writes Python code for a graph when it is called, not after every pass over it

Made for torch 2.13 and transformers 5.23.  Each checks that what it changes is there and says so where it is not; each
puts back what it found.  None is safe for two threads at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from torch.fx import GraphModule
from torch.fx.graph import _PyTreeCodeGen
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from roundexport.errors import UnsupportedError

_MADE_FOR = "torch 2.13 and transformers 5.23"


@contextmanager
def weights_on_meta(holds_stack: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Linears, embeddings and stacked experts built inside are on the meta device: shapes without values.

    Args:
        holds_stack: whether a module's own parameters are stacked experts; asked while it is being built.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, Conv1D)
    originals = [kind.__init__ for kind in kinds]

    def on_meta(original: Callable[..., None]) -> Callable[..., None]:
        def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            with torch.device("meta"):
                original(self, *args, **kwargs)

        return build

    def stacked_on_meta(module: nn.Module, _: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or not holds_stack(module):
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    for kind, original in zip(kinds, originals, strict=True):
        kind.__init__ = on_meta(original)  # type: ignore[method-assign]
    handle = register_module_parameter_registration_hook(stacked_on_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
        for kind, original in zip(kinds, originals, strict=True):
            kind.__init__ = original  # type: ignore[method-assign]


@contextmanager
def function_in(module: ModuleType | type, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """``module.name`` is the replacement.

    Raises:
        UnsupportedError: the module has no such function.
    """
    original = getattr(module, name, None)
    if not callable(original):
        raise _missing(f"{module.__name__} has no function {name}")
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def method_of(module: nn.Module, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """``module.name(…)`` calls the replacement, which is not given the module.

    Raises:
        UnsupportedError: its class has no such method.
    """
    if not callable(getattr(type(module), name, None)):
        raise _missing(f"{type(module).__name__} has no method {name}")
    setattr(module, name, replacement)
    try:
        yield
    finally:
        delattr(module, name)


@contextmanager
def attention_of(
    model: nn.Module, name: str, attention: Callable[..., Any], mask: Callable[..., Any], asks: bool = True
) -> Iterator[None]:
    """The model's attention is ``attention`` and its masks are made by ``mask``, registered under this name.

    Args:
        model: the model.
        name: of the registration.
        attention: as transformers calls it.
        mask: likewise.
        asks: whether the model's classes take attention by name; else the name is written into its config alone, where
            the functions that make masks find it.

    Raises:
        UnsupportedError: the model spells its attention out, or transformers has no registry of this form.
    """
    registries: list[tuple[Any, Callable[..., Any]]] = [(AttentionInterface, attention), (AttentionMaskInterface, mask)]
    for registry, _ in registries:
        if not isinstance(getattr(registry, "_global_mapping", None), dict):
            raise _missing(f"transformers' {registry.__name__} keeps no table of functions by name")
    for registry, function in registries:
        registry.register(name, function)
    try:
        try:
            if asks:
                model.set_attn_implementation(name)  # type: ignore[operator]
            else:
                model.config._attn_implementation = name  # type: ignore[union-attr]
        except (ValueError, AttributeError) as error:
            raise UnsupportedError(
                f"{type(model).__name__} spells its attention out instead of using transformers' attention interface; "
                f"it cannot be captured with a KV cache ({error})"
            ) from error
        yield
    finally:
        for registry, _ in registries:
            registry._global_mapping.pop(name, None)


@contextmanager
def forwards(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """The forward of each of these modules is this function, which is not given the module."""
    changed = list(modules)
    for module in changed:
        if "forward" in vars(module):
            raise AssertionError(f"{type(module).__name__}: its forward is already another")
    for module in changed:
        module.forward = forward
    try:
        yield
    finally:
        for module in changed:
            del module.forward


@contextmanager
def classes(modules: Iterable[nn.Module], others: dict[type[nn.Module], type[nn.Module]]) -> Iterator[None]:
    """Modules of one class are of another, which differs in its forward alone; those of no listed class stay."""
    changed = [(module, type(module)) for module in modules if type(module) in others]
    try:
        for module, own in changed:
            module.__class__ = others[own]
        yield
    finally:
        for module, own in changed:
            module.__class__ = own


class _InOrder(set[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=str))


@contextmanager
def sets_in_order(model: nn.Module) -> Iterator[None]:
    """The files that a model's classes come from go through every set in alphabetical order.

    Where they visit a set of layer types, its order changes from process to process with the hashes of strings, and
    with it the order of a traced program and every name in it.
    """
    namespaces = {id(space): space for module in model.modules() if (space := _modeling_file(type(module))) is not None}
    missing = object()
    before = [(space, space.get("set", missing)) for space in namespaces.values()]
    held = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is set and not name.startswith("_")
    ]
    try:
        for space, _ in before:
            space["set"] = _InOrder
        for module, name, value in held:
            vars(module)[name] = _InOrder(value)
        yield
    finally:
        for space, old in before:
            if old is missing:
                del space["set"]
            else:
                space["set"] = old
        for module, name, value in held:
            vars(module)[name] = value


@contextmanager
def code_when_called() -> Iterator[None]:
    """A graph gets its Python code when it is called or asked for; torch writes it anew after each of some 30 passes.

    That is a tenth of an export, more with more nodes, for code that an export never calls.  A graph that was changed
    inside and is called afterwards gets its code then.
    """
    whole, read = GraphModule.recompile, GraphModule.code

    def first_call(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
        whole(self)
        return self(*args, **kwargs)

    def later(self: GraphModule) -> None:
        if isinstance(code := self._graph._codegen, _PyTreeCodeGen):
            self._in_spec, self._out_spec = code.pytree_info.in_spec, code.pytree_info.out_spec
        type(self).forward = first_call

    def code_now(self: GraphModule) -> str:
        if type(self).forward is first_call:
            whole(self)
        found: str = self._code
        return found

    GraphModule.recompile, GraphModule.code = later, property(code_now)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        GraphModule.recompile, GraphModule.code = whole, read  # type: ignore[method-assign]


def _modeling_file(kind: type) -> dict[str, Any] | None:
    file = sys.modules.get(kind.__module__)
    return vars(file) if file is not None and ".modeling_" in kind.__module__ else None


def _missing(what: str) -> UnsupportedError:
    have = f"torch {torch.__version__} and transformers {transformers.__version__}"
    return UnsupportedError(f"{what}; roundexport was made for {_MADE_FOR}, installed are {have}")
