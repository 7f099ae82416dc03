"""Energy of the processor's packages, as the hardware counts it (RAPL), where the system lets one read it.

    /sys/class/powercap/intel-rapl:0/name               package-0, one such folder per socket (AMD's processors too)
                                    /energy_uj           microjoules since some moment
                                    /max_energy_range_uj where the counter begins again at 0

    joules = Σ over sockets of Σ over readings ((now − before) mod (range + 1)) / 10⁶

Only domains called ``package-N`` are summed: ``core``, ``uncore`` and ``dram`` lie inside them or beside them, and
``psys`` counts the packages once more.  A counter of 2¹⁸ J begins again after twenty minutes at 200 W, so a meter must
be read at least that often.  What is counted is everything that the sockets do meanwhile, whoever does it; memory,
disks and the power supply are not in it.  Containers and virtual machines seldom have these files, and since 2020
(CVE-2020-8694) they are readable by root alone: then there are no figures, and `EnergyMeter.missing` says why.

Source: https://docs.kernel.org/power/powercap/powercap.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_SOCKET = re.compile(r"intel-rapl:\d+")


@dataclass
class _Socket:
    """One counter, its range, and its last reading, in microjoules."""

    counter: Path
    wraps_at: int
    last: int


class EnergyMeter:
    """Adds up the energy of all sockets from one reading to the next.

    Args:
        root: the folder of the powercap files.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self.missing: str | None = None
        self._sockets: list[_Socket] = []
        self._total = 0
        try:
            for folder in sorted(root.glob("intel-rapl:*")):
                if _SOCKET.fullmatch(folder.name) and _text(folder / "name").startswith("package"):
                    counter = folder / "energy_uj"
                    self._sockets.append(
                        _Socket(counter, int(_text(folder / "max_energy_range_uj")) + 1, int(_text(counter)))
                    )
        except PermissionError as error:
            self.missing = f"{error.filename} is readable by root alone"
        except (OSError, ValueError) as error:
            self.missing = f"RAPL counters cannot be read: {error}"
        if not self._sockets and self.missing is None:
            self.missing = f"no RAPL counter of a processor package under {root}"

    def joules(self) -> float | None:
        """Energy since the meter was made; None where there is none to read, see `missing`."""
        if self.missing is not None:
            return None
        try:
            for socket in self._sockets:
                now = int(_text(socket.counter))
                self._total += (now - socket.last) % socket.wraps_at
                socket.last = now
        except (OSError, ValueError) as error:
            self.missing = f"RAPL counters could be read no longer: {error}"
            return None
        return self._total / 1e6


def per_token(before: float | None, after: float | None, tokens: float) -> float | None:
    """Joules per token between two readings; None where one is missing or nothing was written."""
    return None if before is None or after is None or tokens <= 0 else (after - before) / tokens


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
