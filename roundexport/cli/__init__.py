"""The command line: `roundexport VERB …`."""

from __future__ import annotations

import os


def main() -> None:
    """Entry point of the console script.

    numpy's matrix library starts its threads when numpy is imported, one per visible core, whatever the quota; so its
    number is set before.
    """
    from roundexport.environment.threads import choose_threads
    from roundexport.errors import UsageError

    try:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(choose_threads().count))
    except UsageError:
        pass  # said by the verb that computes
    from .app import main as run

    run()


__all__ = ["main"]
