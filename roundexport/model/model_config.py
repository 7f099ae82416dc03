"""config.json and generation_config.json, read strictly before anything is built from them.

A value that makes no sense is refused here with its key, its value and its file; otherwise it comes back an hour later
as an exception of torch or transformers, or as memory that no machine has.  Two steps:

    read_config, read_generation_config    the type and range of every key that sizes or steers a model
    check_sizes                            sizes against the tensors' shapes: layers, vocabulary, widths, positions

Keys not listed are left to transformers, null stands for the class's default, `quantization_config: null` for a model
that is not quantized.  What `quantization_config` says otherwise is for importers (roundexport/importers), so configs
are read without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError, CheckpointError, UnsupportedError
from roundexport.storage.paths import safe_join
from roundexport.storage.strict_json import parse
from roundexport.types import Task

from .encoder_alone import is_encoder_alone
from .encoder_decoder import task_of_pair
from .pooling import embeds
from .reranker import logit_score
from .tensor_names import embeddings

CONFIG, GENERATION = "config.json", "generation_config.json"
QUANTIZATION = "quantization_config"
_LARGEST = 2**31 - 1
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = (
    "hidden_size",
    "n_embd",
    "d_model",
    "dim",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
)
_POSITIONS = ("max_position_embeddings", "n_positions")
_COUNTS = frozenset(
    [*_LAYERS, *_WIDTHS, *_POSITIONS, "vocab_size", "intermediate_size", "n_inner", "n_heads", "hidden_dim", "ffn_dim",
     "embedding_size", "original_max_position_embeddings"]
)  # fmt: skip
_PER_LAYER = frozenset(["intermediate_size", "num_attention_heads", "num_key_value_heads"])  # lists in some families
_ABOVE_ZERO = frozenset(["rope_theta", "partial_rotary_factor"])
_NUMBERS = frozenset(
    ["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "layernorm_epsilon", "sliding_window"]
)
_OBJECTS = frozenset(["rope_parameters", "rope_scaling", "text_config"])
_SWITCHES = frozenset(["tie_word_embeddings", "is_encoder_decoder", "is_decoder"])
_WORDS = frozenset(["model_type", "hidden_act", "hidden_activation", "activation_function"])
_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
_OF_SAMPLES = "feat_extract_activation"
_OF_SOUNDS = (_OF_SAMPLES, "feature_projection_input_dim", "num_mel_bins")
_SHARED_LAYERS = frozenset(["albert", "zamba", "zamba2"])  # one layer's weights serve several
_TABLE = re.compile(r"(^|\.)(position_embeddings|wpe|embed_positions)\.weight$")
_HEADS: dict[str, Task] = {
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForImageClassification": "classify_image",
    "ForMaskedLM": "fill",
    "ForQuestionAnswering": "answer",
    "ForCTC": "ctc",
}
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "emb_dim")  # Llama; GPT-2; T5, BART, Marian; DistilBERT; XLM
_POSITION_ROWS = 2  # rows by which tables of some families (OPT) are longer than their positions


def hidden_width(config: dict[str, Any]) -> int:
    """Width of hidden states, by whichever name a config of text gives it; 0 where it gives none."""
    return int(next((config[name] for name in _HIDDEN if config.get(name)), 0))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, without what it says of quantized weights.

    Raises:
        CheckpointError: there is none, it is not a JSON object, or a value makes no sense.
    """
    path = safe_join(folder, CONFIG)
    config = config_without_quantization(folder)
    for where, values in ((str(path), config), (f"{path}: text_config", config.get("text_config"))):
        if not isinstance(values, Mapping):
            continue
        for key, wanted in _wrong(values):
            raise CheckpointError(f"{where}: {key} must be {wanted}, not {values[key]!r:.80}")
    return config


def read_quantization_config(folder: Path) -> dict[str, Any] | None:
    """What config.json says of how others have quantized the weights; None of a float model.

    Raises:
        CheckpointError: there is no config.json, or it says so in another form than an object.
    """
    config = _parsed_config(folder)
    nested = config.get("text_config")
    places = (config, nested if isinstance(nested, Mapping) else {})
    found = next((place[QUANTIZATION] for place in places if place.get(QUANTIZATION) is not None), None)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{folder / CONFIG}: {QUANTIZATION} must be an object, not {found!r:.80}")
    return found


def config_without_quantization(folder: Path) -> dict[str, Any]:
    """config.json as a float model's would be.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    config = _parsed_config(folder)
    for place in (config, config.get("text_config")):
        if isinstance(place, dict):
            place.pop(QUANTIZATION, None)
    return config


def _parsed_config(folder: Path) -> dict[str, Any]:
    path = safe_join(folder, CONFIG)
    if not path.is_file():
        raise CheckpointError(f"{folder} is no model folder: it has no {CONFIG}")
    return _parsed(path)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a model folder; empty where there is none.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = safe_join(folder, GENERATION)
    return _parsed(path) if path.is_file() else {}


def task_of(config: Mapping[str, Any], folder: Path) -> Task:
    """What a model is for, by its architecture; a sentence-transformers folder embeds whatever the architecture.

    Raises:
        CheckpointError: no architecture is named.
        UnsupportedError: a model of images, or a head whose output is not exported.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointError(f"{folder / CONFIG}: `architectures` names no model class")
    name = architectures[0]
    if is_encoder_alone(name):
        return "embed"
    if config.get("is_encoder_decoder"):
        return task_of_pair(config, folder)
    if reads_sounds(config) and not (name.endswith("ForCTC") and config.get(_OF_SAMPLES)):
        raise UnsupportedError(
            f"{folder}: {name} reads sounds; of such models those are exported that read samples and write letters "
            "(Wav2Vec2ForCTC, HubertForCTC) and those that answer in tokens (Whisper): take such a checkpoint"
        )
    if name.endswith("ForConditionalGeneration"):
        raise UnsupportedError(
            f"{folder}: {name} is not supported; decoders and encoders of text, encoders of images, models with an "
            "encoder and a decoder for text or speech, and vision-language models are"
        )
    if logit_score(folder) is not None:
        return "rerank"
    if embeds(folder):
        return "embed"
    for ending, task in _HEADS.items():
        if name.endswith(ending):
            return task
    if head := re.search(r"For([A-Z]\w*)$|(DoubleHeads)Model$", name):
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", head[1] or head[2]).lower()
        raise UnsupportedError(
            f"{folder}: {name} has a head for {kind}, which is not exported, and without it the model answers another "
            "question; to export the encoder alone, save it once with transformers: "
            "AutoModel….from_pretrained(folder).save_pretrained(new_folder)"
        )
    return "embed_image" if reads_images(config) else "embed"


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether a base model's config is that of an encoder of images: patches of pixels, and words of none."""
    return "patch_size" in config and "vocab_size" not in config


def reads_sounds(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of an encoder of sounds: a waveform through convolutions, or frames of a spectrogram."""
    nested = config.get("encoder_config")
    places = (config, nested if isinstance(nested, Mapping) else {})
    return any(place.get(key) is not None for place in places for key in _OF_SOUNDS)


def check_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Hold the sizes of a config against the tensors, before a model of these sizes is built.

    Args:
        config: what :func:`read_config` returned.
        shapes: shape by name of every tensor.
        where: the model, for the error.

    Raises:
        CheckpointError: a size that the tensors contradict.
    """
    nested = config.get("text_config")
    sizes = {**(nested if isinstance(nested, Mapping) else {}), **config}
    largest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    for key in (*_WIDTHS, "vocab_size"):
        value = sizes.get(key)
        if isinstance(value, int) and value > largest:
            raise CheckpointError(
                f"{where}: {key} {value} of {CONFIG} does not fit the weights, whose longest axis has {largest}"
            )
    tables = embeddings(shapes)
    if tables and isinstance(sizes.get("vocab_size"), int) and shapes[tables[0]][:1] != (sizes["vocab_size"],):
        rows = list(shapes[tables[0]])
        raise CheckpointError(
            f"{where}: vocab_size {sizes['vocab_size']} of {CONFIG} does not fit {tables[0]}, which is {rows}"
        )
    _check_layers(sizes, shapes, where)
    positions = next((sizes[key] for key in _POSITIONS if isinstance(sizes.get(key), int)), None)
    if sizes.get("max_target_positions") is not None:  # two halves that count otherwise; the class is held to the file
        positions = None
    for name, shape in shapes.items():
        if positions is not None and _TABLE.search(name) and not 0 <= shape[0] - positions <= _POSITION_ROWS:
            raise CheckpointError(
                f"{where}: {positions} positions of {CONFIG} do not fit {name}, which is {list(shape)}"
            )


def _check_layers(sizes: Mapping[str, Any], shapes: Mapping[str, Any], where: str) -> None:
    key = next((key for key in _LAYERS if isinstance(sizes.get(key), int)), None)
    if key is None or sizes.get("model_type") in _SHARED_LAYERS:
        return
    stacks: dict[str, set[int]] = {}
    for name in shapes:
        if found := re.match(r"((?:.*?\.)?)(\d+)\.", name):
            stacks.setdefault(found[1], set()).add(int(found[2]))
    counts = {len(stack) for stack in stacks.values()}
    extra = sizes.get("num_nextn_predict_layers")
    wanted = {sizes[key], sizes[key] + (extra if isinstance(extra, int) else 0)}
    if counts and not counts & wanted:
        raise CheckpointError(
            f"{where}: {key} {sizes[key]} of {CONFIG} does not fit the weights, which hold {max(counts)} layers"
        )


def _wrong(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and what it must be, of every value that makes no sense."""
    for key, value in config.items():
        if value is None:
            continue
        if key in _COUNTS:
            several = key in _PER_LAYER and isinstance(value, list)
            if not all(_whole(one) and 0 < one <= _LARGEST for one in (value if several else [value])):
                yield key, f"a whole number from 1 to {_LARGEST}"
        elif key in _ABOVE_ZERO | _NUMBERS:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or value < 0 or (key in _ABOVE_ZERO and value == 0):
                yield key, "a number above 0" if key in _ABOVE_ZERO else "a number of at least 0"
        elif key in _OBJECTS and not isinstance(value, dict):
            yield key, "an object"
        elif key in _SWITCHES and not isinstance(value, bool):
            yield key, "true or false"
        elif key in _WORDS and not (isinstance(value, str) and value):
            yield key, "a name"
        elif key in ("dtype", "torch_dtype") and not (
            isinstance(value, str) and value.removeprefix("torch.") in _DTYPES
        ):
            yield key, f"one of {', '.join(_DTYPES)}"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
