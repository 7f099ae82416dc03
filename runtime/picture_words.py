"""What stands for a picture in a prompt, family by family: the words that a model's processor writes in its place.

    idefics3, smolvlm    each tile between marks, with its row and column, the whole picture last
    llava                its features, nothing around them
    qwen2_vl, qwen2_5_vl, qwen3_vl      likewise; the chat template has marks around them

`IMAGE` stands for one row of features each; there are as many as the vision graph gave.

Source: processing_*.py of these families in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable

from roundexport.errors import UnsupportedError

Words = Callable[[int, int, int, str], str]
"""Of rows and columns of tiles (0, 0: one tile), features of a tile, and the text of the image token: a text."""


def _tiles(rows: int, columns: int, features: int, image: str) -> str:
    around, seen = "<fake_token_around_image>", image * features
    lines = [
        "".join(f"{around}<row_{row + 1}_col_{column + 1}>{seen}" for column in range(columns)) + "\n"
        for row in range(rows)
    ]
    before = "".join(lines) + "\n" if rows else ""
    return f"{before}{around}<global-img>{seen}{around}"


def _features(_rows: int, _columns: int, features: int, image: str) -> str:
    return image * features


_WORDS: dict[str, Words] = {
    **{family: _tiles for family in ("idefics3", "smolvlm")},
    **{family: _features for family in ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
}


def words_of(model_type: str) -> Words:
    """What writes a picture's words for a model.

    Raises:
        UnsupportedError: nothing does.
    """
    if model_type not in _WORDS:
        raise UnsupportedError(
            f"pictures are not put into prompts of {model_type} models; of these they are: {', '.join(_WORDS)}"
        )
    return _WORDS[model_type]
