"""Which linears of a block write to the residual stream: those whose outputs, with the block's input, are its output.

    h  →  h + o(…)  →  h + o(…) + down(…)        Llama: o_proj and down_proj; Phi, Falcon, GPT-J the same, side by side

They are found by running the block once: of the linears that share an input with no other and are as wide as the hidden
states, those whose outputs make up what the block adds to its input, token by token.  In: a float block and a sample.
Out: names, in the order in which they run.  Limits: a block with a norm behind a linear (Gemma 2, BERT), with a factor
on it (Granite) or with experts is another sum and has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .block_call import BlockCall
from .blocks import linears
from .hooks import hooks

_OF_CHANGE, _OF_INPUT = 1e-3, 1e-5  # what may differ, of what a block adds and of what enters it


def find_writers(
    block: nn.Module, call: BlockCall, hidden: Tensor, stages: Sequence[tuple[str, ...]]
) -> tuple[str, ...]:
    """Names of the linears that write to the residual stream.

    Args:
        block: the float block.
        call: how it is called.
        hidden: hidden states of a sample, [1, S, H].
        stages: its linears by the input they share.
    """
    if call.carried:
        return ()
    modules, outputs = linears(block), dict[str, Tensor]()

    def noting(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.update({name: output.clone()})

    alone = [stage[0] for stage in stages if len(stage) == 1]
    with hooks([modules[name].register_forward_hook(noting(name)) for name in alone]), torch.no_grad():
        change = call.run(block, hidden) - hidden
    wide = {name: output.reshape(hidden.shape) for name, output in outputs.items() if output.numel() == hidden.numel()}
    allowed = _OF_CHANGE * change.norm(dim=-1) + _OF_INPUT * hidden.norm(dim=-1)
    for count in range(len(wide), 0, -1):
        for names in itertools.combinations(wide, count):
            apart = (change - sum(wide[name] for name in names)).norm(dim=-1)
            if bool((apart <= allowed).all()):
                return names
    return ()
