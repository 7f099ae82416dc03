"""What ``--cluster`` may say.

    local:N          N processes on this machine, without Ray
    auto             the Ray cluster that this machine belongs to (RAY_ADDRESS, or the one that was started here)
    ray://HOST:PORT  the Ray cluster behind that client port (10001 where none is given)
    …@URL            the same, and what workers hand each other goes through that place in a store, as in
                     auto@s3://bucket/folder

Without a store, whoever shares the work must see the model and the output folder under the same paths.
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
        store: URL below which tensors are shared; None: they are in the run's folder.
    """

    local: int | None
    ray: str = ""
    store: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """From the option's text.

        Raises:
            UsageError: it is none of the forms above.
        """
        who, _, url = text.partition("@")
        store = url if "@" in text else None
        kind, _, rest = who.partition(":")
        if kind == "local" and rest.isdecimal() and 1 <= int(rest) <= _MOST:
            return cls(int(rest), store=store)
        if who == "auto":
            return cls(None, "auto", store)
        if who.startswith("ray://"):
            host, _, port = who.removeprefix("ray://").partition(":")
            if host and "/" not in who.removeprefix("ray://") and (not port or port.isdecimal()):
                return cls(None, f"ray://{host}:{port or _CLIENT_PORT}", store)
        raise UsageError(
            f"--cluster {text!r} is none of local:N (1 to {_MOST} processes here), auto (the Ray cluster that this "
            "machine belongs to) and ray://HOST:PORT, or one of them with @ and the URL of a store"
        )
