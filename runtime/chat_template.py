"""A model's chat template: found in the package's files, compiled once, rendered as transformers renders it, bounded.

The content of messages is handed over unchanged: what is trimmed is the template's own decision.  Where a folder has
several templates, ``tools`` choose the one named ``tool_use`` and everything else ``default``; chat_template.jinja goes
before tokenizer_config.json.  Whatever goes wrong inside a template becomes a `UsageError`; what it may use up is in
template_sandbox.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from roundexport.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    import jinja2

Message = dict[str, Any]


class ChatTemplate:
    """One template, compiled at its first use.

    Args:
        source: the template's text.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._compiled: jinja2.Template | None = None

    def render(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """The text that a chat model reads.

        Args:
            messages: ``{"role": "user", "content": "…"}`` and so on.
            **variables: further names the template knows.

        Raises:
            UsageError: the template is broken, refuses these messages, or wants more than it may use.
        """
        from .template_sandbox import compile_template, join  # jinja2 only where a template is rendered

        try:
            if self._compiled is None:
                self._compiled = compile_template(self.source)
            context = self._compiled.new_context({"messages": list(messages), **variables})
            return join(self._compiled.root_render_func(context))
        except Exception as error:  # a stranger's program may fail in any way: 1/0, recursion, memory, include
            reason = str(error) or type(error).__name__
            raise UsageError(f"the chat template refuses these messages: {reason[:500]}") from error


def read_templates(jinja_file: str | None, config: Mapping[str, Any], where: str) -> dict[str, ChatTemplate]:
    """The templates of a package by name; empty where there is none.

    Args:
        jinja_file: text of chat_template.jinja; None where there is no such file.
        config: tokenizer_config.json.
        where: that file, for errors.

    Raises:
        ArtifactError: ``chat_template`` is neither a text nor a list of names and texts.
    """
    given = config.get("chat_template")
    found: dict[Any, Any]
    if given is None or isinstance(given, str):
        found = {} if given is None else {"default": given}
    elif isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        found = {entry.get("name"): entry.get("template") for entry in given}
    else:
        found = {"": None}
    if not all(isinstance(part, str) for pair in found.items() for part in pair):
        raise ArtifactError(f"{where}: chat_template must be a text, or a list of objects with name and template")
    if jinja_file is not None:
        found["default"] = jinja_file
    return {name: ChatTemplate(source) for name, source in found.items()}


def choose(templates: Mapping[str, ChatTemplate], tools: object) -> ChatTemplate:
    """The template for a conversation with or without tools.

    Raises:
        UsageError: several templates, none of them called ``default``.
    """
    chosen = templates.get("tool_use") if tools is not None else None
    chosen = chosen or templates.get("default")
    if chosen is None:
        raise UsageError(f"this package's chat templates are {', '.join(sorted(templates))}; none is called default")
    return chosen
