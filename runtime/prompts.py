"""Prompts of sentence-transformers models: texts put in front of every text before it is embedded.

    config_sentence_transformers.json     {"prompts": {name: text, …}, "default_prompt_name": name or null}

A prompt that is given wins; else the one of the name that is given; else the default; else none.  So a model with a
default prompt gives other vectors than the bare texts would, here as there.
Source: `SentenceTransformer.encode` and the checks of its constructor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from roundexport.errors import ArtifactError, UsageError

from .tokenizer import read_json

FILE = "config_sentence_transformers.json"


@dataclass(frozen=True)
class Prompts:
    """The prompts of a model.

    Args:
        texts: prompt by name.
        default: name of the one that is used where none is asked for.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None

    def choose(self, prompt: str | None, name: str | None) -> str:
        """The text to put in front; empty for none.

        Raises:
            UsageError: both a prompt and a name are given, or there is no prompt of that name.
        """
        if prompt is not None and name is not None:
            raise UsageError("give a prompt or the name of one, not both")
        if prompt is not None:
            return prompt
        name = self.default if name is None else name
        if name is not None and name not in self.texts:
            raise UsageError(f"there is no prompt named {name!r}; the model has {', '.join(self.texts) or 'none'}")
        return "" if name is None else self.texts[name]


def read_prompts(path: Path | None) -> Prompts:
    """The prompts in a file; none where there is no file.

    Raises:
        ArtifactError: it is damaged, or its default is not among its prompts.
    """
    found = read_json(path)
    texts, default = found.get("prompts") or {}, found.get("default_prompt_name")
    if not isinstance(texts, dict) or not all(text is None or isinstance(text, str) for text in texts.values()):
        raise ArtifactError(f"{path}: prompts must map names to texts")
    if default is not None and default not in texts:
        raise ArtifactError(f"{path}: default_prompt_name {default!r} is not among the prompts {list(texts)}")
    return Prompts({name: text or "" for name, text in texts.items()}, default)
