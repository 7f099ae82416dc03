r"""Regular expressions from a user's file: refused where they cannot be compiled, and given a time limit.

Python's matcher tries alternatives one after the other; ``(a+)+$`` on a name of thirty letters takes minutes, and once
begun it cannot be stopped from within.  Most patterns are harmless, and are simply used.  One that repeats a group, or
has many repeats, is first tried on all names in a process of its own, which is ended when the time is up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from roundexport.errors import UsageError

_LONGEST = 1000  # characters of a pattern
_SECONDS = 5.0
_GROUP_REPEATED = re.compile(r"\)[*+{]")
_REPEAT = re.compile(r"[*+{]")
_TRIAL = "import json, re, sys; p, n = json.load(sys.stdin); [re.search(p, name) for name in n]"


def check_pattern(pattern: str, where: str) -> None:
    """Refuse what Python does not compile.

    Raises:
        UsageError: with the reason.
    """
    if len(pattern) > _LONGEST:
        raise UsageError(f"{where[:80]} …: a pattern may have {_LONGEST} characters, this one has {len(pattern)}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        raise UsageError(f"{where} is not a regular expression: {error or type(error).__name__}") from error


def check_time(patterns: Sequence[str], names: Sequence[str], seconds: float = _SECONDS) -> None:
    """Refuse patterns that take too long to be searched in these names.

    Raises:
        UsageError: the pattern.
    """
    for pattern in patterns:
        if not (_GROUP_REPEATED.search(pattern) or len(_REPEAT.findall(pattern)) > 3):
            continue
        command = [sys.executable, "-I", "-S", "-c", _TRIAL]
        try:
            subprocess.run(
                command, input=json.dumps([pattern, list(names)]), text=True, check=True, capture_output=True,
                timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise UsageError(
                f"rule {pattern!r} takes more than {seconds:g} s to be searched in {len(names)} layer names; write it "
                "without a repeat inside a repeat"
            ) from error
