"""What processes do in the tests of the run over families; it is imported by name."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from roundexport.families.configurations import Family
from roundexport.families.row import Outcome, Row


def tried_as_json(family: Family, targets: Sequence[str]) -> Mapping[str, Any]:
    """A family that is right, two that die, one that sleeps and one that stays when it is done."""
    if family.name == "bloom":
        print("the last words", flush=True)
        os.abort()
    if family.name == "opt":
        os._exit(7)
    if family.name == "gptj":
        time.sleep(60)
    if family.name == "mpt":
        threading.Thread(target=time.sleep, args=(60,)).start()
    return Row(family.name, family.model, "generate", dict.fromkeys(targets, Outcome(1e-6)), 0.1).to_json()
