"""What a package with a head lost: logits of the float model and of the package on its own runtime, of the same texts.

    agreement     share of texts (tag: tokens; fill: tokens, each as if it were asked for) whose likeliest label is the
                  same; with one label the share of pairs of texts that both put in the same order; answer: share of
                  beginnings and ends that are the same
    logit error   |package - float|, mean, over the standard deviation of the float logits
    KL            Σ_l p_l (log p_l - log q_l) over the labels, nats; with one label over (label, not the label);
                  answer: over the places in the text

Texts are lines of the held-out text; a reranker, which has one label, and a model that answers questions are given
pairs of neighboring lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.model.checkpoint import Checkpoint
from roundexport.model.output_head import output_tensor

from .report import Figure, HeadQuality

if TYPE_CHECKING:
    from roundexport.runtime.text_package import TextPackage

Floats = NDArray[np.float64]


def measure_head(checkpoint: Checkpoint, engine: TextPackage, texts: list[str]) -> HeadQuality:
    """Figures of a package with a head over texts."""
    import torch

    from roundexport.runtime.labels import read_labels

    model = checkpoint.load_model()
    task = engine.manifest.task
    labels = read_labels(checkpoint.config, checkpoint.location).names
    single = task == "rerank" or (task == "classify" and len(labels) == 1)
    places = task == "answer"
    pairs = single or places
    given: list[Any] = list(zip(texts, texts[1:] + texts[:1], strict=True)) if pairs else list(texts)
    floats, found = [], []
    for text in given:
        inputs = engine.padded(*engine.rows_of([text]))
        with torch.no_grad():
            output = model(**_taken(inputs, checkpoint.config))
        told = output_tensor(output).numpy()[0], engine.output(inputs)[0]
        one, other = (values.T if places else values for values in told)
        floats.append(one.astype(np.float64))
        found.append(other.astype(np.float64))
    quality = compare_logits(floats, found)
    return replace(quality, labels=len(floats[0])) if places else quality


def compare_logits(floats: list[Floats], found: list[Floats]) -> HeadQuality:
    """Figures over logits [labels], or [S, labels], of the float model and of the package, text by text."""
    single = floats[0].shape == (1,)
    spread = float(np.concatenate([values.ravel() for values in floats]).std()) or 1.0
    errors = [np.abs(a - b).mean() / spread for a, b in zip(floats, found, strict=True)]
    kl = [_kl(a, b).mean() for a, b in zip(floats, found, strict=True)]
    same = (
        _same_order(floats, found)
        if single
        else [float((a.argmax(-1) == b.argmax(-1)).mean()) for a, b in zip(floats, found, strict=True)]
    )
    return HeadQuality(
        texts=len(floats),
        labels=int(floats[0].shape[-1]),
        agreement=Figure.over(np.array(same)),
        logit_error=Figure.over(np.array(errors)),
        kl=Figure.over(np.array(kl)),
    )


def _taken(inputs: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments: token types only where it knows several."""
    import torch

    types = int(config.get("type_vocab_size") or 1)
    names = [name for name in inputs if name != "token_type_ids" or types > 1]
    return {name: torch.from_numpy(inputs[name]) for name in names}


def _kl(wanted: Floats, found: Floats) -> Floats:
    """Of logits [..., labels]; one label stands against its absence."""
    if wanted.shape[-1] == 1:
        wanted, found = (np.concatenate([x, np.zeros_like(x)], -1) for x in (wanted, found))
    p, q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (wanted, found))
    total: Floats = (np.exp(p) * (p - q)).sum(-1)
    return np.atleast_1d(total)


def _same_order(wanted: list[Floats], found: list[Floats]) -> list[float]:
    """For every text the share of the others that both models put on the same side of it."""
    a, b = (np.array([values.item() for values in logits]) for logits in (wanted, found))
    same = np.sign(a[:, None] - a) == np.sign(b[:, None] - b)
    return [float(row[np.arange(len(row)) != place].mean()) for place, row in enumerate(same)]
