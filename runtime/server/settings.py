"""What a server listens on, who may use it, and how much one request may ask for."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from roundexport.errors import UsageError

MIB = 2**20


@dataclass(frozen=True)
class ServerSettings:
    """Everything that bounds a server.

    Args:
        host: address to listen on; one that others can reach needs a key.
        port: 0 takes any free one.
        keys: one of these must come with every request but ``/health`` and the page's files; empty: none is asked for.
        allow_hosts: further names by which a server on a loopback address may be called (behind a proxy).
        rows: answers written at the same time, per decoder.
        queue: answers, or batches of texts, waiting per package; beyond it a request gets 429.  Answers of a client (a
            key and an address) that has less than its share of the queue may wait beyond, twice as many in all.
        cache_tokens: tokens of all rows of a decoder together, of which half are kept for prompts that begin alike;
            None: what a quarter of the free memory holds.
        default_tokens: length of a chat's answer that names no ``max_tokens``.
        max_tokens: longest answer that may be asked for; None: what fits in the package's max_context.
        max_body: bytes of a body of JSON.
        picture_body: bytes of it that come to that for each of ``max_pictures``, where a package reads pictures: base64
            of 4.5 MiB, which a telephone's photograph has.
        max_upload: bytes of a body with a sound.
        max_sound_s: seconds of a sound.
        max_messages: messages of a chat.
        max_pictures: pictures of a chat, in all its messages.
        max_tools: tools of a chat.
        max_stop: stop strings.
        max_choices: answers of one request, ``n`` times prompts.
        max_texts: texts of one request for embeddings, documents of one for a ranking.
        max_bias: entries of ``logit_bias``.
        request_s: seconds from a request's arrival to its last byte.
        head_s: seconds in which the head of a request must have come.
        body_s: seconds in which a body must have come.
        drain_s: seconds that running requests have on SIGTERM.

    Raises:
        UsageError: a value makes no sense, or the address is open to others and no key is asked for.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    rows: int = 16
    queue: int = 64
    cache_tokens: int | None = None
    default_tokens: int = 1024
    max_tokens: int | None = None
    max_body: int = 8 * MIB
    picture_body: int = 6 * MIB
    max_upload: int = 25 * MIB
    max_sound_s: float = 1800.0
    max_messages: int = 1024
    max_pictures: int = 8
    max_tools: int = 128
    max_stop: int = 4
    max_choices: int = 16
    max_texts: int = 2048
    max_bias: int = 1024
    request_s: float = 600.0
    head_s: float = 15.0
    body_s: float = 30.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        counts = (
            "rows", "queue", "cache_tokens", "default_tokens", "max_tokens", "max_body", "picture_body", "max_upload",
            "max_messages", "max_pictures", "max_tools", "max_stop", "max_choices", "max_texts", "max_bias",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in counts}
        wrong = [f"{name} must be at least 1, not {value}" for name, value in values.items() if (value or 1) < 1]
        wrong += [f"{name} must not be 0" for name, value in values.items() if value == 0]
        times = {name: getattr(self, name) for name in ("request_s", "head_s", "body_s", "drain_s", "max_sound_s")}
        wrong += [
            f"{name} must be from 0 to 86400 seconds, not {v}" for name, v in times.items() if not 0 <= v <= 86400
        ]
        if not 0 <= self.port <= 65535:
            wrong.append(f"port must be from 0 to 65535, not {self.port}")
        if self.max_choices > self.queue:
            wrong.append(f"max_choices ({self.max_choices}) must not exceed queue ({self.queue})")
        if any(not key.strip() or not key.isascii() or key != key.strip() for key in self.keys):
            wrong.append("a key is ASCII text without spaces around it, and not empty")
        if not self.loopback and not self.keys:
            wrong.append(
                f"{self.host} can be reached by others, so a key must be asked for; give one with --api-key-file or "
                "ROUNDEXPORT_API_KEY, or listen on 127.0.0.1"
            )
        if wrong:
            raise UsageError(f"server settings: {'; '.join(wrong)}")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone.  Other names are not looked up: they count as open."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
