"""What a head's logits stand for, from the config.json of a package: names of labels, and what makes scores of logits.

    labels       id2label, in order; LABEL_0 and LABEL_1 where it is silent, as transformers has it
    scores       softmax over the labels; sigmoid of each where there is one label or several may hold; logits as they
                 are for a regression.  The rule of transformers' pipeline
    relevance    of a cross-encoder with one label: the activation that sentence-transformers wrote down, else sigmoid

Source: `TextClassificationPipeline.postprocess`; `CrossEncoder.get_default_activation_fn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from roundexport.errors import ArtifactError, UnsupportedError

from .types import Floats

Scores = Literal["softmax", "sigmoid", "none"]
_PROBLEMS: dict[str | None, Scores] = {
    None: "softmax",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


@dataclass(frozen=True)
class Labels:
    """Labels of a head.

    Args:
        names: of the logits, in order.
        scores: what makes scores of a text's logits.
    """

    names: tuple[str, ...]
    scores: Scores


def read_labels(config: Mapping[str, Any], where: str) -> Labels:
    """Labels of a config.json.

    Args:
        config: its values.
        where: the file, for the error.

    Raises:
        ArtifactError: labels that are not numbered from 0, or a kind of problem that is not known.
    """
    given = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    problem = config.get("problem_type")
    try:
        names = tuple(str(given[str(number)]) for number in range(len(given)))
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{where}: id2label must number its labels from 0 on, not {given!r:.200}") from error
    if problem is not None and problem not in _PROBLEMS:
        raise ArtifactError(
            f"{where}: problem_type {problem!r:.80} is not known; it may be {', '.join(filter(None, _PROBLEMS))}"
        )
    one = len(names) == 1 and problem != "regression"
    return Labels(names, "sigmoid" if one else _PROBLEMS[problem])


def relevance(config: Mapping[str, Any], settings: Mapping[str, Any]) -> Scores:
    """What makes a score of a cross-encoder's one logit.

    Args:
        config: config.json.
        settings: config_sentence_transformers.json, empty where there is none.

    Raises:
        UnsupportedError: an activation that is neither the sigmoid nor none.
    """
    nested = config.get("sentence_transformers")
    places = (
        settings.get("activation_fn"),
        nested.get("activation_fn") if isinstance(nested, dict) else None,
        config.get("sbert_ce_default_activation_function"),
    )
    name = str(next((place for place in places if place), "Sigmoid"))
    known: dict[str, Scores] = {"Sigmoid": "sigmoid", "Identity": "none"}
    found = known.get(name.rpartition(".")[2])
    if found is None:
        raise UnsupportedError(f"the cross-encoder's activation {name} is not supported; Sigmoid and Identity are")
    return found


def apply(scores: Scores, logits: Floats) -> Floats:
    """Scores of logits [..., labels]."""
    values = logits.astype(np.float64)
    if scores == "softmax":
        likely = np.exp(values - values.max(-1, keepdims=True))
        values = likely / likely.sum(-1, keepdims=True)
    elif scores == "sigmoid":
        values = 0.5 * (1 + np.tanh(0.5 * values))
    return np.ascontiguousarray(values, np.float32)
