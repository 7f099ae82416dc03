"""Every call of transformers that reads a model folder: with the caller's word on remote code, and without a network.

Left out, `trust_remote_code` makes transformers ask on the terminal, and a ``yes`` on a pipe then runs whatever Python
the folder brings.  So it is given every time.  A test greps the tree for calls that go around this file.

What transformers raises for a folder it cannot make sense of is anything at all (its own, torch's, tokenizers',
AttributeError): here it becomes a CheckpointError that names the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundexport.errors import CheckpointError, RoundexportError
from roundexport.types import HEADLESS, Task

from .encoder_alone import is_encoder_alone

_CLASSES: dict[Task, str] = {
    "generate": "AutoModelForCausalLM",
    "embed": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
    "rerank": "AutoModelForCausalLM",
    "tag": "AutoModelForTokenClassification",
    "fill": "AutoModelForMaskedLM",
    "answer": "AutoModelForQuestionAnswering",
    "embed_image": "AutoModel",
    "classify_image": "AutoModelForImageClassification",
    "translate": "AutoModelForSeq2SeqLM",
    "transcribe": "AutoModelForSpeechSeq2Seq",
    "ctc": "AutoModelForCTC",
}


@dataclass(frozen=True)
class PartOf:
    """One model in a folder that holds others too.

    Args:
        config: what :func:`read_text_config` or :func:`read_vision_config` returned.
        renaming: regular expressions on the file's names -> the model's own.
    """

    config: Any
    renaming: dict[str, str]


def read_config(folder: Path, trust_remote_code: bool, gguf_file: str | None = None) -> Any:
    """The transformers configuration of a model folder, or of a GGUF file in it.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    import transformers

    with refusals(folder, "config.json"):
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, **_gguf(gguf_file)
        )
        for one in (config, config.get_text_config()):
            if hasattr(one, "quantization_config"):
                del one.quantization_config  # of which importers know, and models must not
            if getattr(one, "rescale_every", 0):
                one.rescale_every = 0  # RWKV's, which divides weights in place, for the sake of float16's range
        return config


def read_tokenizer(folder: Path, trust_remote_code: bool, gguf_file: str | None = None) -> Any:
    """The transformers tokenizer of a model folder, or of a GGUF file in it.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    import transformers

    with refusals(folder, "its tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, **_gguf(gguf_file)
        )


def read_text_config(folder: Path, trust_remote_code: bool, tied: bool) -> Any:
    """The configuration of the decoder in a folder that holds other parts too.

    Args:
        folder: the model folder.
        trust_remote_code: whether Python code in the folder may be run.
        tied: whether lm_head is the embedding, which the part alone may say otherwise.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    with refusals(folder, "the text_config of its config.json"):
        config = read_config(folder, trust_remote_code).get_text_config(decoder=True)
        config.tie_word_embeddings = tied
        return config


def read_vision_config(folder: Path, trust_remote_code: bool, projected: bool) -> Any:
    """The configuration of the image encoder in a folder that holds a text encoder too.

    Args:
        folder: the model folder.
        trust_remote_code: whether Python code in the folder may be run.
        projected: the folder has a projection of the encoder's vector, whose class is then named.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    import transformers

    with refusals(folder, "the vision_config of its config.json"):
        whole = read_config(folder, trust_remote_code)
        config = whole.vision_config
        if projected:
            config.projection_dim = whole.projection_dim
            config.architectures = [f"{transformers.AutoModel._model_mapping[type(config)].__name__}WithProjection"]
        return config


def read_model(
    folder: Path, trust_remote_code: bool, task: Task, dtype: str, part_of: PartOf | None = None
) -> tuple[Any, dict[str, Any]]:
    """The transformers model with its weights, and its own account of keys missing and unexpected.

    Args:
        folder: the model folder.
        trust_remote_code: whether Python code in the folder may be run.
        task: what it is for, which decides its class: with the head of that task, or the base model.
        dtype: name of a torch dtype.
        part_of: one model is wanted of a folder that holds others too.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    import torch
    import transformers

    part = {} if part_of is None else {"config": part_of.config, "key_mapping": part_of.renaming or None}
    # The other parts would be listed as unexpected.
    with refusals(folder, "the model"), _silent(listing=part_of is None):
        config = part.get("config") or (read_config(folder, trust_remote_code) if task in HEADLESS else None)
        model, loading = _class(transformers, task, config).from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **part,
        )
    return model, loading


def read_whole_model(folder: Path) -> Any:
    """The whole of a vision-language model in float32, in evaluation mode.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    import torch
    import transformers

    with refusals(folder, "the whole model"), _silent(listing=False):
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
    return model.eval()


def read_gguf_model(folder: Path, gguf_file: str, report: Callable[[float, str], None]) -> tuple[Any, dict[str, Any]]:
    """The transformers decoder of a GGUF file, dequantized to float32, and its account of keys missing and unexpected.

    Args:
        folder: the folder that the file is in.
        gguf_file: its name.
        report: called with the share of the tensors that is done, and where the work is.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    import torch
    import transformers

    with refusals(folder / gguf_file, "the model"), _loops_reported(report):
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            gguf_file=gguf_file,
        )
    return model, loading


@contextmanager
def _silent(listing: bool) -> Iterator[None]:
    """While it lasts transformers shows no progress bars, which would tear a caller's own apart.

    Args:
        listing: it may still list keys that are missing or left over.
    """
    from transformers.utils import logging

    bars, told = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not listing:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(told)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _loops_reported(report: Callable[[float, str], None]) -> Iterator[None]:
    """While it lasts, what transformers would show as a progress bar is reported instead."""
    from transformers.utils import logging

    def counted(bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not args or not hasattr(args[0], "__len__"):
            return bar(*args, **options)
        items = args[0]

        def each() -> Iterator[Any]:
            for done, item in enumerate(items):
                report(done / len(items), f"tensor {done + 1} of {len(items)}")
                yield item

        return bar(each())

    shown, before = logging.is_progress_bar_enabled(), logging.set_tqdm_hook(counted)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
        if shown:
            logging.enable_progress_bar()


def build_model(folder: Path, config: Any, trust_remote_code: bool, task: Task, attention: str | None) -> Any:
    """A model of the class for this config with weights as its own initialization leaves them, in float32.

    Args:
        folder: where the config is from.
        config: what :func:`read_config` returned, changed or not.
        trust_remote_code: whether Python code in the folder may be run.
        task: what it is for, which decides its class: with the head of that task, or the base model.
        attention: transformers' name of an attention implementation; None: its own choice.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    import torch
    import transformers

    chosen = {} if attention is None else {"attn_implementation": attention}
    with refusals(folder, "the model of its config.json"):
        kind = _class(transformers, task, config)
        if not hasattr(kind, "from_config"):
            return kind._from_config(config, dtype=torch.float32, **chosen)
        return kind.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code, **chosen)


@contextmanager
def refusals(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers raises into a CheckpointError."""
    try:
        yield
    except (RoundexportError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise CheckpointError(f"{folder}: transformers cannot load {what}: {reason}") from error


def _gguf(name: str | None) -> dict[str, str]:
    return {} if name is None else {"gguf_file": name}


def _class(transformers: Any, task: Task, config: Any = None) -> Any:
    """The auto class; for a text config to which transformers has no class with lm_head, one of ours."""
    auto = getattr(transformers, _CLASSES[task])
    named = (getattr(config, "architectures", None) or [""])[0]
    if task == "embed_image" and named.endswith("WithProjection") and hasattr(transformers, named):
        return getattr(transformers, named)  # the base model and what makes its vector, of which no auto class knows
    unknown = hasattr(transformers, named) and type(config) not in auto._model_mapping
    if task == "embed" and (is_encoder_alone(named) or unknown):
        # For a config of two halves the auto class gives both; of a tower of texts, such as SigLIP's, none knows.
        return getattr(transformers, named)
    if task == "embed_image" and hasattr(config, "text_config"):
        from .image_features import ImageFeatures

        return ImageFeatures
    if task != "generate":
        return auto
    headless = config is not None and config.model_type.endswith("_text") and type(config) not in auto._model_mapping
    if not headless or type(config) not in transformers.AutoModel._model_mapping:
        return auto
    from .language_model import LanguageModel

    return LanguageModel
