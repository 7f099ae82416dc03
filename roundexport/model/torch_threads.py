"""torch's threads for the length of a piece of work: as many as `threads.choose_threads` says, never more than before.

torch counts the CPUs of the affinity mask and knows nothing of a quota.  Its number also steers our compiled kernels
(`kernels/_numba.py`), oneDNN and OpenMP.  A smaller number that the caller set with ``torch.set_num_threads`` stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from roundexport.environment.threads import Threads, choose_threads

ALIGNED_ROWS = 16  # products of multiples of so many rows are the same bits for any number of threads


@contextmanager
def torch_threads() -> Iterator[Threads]:
    """Compute with the chosen number of threads inside, with the former number again behind.

    Yields:
        The number and its reason.

    Raises:
        UsageError: OMP_NUM_THREADS is not a number of threads.
    """
    import torch

    before, chosen = torch.get_num_threads(), choose_threads()
    if before < chosen.count:
        chosen = Threads(before, "torch.set_num_threads")
    torch.set_num_threads(chosen.count)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)
