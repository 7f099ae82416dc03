"""The options of verbs that write text, each said once: how tokens are chosen, and what guesses ahead.

A verb decorated with ``@takes(Choosing, Guessing)`` has a parameter of each of these types; on the command line each
becomes one option per field.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from roundexport.errors import UsageError

from .shared_options import named_values

if TYPE_CHECKING:
    from roundexport.runtime.batch import Counts
    from roundexport.runtime.settings import GenerationSettings, Grammar


@dataclass(frozen=True)
class Choosing:
    """How tokens are chosen and when an answer ends; see `GenerationSettings`."""

    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 128
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0
    min_p: Annotated[float, typer.Option(help="Keep tokens at least this fraction as likely as the likeliest.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Of tokens in prompt and answer; 1 changes nothing.")] = 1.0
    presence_penalty: Annotated[float, typer.Option(help="Of tokens that the answer has; 0 changes nothing.")] = 0.0
    frequency_penalty: Annotated[float, typer.Option(help="As often as the answer has them; 0 changes nothing.")] = 0.0
    seed: Annotated[int, typer.Option(help="Fixes sampled tokens.")] = 0
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence tokens.")] = False
    json_schema: Annotated[Path | None, typer.Option(help="File with the JSON schema that answers have.")] = None
    regex: Annotated[str | None, typer.Option(help="Regular expression that answers match as a whole.")] = None

    def settings(self, logprobs: int | None = None) -> GenerationSettings:
        """What the runtime is asked for.

        Args:
            logprobs: likeliest alternatives to tell with each token.

        Raises:
            UsageError: a value is out of range, or the schema cannot be read.
        """
        from roundexport.runtime.settings import GenerationSettings

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["json_schema"], values["regex"]
        values["stop"] = tuple(self.stop or ())
        return GenerationSettings(**values, logprobs=logprobs, grammar=self._grammar())

    def _grammar(self) -> Grammar | None:
        from roundexport.runtime.settings import Grammar

        if self.json_schema is not None and self.regex is not None:
            raise UsageError("--json-schema and --regex both say what answers look like; give one")
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.json_schema is None:
            return None
        try:
            return Grammar("json_schema", self.json_schema.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--json-schema {self.json_schema}: {error}") from error


@dataclass(frozen=True)
class Guessing:
    """What guesses ahead, so that one run of the model may write several tokens; the text stays the same."""

    draft: Annotated[
        Path | None, typer.Option(help="Package of a smaller model with the same tokens, which guesses ahead.")
    ] = None
    lookup: Annotated[bool, typer.Option("--lookup", help="Guess ahead from the text so far.")] = False
    draft_property: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="As --property, for the package that guesses ahead.")
    ] = None

    def told(self) -> dict[str, str]:
        """What the plugin of the package that guesses ahead is told.

        Raises:
            UsageError: there is no such package, or a property is no NAME=VALUE.
        """
        if self.draft_property and self.draft is None:
            raise UsageError("--draft-property is for the package that --draft names; name one")
        return named_values(self.draft_property, "--draft-property")


def takes(*groups: type, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a verb's parameters of these types into one option per field.

    Args:
        *groups: dataclasses whose fields are annotated options.
        **defaults: of fields, where this verb has others.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(verb, include_extras=True)
        places = {name: kind for name, kind in hints.items() if kind in groups}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(verb).parameters.values():
            if parameter.name in places:
                parameters += _options(places[parameter.name], defaults)
            else:
                parameters.append(parameter.replace(annotation=hints[parameter.name]))

        @functools.wraps(verb)
        def command(*args: Any, **options: Any) -> None:
            made = {
                place: kind(**{field.name: options.pop(field.name) for field in fields(kind)})
                for place, kind in places.items()
            }
            verb(*args, **made, **options)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _options(group: type, defaults: dict[str, Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    found = []
    for field in fields(group):
        assert field.default is not MISSING
        default = defaults.get(field.name, field.default)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        found.append(inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name]))
    return found


def gain(counts: Counts) -> str:
    """What guessing has brought, in words."""
    per_run = counts.written / max(counts.runs, 1)
    kept = f", {counts.accepted / counts.guessed:.0%} of {counts.guessed} guesses kept" if counts.guessed else ""
    return f"{counts.written} tokens in {counts.runs} runs ({per_run:.2f} a run){kept}".replace("%", " %")
