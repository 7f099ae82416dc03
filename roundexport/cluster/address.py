"""What ``--cluster`` may say.

    local:N          N processes on this machine, without Ray
    auto             the Ray cluster that this machine belongs to (RAY_ADDRESS, or the one that was started here)
    ray://HOST:PORT  the Ray cluster behind that client port (10001 where none is given)

Whoever shares the work must see the model and the output folder under the same paths.
"""

from __future__ import annotations

from dataclasses import dataclass

from roundexport.errors import UsageError

_CLIENT_PORT = 10001
_MOST = 1024  # local processes; more is a slip of the finger


@dataclass(frozen=True)
class Address:
    """Where workers are.

    Args:
        local: so many processes on this machine; None: Ray places them.
        ray: the address that Ray is given; empty for local processes.
    """

    local: int | None
    ray: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """From the option's text.

        Raises:
            UsageError: it is none of the forms above.
        """
        kind, _, rest = text.partition(":")
        if kind == "local" and rest.isdecimal() and 1 <= int(rest) <= _MOST:
            return cls(int(rest))
        if text == "auto":
            return cls(None, "auto")
        if text.startswith("ray://"):
            host, _, port = text.removeprefix("ray://").partition(":")
            if host and "/" not in text.removeprefix("ray://") and (not port or port.isdecimal()):
                return cls(None, f"ray://{host}:{port or _CLIENT_PORT}")
        raise UsageError(
            f"--cluster {text!r} is none of local:N (1 to {_MOST} processes here), auto (the Ray cluster that this "
            "machine belongs to) and ray://HOST:PORT"
        )
