"""What `verify` found, as lines for people; the page and the card show the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundexport.formats.verification_record import joined

from .numbers import at, number, percent, short, spread

_MOST = 5  # products told of


@dataclass(frozen=True)
class Line:
    """One figure: its name, its value, what it means."""

    name: str
    value: str
    meaning: str


def lost(record: Mapping[str, Any]) -> float | None:
    """The one figure that packages are ordered by: mean KL (logits), or 1 - mean cosine (embeddings)."""
    cosine = number(at(record, "quality", "cosine", "mean"))
    return number(at(record, "quality", "kl", "mean")) if cosine is None else 1 - cosine


def lines(record: Mapping[str, Any]) -> list[Line]:
    """All figures of a verification."""
    quality = at(record, "quality")
    told = _encoder if at(quality, "cosine") is not None else _head if at(quality, "labels") is not None else _decoder
    found = told(quality)
    found += _activations(at(record, "activations"))
    checked = number(record.get("integers_checked"))
    if checked:
        found.append(Line("integers read back", f"{checked:,.0f} layers", "equal to the artifact's, every one"))
    return found


def _decoder(quality: Any) -> list[Line]:
    tokens, windows = number(at(quality, "tokens")), number(at(quality, "windows"))
    over = "" if tokens is None else f", over {tokens:,.0f} tokens"
    kept = "" if windows is None else f"; ± standard error, {windows:.0f} windows"
    agreed, horizon = at(quality, "first_divergence"), number(at(quality, "divergence_horizon"))
    found = [
        Line("KL, mean", spread(at(quality, "kl")), f"nats per token{over}{kept}"),
        Line("KL, 99 % of tokens below", short(number(at(quality, "kl_p99"))), "nats"),
        Line("KL, largest", short(number(at(quality, "kl_max"))), "nats, of one token"),
        Line("same likeliest token", spread(at(quality, "top1"), 100, " %"), "of both models' next tokens"),
        Line("perplexity", _hundredths(at(quality, "perplexity")), "of the package"),
        Line("perplexity, float", _hundredths(at(quality, "perplexity_float")), "of the model it came from"),
    ]
    if isinstance(agreed, list | tuple) and horizon is not None:
        counts = ", ".join(short(number(count)) for count in agreed)
        found.append(Line("greedy text agrees for", counts, f"of {horizon:.0f} tokens, per prompt"))
    return found


def _activations(cost: Any) -> list[Line]:
    """What activations in eight bits cost, and the products that lose most by them."""
    losses = [(at(one, "layers"), number(at(one, "kl", "mean"))) for one in at(cost, "products") or ()]
    known = [(joined(list(map(str, names))), loss) for names, loss in losses if names and loss is not None]
    added = sum(loss for _, loss in known)
    if not added > 0:
        return []
    shares = "; ".join(f"{percent(loss / added)} {name}" for name, loss in known[:_MOST])
    return [
        Line("activations in 8 bits, KL", spread(at(cost, "together")), "nats, of the package in float32 to itself"),
        Line("of it, products alone", shares, f"the most expensive of {len(known)}; layers of one input are one"),
    ]


def _encoder(quality: Any) -> list[Line]:
    texts = number(at(quality, "texts"))
    over = "" if texts is None else f" over {texts:.0f} texts"
    return [
        Line("cosine, mean", spread(at(quality, "cosine")), f"of both models' embeddings of a text{over}"),
        Line("cosine, least", short(number(at(quality, "cosine_min"))), "of one text"),
        Line("rank correlation", short(number(at(quality, "rank_correlation"))), "Spearman's, of all similarities"),
        Line("same nearest neighbor", percent(number(at(quality, "same_neighbour"))), "of texts"),
    ]


def _head(quality: Any) -> list[Line]:
    texts, labels = number(at(quality, "texts")), number(at(quality, "labels"))
    over = "" if texts is None or labels is None else f", {labels:.0f} labels, {texts:.0f} texts"
    what = "same likeliest label" if labels != 1 else "same order of two texts"
    return [
        Line(what, spread(at(quality, "agreement"), 100, " %"), f"of both models{over}"),
        Line("KL over the labels, mean", spread(at(quality, "kl")), "nats"),
        Line("logit error, mean", spread(at(quality, "logit_error")), "of the logits' standard deviation"),
    ]


def _hundredths(value: object) -> str:
    found = number(value)
    return "–" if found is None else f"{found:,.2f}"


def text_of(record: Mapping[str, Any]) -> str:
    """The held-out text's name."""
    text = record.get("text")
    return Path(text).name if isinstance(text, str) and text else "not recorded"


def gates(record: Mapping[str, Any]) -> list[str]:
    """Gates that failed."""
    found = record.get("failures")
    return [str(failure) for failure in found] if isinstance(found, list | tuple) else []
