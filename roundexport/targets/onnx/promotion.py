"""Types that ONNX wants spelled out (a float32 plus an int64), found without running the whole program once more.

torch's exporter puts casts where an operator mixes types.  To know the types it interprets the program node by node on
fake tensors, a third of what a translation takes; but every node of a captured program carries what it gives already
(``meta["val"]``), and nodes that get a cast are run again by the pass itself.

Where torch's private parts have moved its own pass runs, which gives the same and takes its time.

Source: torch/onnx/_internal/fx/passes/type_promotion.py, `_TypePromotionInterpreter`, of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx


@contextmanager
def quick_promotion() -> Iterator[None]:
    """While it lasts, the exporter takes types from the program instead of running it."""
    try:
        from torch.onnx._internal.fx.passes import type_promotion as own

        original, rule_of = own._TypePromotionInterpreter, own.get_type_promotion_rule
        promote = original._maybe_promote_node
    except (ImportError, AttributeError):
        yield
        return

    class Known(original):  # type: ignore[misc, valid-type]
        def run_node(self, n: fx.Node) -> Any:
            if n.op != "call_function" or "val" not in n.meta:
                return super().run_node(n)
            if rule := rule_of(n, self.type_promotion_table):
                with self._set_current_node(n):
                    promote(self, n, rule)
            return n.meta["val"]

    own._TypePromotionInterpreter = Known  # type: ignore[misc]
    try:
        yield
    finally:
        own._TypePromotionInterpreter = original  # type: ignore[misc]
