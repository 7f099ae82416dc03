"""The task: who wrote this paragraph?  And: which sentences are nearest?  Both asked of vectors alone.

    accuracy     a linear head, learned once on the float model's vectors of 1,000 paragraphs and then kept, names the
                 author of 2,000 others; ± is the standard error of the difference from float, paragraph by paragraph
    recall@10    of 5,000 sentences' ten nearest neighbors in the float model, the share that are among the ten nearest

The head is multinomial logistic regression with an L2 penalty, solved to its optimum by L-BFGS.
"""

import lzma
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
SENTENCES, NEAREST, PENALTY = 5000, 10, 0.01
_END = re.compile(r'(?<=[.!?]) +(?=[A-Z"])')

Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str]], Vectors]


@dataclass(frozen=True)
class Texts:
    """Paragraphs with their authors' numbers, and sentences."""

    learn: list[str]
    learn_authors: NDArray[np.int64]
    test: list[str]
    test_authors: NDArray[np.int64]
    sentences: list[str]

    def part(self, share: float) -> "Texts":
        """An even share of tests and sentences, for a quick look."""
        step = max(1, round(1 / share))
        return Texts(
            self.learn, self.learn_authors, self.test[::step], self.test_authors[::step], self.sentences[::step]
        )


def read() -> Texts:
    """What paragraphs.txt.xz holds."""
    with lzma.open(HERE / "paragraphs.txt.xz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    authors = sorted({author for author, _, _ in rows})
    sides = {
        side: ([t for _, p, t in rows if p == side], np.array([authors.index(a) for a, p, _ in rows if p == side]))
        for side in ("learn", "test")
    }
    paragraphs = [*sides["learn"][0], *sides["test"][0]]
    sentences = [s for text in paragraphs for s in _END.split(text) if len(s) >= 40]
    return Texts(*sides["learn"], *sides["test"], sentences[:SENTENCES])


@dataclass(frozen=True)
class Head:
    """A linear head: weight [D, authors], bias [authors]."""

    weight: Vectors
    bias: Vectors

    @classmethod
    def learned(cls, vectors: Vectors, authors: NDArray[np.int64]) -> "Head":
        """The optimum for these vectors."""
        x, y = torch.from_numpy(10 * vectors).double(), torch.from_numpy(authors)
        weight = torch.zeros(x.shape[1], int(y.max()) + 1, dtype=torch.double, requires_grad=True)
        bias = torch.zeros(weight.shape[1], dtype=torch.double, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            solver.zero_grad()
            value = torch.nn.functional.cross_entropy(x @ weight + bias, y) + PENALTY * weight.square().sum()
            value.backward()
            return value

        solver.step(loss)
        return cls(10 * weight.detach().float().numpy(), bias.detach().float().numpy())

    def right(self, vectors: Vectors, authors: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each vector's author is named."""
        return np.asarray((vectors @ self.weight + self.bias).argmax(1) == authors)


def recall(reference: Vectors, found: Vectors) -> float:
    """Share of the reference's nearest neighbors that are nearest here too."""

    def nearest(vectors: Vectors) -> list[set[int]]:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        similar = unit @ unit.T
        np.fill_diagonal(similar, -2)
        return [set(row) for row in np.argpartition(-similar, NEAREST, 1)[:, :NEAREST].tolist()]

    pairs = zip(nearest(reference), nearest(found), strict=True)
    return sum(len(a & b) for a, b in pairs) / (NEAREST * len(found))


def cosine(reference: Vectors, found: Vectors) -> float:
    """Mean cosine of both vectors of a text."""
    lengths = np.linalg.norm(reference, axis=1) * np.linalg.norm(found, axis=1)
    return float(((reference * found).sum(1) / lengths).mean())
