"""The fields of `TuneSettings` as options of a command: one list of flags for every verb that tunes.

A verb decorated with :func:`takes_settings` has a parameter ``settings``; on the command line that parameter becomes
one option per field.  A flag is its field's name with dashes; ``none`` stands for None where None has a meaning of its
own (whole rows, float tables).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from roundexport.errors import UsageError
from roundexport.threads import VARIABLE, choose_threads
from roundexport.tuning.settings import TuneSettings

_HELP = {
    "recipe": "rtn, light, default or best.",
    "algorithm": "Rounding method in place of the recipe's; see: roundexport list algorithms.",
    "transform": "teq, teq_noise, teq_model (the whole model in memory) or none, in place of the recipe's.",
    "finish": "Tuning of the whole model after its blocks, or none, in place of the recipe's.",
    "bits": "2, 3, 4 or 8.",
    "group_size": "Weights that share a scale: 16, 32, 64, 128, 256, or none (whole row).",
    "symmetric": "Default: symmetric at 4 and 8 bits, else asymmetric.",
    "scale_dtype": "Dtype of stored scales: float16, float32, or exponent8 (powers of two); default: the method's.",
    "embedding_bits": "Bits of embeddings and lm_head: 8, 4, none (float), or auto (8, or what the method needs).",
    "everything": "Also tables and linears outside the blocks, and norms and biases in eight bits.",
    "rules": "JSON file of exceptions by layer name.",
    "target_bits": "Mean bits per weight, scales counted, to keep to by choosing per layer.",
    "choices": "Bit widths to choose from, comma-separated.",
    "tie": "The same bits for layers that share an input: q, k, v; gate, up.",
    "scoring": "How a layer's loss is predicted: fisher, or delta_loss.",
    "cost": "What the choice minimizes: bits, or latency as measured here.",
    "target_speedup": "With --cost latency: how much faster than 4 bits, block 32, as in 1.2.",
    "cost_target": "With --cost latency: whose kernels are timed, onnx or openvino.",
    "calibration": "self (sampled from the model), a text file, or a dataset id.",
    "num_samples": "Calibration samples.",
    "sample_len": "Tokens per sample.",
    "steps": "Tuning steps, in place of the method's own number.",
    "method_settings": "Any setting of a method, comma-separated, as in gram.keep_size=false,end_to_end.window=2.",
    "batch_size": "Samples per step.",
    "seed": "Of everything random.",
    "device": "cpu, cuda or xpu.",
    "precision": "Of products while tuning: float32, bfloat16, or auto (bfloat16 where the device has it).",
    "max_ram": "GiB of memory to stay within.",
}
_AS_TEXT = ("group_size", "embedding_bits", "choices", "method_settings")  # whole numbers that may be none, or several


def takes_settings(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn a verb's parameter ``settings`` into one option per field of :class:`TuneSettings`."""

    @functools.wraps(verb)
    def command(*args: Any, **options: Any) -> None:
        given = {name: options.pop(name) for name in _HELP}
        given["group_size"] = _none_or_int(given["group_size"], "--group-size")
        if given["embedding_bits"] != "auto":
            given["embedding_bits"] = _none_or_int(given["embedding_bits"], "--embedding-bits")
        given["choices"] = tuple(_int(text, "--choices") for text in given["choices"].split(","))
        given["method_settings"] = tuple(part for part in given["method_settings"].split(",") if part)
        verb(*args, settings=TuneSettings(**given), **options)

    hints = get_type_hints(verb, include_extras=True)
    parameters = []
    for parameter in inspect.signature(verb).parameters.values():
        if parameter.name == "settings":
            parameters += _options()
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _options() -> list[inspect.Parameter]:
    hints, found = get_type_hints(TuneSettings), []
    for field in dataclasses.fields(TuneSettings):
        kind, default = hints[field.name], field.default
        if field.name in _AS_TEXT:
            kind = str
            default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        flags = ("--symmetric/--asymmetric",) if field.name == "symmetric" else ()
        option = typer.Option(*flags, help=_HELP[field.name])
        found.append(
            inspect.Parameter(
                field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, option]
            )
        )
    return found


def set_threads(count: int | None) -> None:
    """Compute with so many threads: as if OMP_NUM_THREADS were set, which torch and its libraries read at their start.

    Raises:
        UsageError: not a number of threads that this machine could use.
    """
    if count is not None:
        os.environ[VARIABLE] = str(choose_threads(count).count)


def _none_or_int(text: str, option: str) -> int | None:
    return None if text.lower() == "none" else _int(text, option, " or none")


def _int(text: str, option: str, alternative: str = "") -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{option} takes a whole number{alternative}, not {text!r}") from None
