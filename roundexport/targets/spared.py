"""Which products read float activations where all others read them in eight bits: nats saved for time spent.

    gain    what 8-bit inputs cost the layers of a product, as tuning measured it      (schemes/activation_loss.py)
    price   slowdown - 1 times the product's stored bits, of which a token's time is made
    plan    the largest sum of gains whose prices stay within `share` of all stored bits that a token reads

How much longer a product takes with float activations a target says itself, and for which there is no such product.
A token's time is more than its products', so the share is an upper bound.  Layers that share an input are one product
and are spared together; a head that is tied goes by the name of the table whose weight it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from roundexport.errors import ArtifactError, UsageError
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.schemes.activation_loss import ActivationLosses
from roundexport.schemes.knapsack import Item, allocate

if TYPE_CHECKING:
    from roundexport.formats.artifact import Artifact

Slowdown = Callable[[LinearInfo, QuantSpec], float | None]
"""How many times as long a layer's product takes with float activations; None where it has none, or has no others."""
RECORDED = "activations"
"""Key of an artifact's record among the settings of its algorithm."""
USUAL_TIME = 0.03
"""How much longer a token's products may take where nothing is said."""
_NEGLIGIBLE = 0.005  # of all losses: what is less is not worth a line in a report


@dataclass(frozen=True)
class Spared:
    """Products whose activations stay floats.

    Args:
        layers: their layers.
        loss: what 8-bit activations cost all layers, nats per token.
        left: what they cost those that are not spared.
        time: how much longer a token's products take, as a share.
    """

    layers: tuple[str, ...] = ()
    loss: float = 0.0
    left: float = 0.0
    time: float = 0.0

    def note(self) -> str:
        """The sentence for a report."""
        return (
            f"activations of {len(self.layers)} layers stay floats, where 8 bits would cost most: "
            f"{', '.join(self.layers)}; of {self.loss:.5f} nats per token that 8 bits everywhere are expected to cost, "
            f"{self.left:.5f} are left, for {100 * self.time:.1f} % more time in a token's products"
        )


def check_time(activation_time: float | None, idle: Mapping[str, bool]) -> None:
    """Refuse a setting of a target that is no share, or that would do nothing.

    Args:
        activation_time: the setting; None: not given.
        idle: other settings in words, and whether they leave it nothing to do.

    Raises:
        UsageError: it is neither.
    """
    if activation_time is None:
        return
    if not 0 <= activation_time <= 1:
        raise UsageError(f"activation_time is a share from 0 to 1, not {activation_time}")
    for name in (name for name, without in idle.items() if without and activation_time):
        raise UsageError(f"activation_time {activation_time:g} does nothing with {name}: leave one of them out")


def spared_by(artifact: Artifact, activation_time: float | None, slowdown: Slowdown, idle: str = "") -> Spared:
    """What an artifact's own record says is worth sparing; nothing where it has no record.

    Args:
        artifact: the tuned layers.
        activation_time: most of the time of a token's products that may be added; None: not given, the usual one.
        slowdown: of a layer's product.
        idle: why nothing can be spared in this package; "": it can.

    Raises:
        ArtifactError: the record is damaged.
        UsageError: a time was given, and there is nothing to spare.
    """
    share = USUAL_TIME if activation_time is None else activation_time
    record = artifact.manifest.algorithm["settings"].get(RECORDED)
    if activation_time and record is None:
        idle = idle or "what 8-bit activations cost was not measured, which tune --activations does"
    if activation_time and idle:
        raise UsageError(f"activation_time {activation_time:g} does nothing for {artifact.path}: {idle}; leave it out")
    if record is None or idle or not share:
        return Spared()
    try:
        found = ActivationLosses.from_json(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{artifact.path}: its record of activations is damaged ({error!r})") from error
    entries = {name: (artifact.entry(name).info, artifact.entry(name).spec) for name in artifact.names()}
    return spared(found, entries, share, slowdown)


def spared(
    found: ActivationLosses, layers: Mapping[str, tuple[LinearInfo, QuantSpec]], share: float, slowdown: Slowdown
) -> Spared:
    """The products that are worth sparing.

    Args:
        found: what 8-bit activations cost.
        layers: quantized layers with their schemes, by name.
        share: most of the time of a token's products that may be added.
        slowdown: of a layer's product.
    """
    read = {name: spec.storage_bits(info.out_features, info.in_features) for name, (info, spec) in layers.items()
            if info.kind == "linear" or info.shared_with}  # fmt: skip
    tied = {shared: name for name, (info, _) in layers.items() for shared in info.shared_with}
    losses = {tied.get(name, name): loss for name, loss in found.losses.items()}
    total, loss = sum(read.values()), sum(losses.values())
    together = {name: names for names in found.sharing for name in names}
    products = dict.fromkeys(together.get(name, (name,)) for name in losses)
    items, names_of = list[Item](), list[tuple[str, ...]]()
    for names in products:
        gain = sum(losses.get(name, 0.0) for name in names)
        slower = [slowdown(*layers[name]) if name in read else None for name in names]
        if gain < _NEGLIGIBLE * loss or None in slower:
            continue
        price = int(sum((times - 1) * read[name] for name, times in zip(names, slower, strict=True) if times))
        items.append(Item("+".join(names), (gain, 0.0), (0, price)))
        names_of.append(names)
    chosen = allocate(items, int(share * total)) if items else ()
    taken = [place for place, choice in enumerate(chosen) if choice]
    gained = sum(items[place].losses[0] for place in taken)
    return Spared(
        tuple(name for place in taken for name in names_of[place]),
        loss,
        loss - gained,
        sum(items[place].costs[1] for place in taken) / max(total, 1),
    )


def recorded(spared_layers: Spared) -> dict[str, Any]:
    """What the package's settings say; nothing where no layer is spared."""
    return {"float32_activations": list(spared_layers.layers)} if spared_layers.layers else {}
