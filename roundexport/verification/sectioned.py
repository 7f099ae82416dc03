"""A decoder's package that does not fit in memory, over windows of tokens: section by section (runtime/sections.py).

Every window is a prompt of its own, and all of them are known beforehand, so every weight is opened once.  It cannot
write: what the package writes next would open all of it for every token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.environment.threads import choose_threads
from roundexport.formats.package import PackageManifest
from roundexport.types import output_of

_LIBRARIES = {"onnx": "onnxruntime", "openvino": "openvino"}


@dataclass(frozen=True)
class SectionedDecoder:
    """A package that scores windows.

    Args:
        folder: the package.
        manifest: its description.
        precise: float32 throughout, not as it ships.
        section_bytes: most bytes of weights that are open at a time; a single weight may have more.
    """

    folder: Path
    manifest: PackageManifest
    precise: bool
    section_bytes: int

    def windows(self, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Logits [S, V] of each window of ids [n, S].

        Raises:
            ArtifactError: the runtime refuses a section.
        """
        from roundexport.runtime.sections import run_in_sections, token_stream
        from roundexport.runtime.types import EngineOptions

        options = EngineOptions(threads=choose_threads(None).count, precise=self.precise)
        streams = [token_stream(ids[row : row + 1], [ids.shape[1]]) for row in range(len(ids))]
        output = output_of(self.manifest.task, self.manifest.pooling)
        for calls in run_in_sections(self.folder, self.manifest, options, self.section_bytes, streams):
            yield calls[0][output][0]

    def info(self) -> dict[str, Any]:
        """What ran the package."""
        library = _LIBRARIES[self.manifest.target]
        return {
            "engine": f"{library}, in sections",
            "library": library,
            "version": version(library),
            "device": "CPU",
            "threads": choose_threads(None).count,
            "precise": self.precise,
            "section_bytes": self.section_bytes,
        }
