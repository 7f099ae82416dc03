"""Capture: the model's own forward, exported once by `torch.export`, with placeholders and no large weight.

    checkpoint ──skeleton──▶ nn.Module without linear weights ──swaps──▶ placeholders ──torch.export──▶ Capture

The skeleton is built from the config; linears and embeddings are born on the meta device, everything else (norms,
rotary frequencies) is real and filled from the checkpoint by name.  A few seconds, half a gigabyte, no per-model
code.  Targets lower the placeholders (see placeholders.py); this module knows no target.

A decoder's program takes ``input_ids`` [B, S], ``attention_mask`` [B, T] (T = past + S) and ``position_ids`` [B, S] and
gives ``logits`` [B, S, V]; its attention placeholders get the new keys and values only, the cache is the target's, and
so are states of short convolutions and of linear attention (states.py).  An
encoder's program takes ``input_ids``, ``attention_mask`` (and ``token_type_ids`` where the model has them) and gives
``last_hidden_state`` [B, S, H], or with a head ``logits``, [B, labels] of the text or [B, S, labels] of its tokens.
A program of sounds takes ``input_values`` [B, T] and gives ``logits`` [B, frames, V].
A program of images takes ``pixel_values`` [B, C, height, width], of one size, and gives the same, and beside hidden
states the vector that the model makes of them, if it does.

Limits: attention must go through transformers' attention interface; convolutions that mix channels are refused, but for
those of images (patches) and sounds, which stay plain operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from roundexport.errors import CheckpointError, UnsupportedError, UsageError
from roundexport.model.blocks import tied_modules
from roundexport.model.image_size import image_shape, size_unit
from roundexport.model.parametrizations import settle_parametrizations
from roundexport.model.skeleton import build_skeleton
from roundexport.model.tensor_fit import check_overrides
from roundexport.model.tensor_names import is_pooler
from roundexport.model.text_part import deep_features
from roundexport.quant.spec import LinearInfo
from roundexport.types import HEADLESS, OF_IMAGES, POOLED, VECTORS, WITHOUT_TOKENS, output_of

from .architectures.interface import architecture_of
from .attention import attention_placeholder
from .complex_rotary import real_rotary
from .experts import swap_experts
from .grid_stages import GridStage, trace_grid
from .halves import Half, traced
from .placeholders import AttentionInfo, Swaps, embedding_lookups, swap_norms, swap_weights
from .pooled_output import PooledOutput
from .repeated_blocks import skip_repeated_blocks
from .rotary import rope_placeholder
from .rotary_length import choose_angles
from .rotary_rewrites import simplify_rotary
from .rotary_tables import RopeTable, rope_tables
from .slice_writes import without_writes
from .stages import STAGES, Stage, check_stages, trace_stage
from .state_functions import state_placeholders
from .states import StateInfo, drop_whole_slices
from .tracing import export_module, inputs_of, trace_forward, trace_images, trace_sounds

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Capture:
    """A model's graph with placeholders, and the tables that their indices point into.

    Args:
        program: the exported graph; ``program.state_dict`` holds norms and other small parameters under ``model.…``.
        task: what the model is for, see types.py.
        inputs: names of the graph's inputs, in order.
        output: ``logits`` or ``last_hidden_state``, ``sentence_embedding`` where vectors come out; the first of
            ``outputs``.
        linears: what the index of a linear placeholder points to; those the output does not need are not in the graph.
        biased: names of linears that have a bias.
        transposed: names of linears whose float weight is stored [K, N] (Conv1D).
        groups: what the index of a placeholder of experts points to: for each expert places in ``linears``, see
            experts.py.
        embeddings: what the index of an embedding placeholder points to; ``shared_with`` names a tied lm_head.
        attentions: attention layers in order of their index.
        states: what else layers carry from token to token, in order of its index.
        rope_tables: distinct cos/sin tables.
        rope_table_of: index of a rope placeholder -> position in ``rope_tables``; absent where no table can be made.
        max_context: positions the package is to serve, see rotary_length.py.
        config: the transformers config.
        notes: what was decided for the user and must be said.
        beside: names of further outputs, in order.
        half: which half of a model with an encoder and a decoder, see halves.py; None: the whole model.
        stage: which part of a decoder that is cut behind its table of tokens, see stages.py, or of a tower that reads
            lists, see grid_stages.py; None: the whole model.
    """

    program: torch.export.ExportedProgram
    task: str
    inputs: tuple[str, ...]
    output: str
    linears: tuple[LinearInfo, ...]
    biased: frozenset[str]
    transposed: frozenset[str]
    embeddings: tuple[LinearInfo, ...]
    attentions: tuple[AttentionInfo, ...]
    rope_tables: tuple[RopeTable, ...]
    rope_table_of: dict[int, int]
    max_context: int
    config: Any
    notes: tuple[str, ...] = ()
    groups: tuple[tuple[tuple[int, ...], ...], ...] = ()
    beside: tuple[str, ...] = ()
    states: tuple[StateInfo, ...] = ()
    half: Half | None = None
    stage: Stage | GridStage | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs, in order."""
        return (self.output, *self.beside)

    def uses(self) -> Counter[str]:
        """How often each linear is used in one pass; more than once where blocks share their weights."""
        linear, grouped = torch.ops.roundexport.linear.default, torch.ops.roundexport.grouped_linear.default
        nodes = self.program.graph.nodes
        found = Counter(self.linears[node.args[1]].name for node in nodes if node.target is linear)
        groups = [self.groups[node.args[2]] for node in nodes if node.target is grouped]
        found.update(self.linears[index].name for group in groups for expert in group for index in expert)
        return found


def capture(
    checkpoint: Checkpoint,
    overrides: Mapping[str, NDArray[np.float32]] | None = None,
    max_context: int | None = None,
    whole: bool = True,
    pooled: bool = False,
    half: Half | None = None,
    stage: Stage | GridStage | None = None,
) -> Capture:
    """Export the model's forward with placeholders.

    Args:
        checkpoint: the float model; only its config and its small tensors are read.
        overrides: float tensors that tuning changed (folded norms), by parameter name; they win over the checkpoint.
        max_context: longest sequence to serve; None: what the model was made for, see rotary_length.py.
        pooled: of an embedder, whether vectors come out of the graph and not hidden states.
        whole: False leaves out blocks that repeat another, for a dry run; see repeated_blocks.py.
        half: the half to capture of a model with an encoder and a decoder.
        stage: the part to capture of a decoder that is cut behind its table of tokens, or of a tower that reads lists.

    Returns:
        The exported program and the tables behind its placeholder indices.

    Raises:
        UsageError: more positions than the model has, or pooled and it does not embed.
        UnsupportedError: the model's structure cannot be captured; the text names the part.
        ArtifactError: overrides that are not those of this model.
    """
    if pooled and checkpoint.task != "embed":
        raise UsageError(
            f"{checkpoint.location}: pooled is for models that embed; this one's task is {checkpoint.task}"
        )
    if stage in STAGES:
        check_stages(checkpoint)
    swaps = Swaps()
    model = _skeleton(checkpoint)
    check_overrides(model, overrides or {})
    tied = _tied_names(model)
    if not whole:
        skip_repeated_blocks(model)
    swap_experts(model, swaps)
    architecture = architecture_of(model)
    swap_weights(model, swaps, architecture.whole_tables if architecture else ())
    _load_small(model, checkpoint, overrides or {})
    swap_norms(model)
    decoder = checkpoint.task == "generate"
    rotary = choose_angles(model, max_context)
    images, masked = checkpoint.task in OF_IMAGES, checkpoint.task not in WITHOUT_TOKENS
    with (
        attention_placeholder(model, swaps, decoder, architecture, masked=masked and half is None) as trace,
        state_placeholders(model) as states,
        rope_placeholder(model, swaps) as turns,
        real_rotary(model, turns),
        embedding_lookups(),
    ):
        inputs = inputs_of(model, decoder)
        outputs: tuple[str, ...] = (output_of(checkpoint.task),)
        if half is not None:
            trace.halves = True
            ready = traced(model, trace, half)
            inputs, outputs = ready.inputs, ready.outputs
            program = export_module(ready.module, ready.samples, ready.dynamic, trace, states)
        elif stage in ("patches", "positions", "merger"):
            program, inputs = trace_grid(model, trace, stage)
        elif stage in STAGES:
            program, inputs, output = trace_stage(model, trace, states, stage, deep_features(checkpoint.config))
            outputs = (output,)
        elif images:
            wanted = _image_outputs(model, checkpoint)
            program, outputs = trace_images(model, trace, image_shape(checkpoint), wanted, size_unit(checkpoint))
        elif checkpoint.task == "ctc":
            program = trace_sounds(model, trace)
        else:
            head = PooledOutput(checkpoint.embedding_head()) if pooled else None
            program = trace_forward(model, trace, states, decoder, head)
            outputs = (POOLED if pooled else output_of(checkpoint.task),)
    without_writes(program)
    drop_whole_slices(program)
    program.graph.eliminate_dead_code()  # poolers and other heads whose output nobody asked for
    simplify_rotary(program)
    if stage not in _WITHOUT_ATTENTION and not swaps.attentions and (states.key_updates or not states.found):
        raise UnsupportedError(f"{type(model).__name__}: no attention went through transformers' attention interface")
    trace.check()
    states.check()
    tables, table_of = rope_tables(program, rotary.max_context)
    return Capture(
        program=program,
        task=checkpoint.task,
        inputs=inputs,
        output=outputs[0],
        beside=outputs[1:],
        half=half,
        stage=stage,
        linears=tuple(swaps.linears),
        biased=frozenset(swaps.biased),
        transposed=frozenset(swaps.transposed),
        groups=tuple(swaps.groups),
        embeddings=tuple(_with_tied(info, tied) for info in swaps.embeddings),
        attentions=_in_graph(program, swaps),
        states=tuple(states.found),
        rope_tables=tables,
        rope_table_of=table_of,
        max_context=_image_tokens(program, checkpoint) if images else rotary.max_context,
        config=model.config,
        notes=(*checkpoint.notes, *rotary.notes),
    )


def _in_graph(program: torch.export.ExportedProgram, swaps: Swaps) -> tuple[AttentionInfo, ...]:
    """Attention layers that the outputs depend on."""
    attention = torch.ops.roundexport.attention.default
    used = {node.args[6] for node in program.graph.nodes if node.target is attention}
    return tuple(swaps.attentions[index] for index in sorted(used))


def _skeleton(checkpoint: Checkpoint) -> nn.Module:
    try:
        model = build_skeleton(checkpoint, attention="eager")
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, NotImplementedError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UnsupportedError(f"{checkpoint.location}: transformers cannot build its model: {first}") from error
    architecture = architecture_of(model)
    kept = architecture.whole_tables if architecture else ()
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        stays = own in kept or _is_depthwise(model.get_submodule(path))
        stays |= checkpoint.task == "transcribe" and _kind_of(model, name) == "convolutions"
        if parameter.ndim > 2 and checkpoint.task not in WITHOUT_TOKENS and not stays:
            raise UnsupportedError(f"{name}: {_kind_of(model, name)} {list(parameter.shape)} are not exported yet")
    return model


def _image_outputs(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Outputs to give where the model has them: a vector only if the file holds what makes it."""
    lacking = any(is_pooler(name) and not checkpoint.has(name) for name, _ in model.named_parameters())
    vectors = VECTORS if checkpoint.task in HEADLESS and not lacking else ()
    return (output_of(checkpoint.task), *vectors)


def _image_tokens(program: torch.export.ExportedProgram, checkpoint: Checkpoint) -> int:
    """Positions that an image becomes; where it may have any size, patches of the size that it is tuned with."""
    if size_unit(checkpoint) is not None:
        _, height, width = image_shape(checkpoint)
        return height * width // int(checkpoint.config["patch_size"]) ** 2
    attention = torch.ops.roundexport.attention.default
    return max(int(node.args[0].meta["val"].shape[2]) for node in program.graph.nodes if node.target is attention)


def _is_depthwise(module: nn.Module) -> bool:
    """A convolution along the text that mixes no channels: small, and the same arithmetic in every runtime."""
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels == module.out_channels


def _kind_of(model: nn.Module, name: str) -> str:
    """What a parameter of more than two dimensions is, in words."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolutions"
    kind = type(owner).__name__
    if "expert" in name or "Expert" in kind or "MoE" in kind:
        return "stacked expert weights (mixture of experts)"
    return f"parameters of {kind} with more than two dimensions"


def _tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First module that owns an embedding's weight -> the others, as the skeleton was tied."""
    return {group[0]: group[1:] for group in tied_modules(model)}


def _with_tied(info: LinearInfo, tied: dict[str, tuple[str, ...]]) -> LinearInfo:
    return LinearInfo(info.name, info.in_features, info.out_features, "embedding", tied.get(info.name, ()))


def _load_small(model: nn.Module, checkpoint: Checkpoint, overrides: Mapping[str, NDArray[np.float32]]) -> None:
    """Fill what is real in the skeleton (norms, small parameters, persistent buffers) from the checkpoint by name."""
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.numel() == 0 and name.endswith("weight"):
            continue  # a placeholder's
        if name in overrides:
            values = overrides[name]
        elif checkpoint.has(name):
            values = checkpoint.float32(name)
        elif name in buffers or checkpoint.may_lack(name):
            continue  # recomputed at construction; or not asked for
        else:
            raise CheckpointError(f"{checkpoint.location}: parameter {name} of the model is not in the checkpoint")
        if values.size != tensor.numel():
            found, wanted = list(values.shape), list(tensor.shape)
            raise CheckpointError(f"{checkpoint.location}: {name} is {found}, but the config makes it {wanted}")
        with torch.no_grad():
            tensor.copy_(torch.tensor(values).reshape(tensor.shape))
    settle_parametrizations(model)


_WITHOUT_ATTENTION = ("embedding", "patches", "positions")
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
