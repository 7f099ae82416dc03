"""Who takes part: a contestant's name and variant become the settings of one tuner for one scheme.

    rtn                        ours, rounded to nearest
    ours:FLAGS                 `roundexport tune` with these flags, as in "ours:--recipe best"
    auto-round[:default|best]  200 steps; or 1000 with its extended algorithm (symmetric) or NeUQI (asymmetric)
    auto-round:float32         200 steps without bfloat16, as it runs on processors that have none
    nncf[:best|plain]          AWQ, scale estimation and GPTQ; or as it comes, without data
    gptq[:default|best]        GPTQModel; best: with the scale search and GPTAQ's asymmetric correction
    hqq                        without data, asymmetric only
    llama:TYPE                 llama.cpp's own types, as in llama:Q4_K_M; with an importance matrix

A name before an equals sign is what the table prints: "best=ours:--recipe best".
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import roundexport

HERE = Path(__file__).resolve().parent
_DATA_AWARE = {"awq": True, "scale_estimation": True, "gptq": True}
_PACKAGES = {"auto-round": "auto-round", "nncf": "nncf", "gptq": "gptqmodel", "hqq": "hqq", "llama": "llama-cpp-python"}
_VARIANTS = {
    "auto-round": ("default", "best", "float32"),
    "nncf": ("best", "plain"),
    "gptq": ("default", "best"),
    "hqq": ("",),
    "llama": ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K"),
}


class NotOfferedError(Exception):
    """The tuner has no such scheme."""


@dataclass(frozen=True)
class Scheme:
    """Bits, group size (None: the whole row) and symmetry, as in ``4,128,asym`` or ``3,none,asym``."""

    bits: int
    group_size: int | None
    symmetric: bool

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read ``bits,group,sym|asym``."""
        bits, group, kind = text.split(",")
        if kind not in ("sym", "asym"):
            raise ValueError(f"{text}: a scheme is bits,group,sym or bits,group,asym; group is a number or none")
        return cls(int(bits), None if group == "none" else int(group), kind == "sym")

    def __str__(self) -> str:
        return f"{self.bits},{self.group_size or 'none'},{'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True)
class Contestant:
    """One tuner with one choice of its settings.

    Args:
        label: what the table prints.
        tuner: ours, auto-round, nncf, gptq or hqq.
        variant: flags of ours, or the name of a set of settings.
        python: interpreter of the environment that holds the tuner.
    """

    label: str
    tuner: str
    variant: str
    python: str

    @classmethod
    def parse(cls, text: str, pythons: Mapping[str, str]) -> Contestant:
        """Read ``[label=]tuner[:variant]``.

        Args:
            text: as above; only an equals sign before the first colon or blank makes a label.
            pythons: tuner -> interpreter; this one where there is none.
        """
        head, colon, variant = text.partition(":")
        label, equals, tuner = head.rpartition("=")
        if tuner == "rtn":
            return cls(label or "rtn", "ours", "--recipe rtn", sys.executable)
        known = _VARIANTS.get(tuner)
        if tuner != "ours" and (known is None or (colon and variant not in known)):
            raise ValueError(f"{text}: known are rtn, ours:FLAGS and {_VARIANTS}")
        variant = variant if known is None or colon else known[0]
        name = variant if tuner == "ours" else f"{tuner} {variant}"
        return cls(label if equals else name.strip() or "ours", tuner, variant, pythons.get(tuner, sys.executable))

    def settings(self, scheme: Scheme, calibration: str) -> dict[str, Any]:
        """The settings that the tuner's side takes.

        Args:
            scheme: what to quantize to.
            calibration: text file, for ours; the others get token ids.

        Raises:
            NotOfferedError: the tuner has no such scheme.
        """
        plain = {"bits": scheme.bits, "group_size": scheme.group_size}
        if self.tuner == "ours":
            shape = ["--bits", str(scheme.bits), "--group-size", str(scheme.group_size or "none")]
            kind = "--symmetric" if scheme.symmetric else "--asymmetric"
            return {"flags": [*shape, kind, "--calibration", calibration, *shlex.split(self.variant)]}
        if self.tuner == "llama":
            if int(self.variant[1]) != scheme.bits:
                raise NotOfferedError(f"{self.variant} is not a type of {scheme.bits} bits")
            return {"type": self.variant}
        if scheme.group_size is None:
            raise NotOfferedError("whole rows are compared among ours alone")
        if self.tuner == "auto-round":
            best = {"iters": 1000, ("enable_alg_ext" if scheme.symmetric else "enable_neuqi"): True}
            own = {"default": {"iters": 200}, "float32": {"iters": 200, "amp": False}, "best": best}
            return {**plain, "sym": scheme.symmetric, **own[self.variant]}
        if self.tuner == "nncf":
            if not scheme.symmetric and scheme.bits != 4:
                raise NotOfferedError(f"NNCF has no asymmetric {scheme.bits} bits")
            mode = f"INT{scheme.bits}_{'SYM' if scheme.symmetric else 'ASYM'}"
            return {"mode": mode, "group_size": scheme.group_size, **(_DATA_AWARE if self.variant == "best" else {})}
        if self.tuner == "gptq":
            best = {"mse": 2.4, "gptaq": {"alpha": 0.25}}
            return {**plain, "sym": scheme.symmetric, **(best if self.variant == "best" else {})}
        if scheme.symmetric:
            raise NotOfferedError("HQQ always has zero points")
        return plain

    @property
    def side(self) -> Path:
        """The script that runs the tuner."""
        return HERE / f"{self.tuner.replace('-', '_')}_side.py"

    def version(self) -> str:
        """Version of the tuner; for ours a digest of its code, which is what a kept result depends on."""
        if self.tuner != "ours":
            code = f"import importlib.metadata as m; print(m.version({_PACKAGES[self.tuner]!r}))"
            return subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        digest = hashlib.sha256()
        root = Path(roundexport.__file__).resolve().parent
        for path in sorted([*root.rglob("*.py"), *(root.parent / "kernels").rglob("*.py")]):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:12]
