"""RMS norms in plain operators, in the order by which runtimes know them:  x / sqrt(mean(x²) + eps) · weight."""

from __future__ import annotations

import numpy as np

from roundexport.targets.onnx.graph import PLACEHOLDER, Dim, Editor, dims, number


def lower(editor: Editor) -> None:
    """Lower the norm placeholders."""
    for node in editor.nodes("rms_norm", PLACEHOLDER):
        x, weight = node.inputs
        shape = dims(x) or ()
        one: tuple[Dim, ...] = (*shape[:-1], 1)
        two, eps = (editor.constant(np.array(value, np.float32)) for value in (2.0, number(node, "eps")))
        (square,) = editor.insert(node, "Pow", [x, two], [shape])
        (mean,) = editor.insert(node, "ReduceMean", [square, editor.constant([-1])], [one], {"keepdims": 1})
        (raised,) = editor.insert(node, "Add", [mean, eps], [one])
        (root,) = editor.insert(node, "Sqrt", [raised], [one])
        (normed,) = editor.insert(node, "Div", [x, root], [shape])
        (output,) = editor.insert(node, "Mul", [normed, weight], [shape])
        editor.replace(node.outputs[0], output)
        editor.remove(node)
        editor.log.fusions["rms norm in plain operators"] += 1
