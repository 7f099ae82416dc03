"""Cholesky factors: right, and the same bits with one thread and with more, which LAPACK's own are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from roundexport.kernels import cholesky

SIZES = (16, 128, 144, 256, 400)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def positive_definite(size: int) -> Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(size))
    return x.t() @ x + 0.01 * size * torch.eye(size)


@pytest.mark.parametrize("size", SIZES)
def test_the_factor_is_the_references(size: int) -> None:
    matrix = positive_definite(size)
    expected = cholesky.reference(matrix.numpy())
    error = np.abs(cholesky.run(matrix).numpy() - expected).max() / np.abs(expected).max()
    assert error < 4e-7 * size**0.5, error  # float32 sums of `size` terms
    assert not cholesky.run(matrix).triu(1).any()


@pytest.mark.parametrize("size", SIZES)
def test_the_inverse_factor_and_solve_in_float64(size: int) -> None:
    matrix = positive_definite(size).double()
    upper = cholesky.inverse_factor(matrix)
    one = torch.eye(size, dtype=torch.float64)
    assert not upper.tril(-1).any()
    torch.testing.assert_close(upper.t() @ upper @ matrix, one, rtol=0, atol=1e-10)
    right = torch.ones(size, 3, dtype=torch.float64)
    torch.testing.assert_close(matrix @ cholesky.solve(cholesky.run(matrix), right), right, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "compute",
    [cholesky.run, cholesky.inverse_factor, lambda h: cholesky.solve(cholesky.run(h), h[:, :32])],
    ids=["run", "inverse_factor", "solve"],
)
def test_bits_do_not_depend_on_the_number_of_threads(compute: Callable[[Tensor], Tensor]) -> None:
    found, matrix = [], positive_definite(400)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(compute(matrix))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_is_not_positive_definite_is_refused_as_torch_does() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky.run(-torch.eye(200))
