"""Which weights of a model are quantized, how, and which stay float and why: settled before any work begins.

    inside the blocks    every linear, by bits, group_size and symmetric, rules and guards (rules.py)
    token embedding      and lm_head, by embedding_bits and embedding_group_size, symmetric; once, where they share a
                         weight; bits are chosen with those of the blocks' linears where that is asked for
    the rest             float: norms and biases without a word, every other matrix with a reason

With ``everything``, tables and linears outside the blocks are quantized like token embedding and lm_head, and norms and
biases are rounded to eight bits (int8_tensor.py).  Poolers are left out: no output that is used here depends on them.
A group size that does not divide K falls back to the largest smaller one that does, or to the whole row; weights that
are not numbers are refused here, by name.  When bits are chosen per layer, the plan has a `bit_allocator`, which lists
the schemes to choose from.  Until :meth:`Plan.with_specs` puts the chosen schemes in, the plan has those of ``bits``.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roundexport.errors import CheckpointError, SpecError
from roundexport.model.blocks import Stack, find_stack, linears, tied_modules, token_tables, weight_of
from roundexport.model.tensor_names import is_pooler
from roundexport.quant.spec import LayerKind, LinearInfo, QuantSpec

from .allocate import BitAllocator
from .rules import Decision, decide, fitting, read_rules
from .settings import TABLE_BITS, SchemeSettings

_LARGEST = 65504.0  # of float16: a weight beyond it may need a scale that float16 does not hold

_FEW_SCHEMES = 3  # so many are named one by one


@dataclass(frozen=True, eq=False)
class Plan:
    """What will be done.

    Args:
        stack: the blocks.
        block_specs: scheme by the linear's name in the block, one mapping per block.
        tables: what is quantized outside the blocks: token embedding, untied lm_head, and others if asked for.
        vectors: parameters that are rounded to eight bits, by name.
        layers: every weight to be quantized, with its scheme, in the model's order.
        kept_float: (module, reason) of other matrices.
        decisions: what rules and guards made of every linear in the blocks.
        bit_allocator: chooses bits per layer, where that was asked for.
    """

    stack: Stack
    block_specs: tuple[dict[str, QuantSpec], ...]
    tables: tuple[LinearInfo, ...]
    vectors: tuple[str, ...]
    layers: tuple[tuple[LinearInfo, QuantSpec], ...]
    kept_float: tuple[tuple[str, str], ...]
    decisions: tuple[Decision, ...] = ()
    bit_allocator: BitAllocator | None = None

    def describe(self) -> str:
        """The scheme of the linears in the blocks, and of tables that are chosen for, or how many there are."""
        chosen = () if self.bit_allocator is None else self.bit_allocator.tables
        inside = [(info, spec) for info, spec in self.layers if self.stack.holds(info.name) or info.name in chosen]
        stored = sum(spec.storage_bits(info.out_features, info.in_features) for info, spec in inside)
        weights = sum(info.out_features * info.in_features for info, _ in inside)
        mean = f", {stored / weights:.3f} bits per weight" if weights else ""
        schemes = Counter(spec.describe() for _, spec in inside)
        if len(schemes) <= _FEW_SCHEMES:
            named = ", ".join(schemes if len(schemes) == 1 else (f"{count} {name}" for name, count in schemes.items()))
            return f"{named}{mean}"
        counts = sorted(Counter(spec.bits for _, spec in inside).items())
        return f"{len(schemes)} schemes ({', '.join(f'{count} of {bits} bits' for bits, count in counts)}){mean}"

    def with_specs(self, chosen: Mapping[str, QuantSpec]) -> Plan:
        """The same plan with other schemes for some layers."""
        stack = self.stack
        specs = tuple(
            {name: chosen.get(f"{stack.block_name(index)}.{name}", spec) for name, spec in block.items()}
            for index, block in enumerate(self.block_specs)
        )
        layers = tuple((info, chosen.get(info.name, spec)) for info, spec in self.layers)
        return dataclasses.replace(self, block_specs=specs, layers=layers)


def make_plan(model: nn.Module, settings: SchemeSettings, values: Iterable[tuple[str, Tensor]] | None = None) -> Plan:
    """Decide for every weight of a model.

    Args:
        model: transformers model; a skeleton will do.
        settings: what was asked for.
        values: name and values of every parameter, in as many parts as wanted; None: the model's own.

    Returns:
        The plan.

    Raises:
        UsageError: rules that cannot be read or match nothing, or a target in bits that cannot be reached.
        SpecError: a rule's group size does not divide a layer's K, or weights are too large for float16 scales.
        CheckpointError: weights that are not finite.
        UnsupportedError: no blocks found.
    """
    stack = find_stack(model)
    tables = _tables(model) if settings.embedding_bits else ()
    if settings.everything:
        tables = (*tables, *_other_tables(model, stack, tables))
    infos = {}
    for index, block in enumerate(stack.blocks):
        for name, module in linears(block).items():
            rows, width = weight_of(module).shape
            infos[index, name] = LinearInfo(f"{stack.block_name(index)}.{name}", width, rows)
    rules = read_rules(settings.rules) if settings.rules else ()
    decisions = decide(list(infos.values()), settings.linears, rules)
    bit_allocator = None
    if settings.search.wanted:
        schemes = settings.search.schemes(settings.linears)
        bit_allocator = BitAllocator.of(
            [decide(list(infos.values()), scheme, rules) for scheme in schemes],
            settings.search,
            _table_options(model, settings),
        )
    specs = {d.info.name: d.spec for d in decisions if d.spec is not None}
    block_specs = [
        {name: specs[info.name] for (place, name), info in infos.items() if place == index and info.name in specs}
        for index in range(len(stack.blocks))
    ]
    planned = {d.info.name: (d.info, d.spec) for d in decisions if d.spec is not None}
    planned.update({info.name: (info, fitting(settings.tables, info.in_features)[0]) for info in tables})
    _check_numbers(model.named_parameters() if values is None else values, planned)
    order = [name for name, _ in model.named_modules() if name in planned]
    reasons = {d.info.name: d.reason for d in decisions if d.spec is None}
    known = {name for info, _ in planned.values() for name in (info.name, *info.shared_with)}
    kept = tuple((name, reasons.get(name, reason)) for name, reason in _kept_float(model, stack, known))
    vectors = [name for name, parameter in model.named_parameters() if parameter.ndim == 1 and not is_pooler(name)]
    return Plan(
        stack,
        tuple(block_specs),
        tables,
        tuple(vectors if settings.everything else ()),
        tuple(planned[name] for name in order),
        kept,
        decisions,
        bit_allocator,
    )


def _tables(model: nn.Module) -> tuple[LinearInfo, ...]:
    """Token embeddings and lm_head; where they share a weight, the first of them with the others' names."""
    names = {id(module): name for name, module in model.named_modules()}
    others = {group[0]: group[1:] for group in tied_modules(model)}
    found = []
    for module in token_tables(model):
        rows, width = module.get_parameter("weight").shape
        kind: LayerKind = "embedding" if isinstance(module, nn.Embedding) else "linear"
        name = names[id(module)]
        found.append(LinearInfo(name, width, rows, kind, others.get(name, ())))
    return tuple(found)


def _other_tables(model: nn.Module, stack: Stack, known: tuple[LinearInfo, ...]) -> list[LinearInfo]:
    """Embeddings and linears outside the blocks that are not among the known ones, nor share a weight with one."""
    modules = dict(model.named_modules())
    seen = {id(modules[info.name].weight) for info in known}
    found = []
    for name, module in modules.items():
        if not isinstance(module, nn.Embedding | nn.Linear | Conv1D) or id(module.weight) in seen:
            continue
        if is_pooler(name) or stack.holds(name):
            continue
        seen.add(id(module.weight))
        rows, width = weight_of(module).shape
        found.append(LinearInfo(name, width, rows, "embedding" if isinstance(module, nn.Embedding) else "linear"))
    return found


def _table_options(model: nn.Module, settings: SchemeSettings) -> list[tuple[LinearInfo, list[QuantSpec]]]:
    """What can be chosen for token embedding and lm_head."""
    if not settings.search.tables:
        return []
    schemes = [dataclasses.replace(settings.tables, bits=bits) for bits in TABLE_BITS]
    return [(info, [fitting(scheme, info.in_features)[0] for scheme in schemes]) for info in _tables(model)]


def _check_numbers(values: Iterable[tuple[str, Tensor]], planned: dict[str, tuple[LinearInfo, QuantSpec]]) -> None:
    for name, part in values:
        if not part.numel():
            continue
        module = name.rpartition(".")[0]
        low, high = map(float, torch.aminmax(part))  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CheckpointError(
                f"{module}: its {name.rpartition('.')[2]} holds values that are not finite (NaN or inf)"
            )
        if module not in planned or part.ndim != 2 or max(-low, high) <= _LARGEST:
            continue
        if planned[module][1].scale_dtype == "float16":
            raise SpecError(
                f"{module}: weights up to {max(-low, high):.3g} may need scales beyond {_LARGEST:.0f}, the largest of "
                "float16; store scales as float32 (--scale-dtype float32)"
            )


def _kept_float(model: nn.Module, stack: Stack, planned: set[str]) -> tuple[tuple[str, str], ...]:
    own = {id(module.get_parameter("weight")) for module in token_tables(model)}
    kept = []
    for name, module in model.named_modules():
        matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
        if not matrices or name in planned:
            continue
        if id(getattr(module, "weight", None)) in own:
            reason = "embedding_bits is none"
        elif stack.holds(name):
            reason = f"{type(module).__name__} is no linear layer"
        elif isinstance(module, nn.Linear | Conv1D):
            reason = "outside the blocks"
        else:
            reason = "a small table outside the blocks" if isinstance(module, nn.Embedding) else "no linear layer"
        kept.append((name, reason))
    return tuple(kept)
