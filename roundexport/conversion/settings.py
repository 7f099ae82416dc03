"""What a conversion is asked for beside how to tune: targets, what their graphs have, and what packages must reach."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from roundexport.progress import Progress
from roundexport.verification.gates import Gates
from roundexport.verification.heldout import heldout_digest

from .asked_targets import Asked


@dataclass(frozen=True)
class ConvertSettings:
    """What a conversion is asked for; :func:`roundexport.convert` says what each means to a user.

    Args:
        asked: the targets.
        text: held-out text file for verification; None: the one that comes with this package.
        gates: figures that each package has to reach.
        inputs_embeds: of a decoder, let its graphs read vectors.
        kernels: let products run by roundexport's own operator.
        cluster: workers that share the tuning.
    """

    asked: Asked = field(default_factory=lambda: Asked.of(None))
    text: str | Path | None = None
    gates: Gates = field(default_factory=Gates)
    inputs_embeds: bool = False
    kernels: bool = False
    cluster: str | None = None

    def judges(self, shown: Progress) -> dict[str, Any]:
        """What decides whether packages are good, as JSON values: the gates, and the text by its content."""
        return {"gates": asdict(self.gates), "text": heldout_digest(self.text, shown)}
