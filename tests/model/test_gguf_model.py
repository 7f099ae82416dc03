"""A GGUF file as a MODEL: the same weights, names, tokens and template as the model it was made from, or a refusal."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import build_model, tuned
from roundexport.conversion.importing import import_checkpoint
from roundexport.errors import CheckpointError, RoundexportError, UnsupportedError, WontFitError
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.gguf_header import is_gguf, read_header
from roundexport.model.transformers_loading import read_gguf_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

TEMPLATE = "{% for m in messages %}<cls>{{ m['content'] }}<sep>{% endfor %}"
# Name in transformers -> name in GGUF, for one block and around the blocks.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROUNDEXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_gguf(model: Path, out: Path, kind: str = "F32", **changes: Any) -> Path:
    """What llama.cpp's converter would write of this folder: rows of q and k interleaved for llama, names its own.

    Args:
        model: folder of a tiny llama or qwen3.
        out: file.
        kind: type of the matrices.
        changes: metadata to set beside or in place of the usual; None leaves a key out.
    """
    checkpoint = Checkpoint.open(model)
    config, arch = checkpoint.config, checkpoint.model_type
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    vocabulary = json.loads((model / "tokenizer.json").read_text())
    tokens = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].get)
    special = {token["content"] for token in vocabulary["added_tokens"]}
    facts: dict[str, Any] = {
        "general.architecture": arch, "general.name": "toy",
        f"{arch}.context_length": config["max_position_embeddings"], f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.block_count": config["num_hidden_layers"], f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"], f"{arch}.rope.dimension_count": width,
        f"{arch}.rope.freq_base": 10000.0, f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in vocabulary["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.chat_template": TEMPLATE, **changes,
    }  # fmt: skip
    writer = gguf.GGUFWriter(None, arch)
    for key, value in facts.items():
        if key == "general.architecture":
            writer.kv_data[0].pop(key)
            writer.add_string(key, value)
        elif value is not None:
            _add(writer, key, value)
    for name in checkpoint.owned():
        values = checkpoint.float32(name)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = values if stored.name == "F32" else gguf.quantize(values, stored)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=stored)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)


def _gguf_name(name: str) -> str:
    module, _, ending = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{ending}"
    _, _, number, inner = module.split(".", 3)
    return f"blk.{number}.{NAMES[inner]}.{ending}"


@pytest.fixture(scope="module")
def made(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("gguf")

    def source(family: str) -> Path:
        if family == "llama":
            return models(family)
        wide = folder / family  # the reader takes every qwen3's heads for 128 wide
        return wide if wide.exists() else build_model(family, wide, head_dim=128, tie_word_embeddings=True)

    def make(family: str = "llama", kind: str = "F32") -> Path:
        out = folder / f"{family}-{kind}.gguf"
        return out if out.exists() else write_gguf(source(family), out, kind)

    return make


@pytest.mark.parametrize(
    ("family", "kind", "stored"),
    [("llama", "F32", "F32"), ("llama", "F16", "F16"), ("llama", "Q8_0", "F32"), ("qwen3", "BF16", "F16 or BF16")],
)
def test_weights_are_those_of_the_model(models, made, family, kind, stored):
    path = made(family, kind)
    original, opened = (
        Checkpoint.open(path.parent / family if family == "qwen3" else models(family)),
        Checkpoint.open(path),
    )
    assert opened.task == "generate" and opened.model_type == family
    assert opened.owned() == original.owned() and opened.names() == original.names()
    for name in opened.owned():
        wanted = original.float32(name)
        if wanted.ndim > 1 and kind != "F32":
            quantized = gguf.GGMLQuantizationType[kind]
            wanted = gguf.dequantize(gguf.quantize(wanted, quantized), quantized)
            assert opened.dtype(name) in stored.split(" or ")
        np.testing.assert_array_equal(opened.float32(name), wanted)


def test_the_model_computes_what_the_original_computes(models, made):
    import torch

    ids = torch.arange(2, 40)[None]
    one, other = (Checkpoint.open(path).load_model()(ids).logits for path in (models("llama"), made()))
    assert one.std() > 0.2
    torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_tokenizer_template_and_ends(models, made):
    from tokenizers import Tokenizer

    from roundexport.runtime.tokenizer import Tokenizer as RuntimeTokenizer

    folder = Checkpoint.open(made()).folder
    one, other = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (models("llama"), folder))
    text = "Call me Ishmael. Some years ago, 1851 or so <sep> <eos>never mind\n\n  how   long…"
    assert other.encode(text).ids == one.encode(text).ids
    ids = RuntimeTokenizer(folder).encode_chat([{"role": "user", "content": "hello"}])
    assert ids == one.encode("<cls>hello<sep>").ids
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and "transformers_version" not in config
    assert config["architectures"] == ["LlamaForCausalLM"] and config["vocab_size"] == 384
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= set(
        map(str, Checkpoint.open(made()).side_files())
    )


def test_a_turn_ends_with_its_own_token(models, tmp_path):
    path = write_gguf(models("llama"), tmp_path / "m.gguf", **{"tokenizer.ggml.eot_token_id": 3})
    generation = json.loads((Checkpoint.open(path).folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 3]


def test_identity_is_the_file_and_outlives_the_cache(made, tmp_path, monkeypatch):
    first = Checkpoint.open(made())
    assert first.location == str(made()) and list(first.files()) == ["model.gguf, read by 1"]
    moved = tmp_path / "other name"  # no ending: known by its first bytes
    shutil.copyfile(made(), moved)
    assert Checkpoint.open(moved).folder == first.folder
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / "cache"))
    again = Checkpoint.open(moved)
    assert again.digest == first.digest and again.folder != first.folder
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (again.folder / name).read_bytes() == (first.folder / name).read_bytes()


def test_what_lies_beside_the_file_is_not_read(made, tmp_path):
    path = Path(shutil.copyfile(made("llama", "F16"), tmp_path / "m.gguf"))
    for name in (
        "config.json",
        "adapter_config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    ):
        (tmp_path / name).write_text("{broken")
    assert Checkpoint.open(path).config["hidden_size"] == 64


REFUSED = [
    ({"split.count": 3, "split.no": 0}, "is one of 3 parts; merge them first"),
    ({"general.type": "adapter"}, "holds a GGUF adapter, not a model"),
    ({"general.architecture": "rwkv9"}, "does not know the architecture 'rwkv9'; it knows .*llama"),
    ({"tokenizer.ggml.model": None}, "holds no tokenizer"),
    ({"tokenizer.ggml.model": "bert"}, "a tokenizer of the kind 'bert'"),
    ({"tokenizer.ggml.pre": "martian"}, "splits text by the rule 'martian'"),
    ({"tokenizer.ggml.pre": None}, "splits text by the rule 'default'"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn', which .* takes for 'none'"),
    ({"llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor is 4.0"),
    ({"llama.attention.key_length": 32}, "llama.attention.key_length is 32, which .* takes for 16"),
    ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window is 64"),
    ({"llama.logit_scale": 0.25}, "llama.logit_scale is 0.25, which transformers' GGUF reader does not read"),
    ({"llama.block_count": 1}, r"its 21 tensors hold 123,\d+ weights, the LlamaForCausalLM .* has \d+,\d+"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[reason[:30] for _, reason in REFUSED])
def test_what_the_reader_would_get_wrong_is_refused(models, tmp_path, changes, reason):
    with pytest.raises(UnsupportedError, match=reason):
        Checkpoint.open(write_gguf(models("llama"), tmp_path / "m.gguf", **changes))


def test_what_says_the_same_is_taken(models, tmp_path):
    same = {
        "llama.rope.scaling.type": "none", "llama.attention.key_length": 16, "llama.attention.sliding_window": 512,
        "llama.vocab_size": 384, "tokenizer.ggml.pre": "smollm", "general.license": "mit",
    }  # fmt: skip
    opened = Checkpoint.open(write_gguf(models("llama"), tmp_path / "m.gguf", **same))
    rule = json.loads((opened.folder / "tokenizer.json").read_text())["pre_tokenizer"]
    assert [part["type"] for part in rule["pretokenizers"]] == ["Digits", "ByteLevel"]


def _changed(path: Path, out: Path, at: int, data: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    out.write_bytes(raw)
    return out


def test_damaged_files_are_refused(made, tmp_path):
    whole, bad = made(), tmp_path / "bad.gguf"
    data = read_header(whole).data
    short = "ends inside its header"
    sizes = [(3, "is not a GGUF file"), (20, short), (data // 2, short), (whole.stat().st_size - 100, "is incomplete")]
    for size, reason in sizes:
        bad.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=reason):
            Checkpoint.open(bad)
    cases: list[tuple[int, bytes, str]] = [
        (0, b"GGML", "begins with b'GGML'"),
        (4, struct.pack(">I", 3), "GGUF version 50331648"),
        (4, struct.pack("<I", 1), "GGUF version 1 "),
        (8, struct.pack("<Q", 2**63), "ends inside its header|dimensions"),
        (16, struct.pack("<Q", 2**63), "."),
        (24, struct.pack("<Q", 2**64 - 1), "ends inside its header"),
        (32, b"\xff\xfe", "not UTF-8"),
    ]
    for at, change, reason in cases:
        with pytest.raises(CheckpointError, match=reason):
            Checkpoint.open(_changed(whole, bad, at, change))


def test_header_of_noise_never_does_worse_than_refuse(made, tmp_path):
    rng = np.random.default_rng(0)
    head = read_header(made()).data
    for _ in range(200):
        noise = _changed(made(), tmp_path / "noise.gguf", int(rng.integers(4, head)), rng.bytes(8))
        try:
            read_header(noise)
        except RoundexportError:
            pass


def test_names_that_are_not_files(tmp_path):
    assert not is_gguf(tmp_path) and not is_gguf(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="no such"):
        Checkpoint.open("models/absent.gguf")


def test_the_packages_it_takes_are_named(made, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(CheckpointError, match=r"install gguf: pip install 'roundexport\[tune,gguf\]'"):
        Checkpoint.open(made())


def test_from_file_to_package(made, tmp_path):
    from roundexport.conversion.inspection import inspect
    from roundexport.targets.export import export

    artifact = tuned(made(), tmp_path / "artifact", recipe="rtn", algorithm=None, group_size=32)
    source = json.loads((artifact / "manifest.json").read_text())["source"]
    assert source["location"] == str(made())
    export(artifact, tmp_path / "onnx", to="onnx")  # finds the file again by itself
    export(made(), tmp_path / "float", to="onnx")
    assert inspect(str(made())).kind == "model"
    assert (tmp_path / "onnx" / "chat_template.jinja").read_text() == TEMPLATE


def test_reading_says_so_and_nothing_else(made, tmp_path, warm):
    code = f"from roundexport.model.checkpoint import Checkpoint; Checkpoint.open({str(made())!r}, progress=True)"
    env = {"ROUNDEXPORT_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = warm.run(code, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert done.stdout == "" and all(line.startswith("llama-F32.gguf: ") for line in lines), done.stderr
    told = [part for part in ("header", "is dequantized to float once", "dequantizing …", "writing", "tokenizer …")
            if any(part in line for line in lines)]  # fmt: skip
    assert len(told) == 5, done.stderr


def test_dequantizing_is_told_tensor_by_tensor(made):
    told = list[tuple[float, str]]()
    read_gguf_model(made().parent, made().name, lambda share, where: told.append((share, where)))
    assert len(told) > 10 and told[0][1].startswith("tensor 1 of ") and told == sorted(told)


# Two levels of scales and blocks of 256 in Q6_K, which the rows of a toy do not fill.
@pytest.mark.parametrize(
    ("kind", "scheme"), [("Q4_0", "int4 g32 sym"), ("Q8_0", "int8 g32 sym"), ("Q5_0", "int8 g32 sym")]
)
def test_the_integers_of_a_file_are_imported(made: Callable[..., Path], tmp_path: Path, kind: str, scheme: str) -> None:
    path = made("llama", kind)
    artifact = Artifact.open(import_checkpoint(path, tmp_path / "artifact", progress=False))
    checkpoint = Checkpoint.open(path)
    assert len(artifact.names()) == len([name for name in checkpoint.owned() if len(checkpoint.shape(name)) == 2])
    for name in artifact.names():
        linear = artifact.linear(name)
        assert linear.spec.describe() == scheme
        assert np.array_equal(linear.dequantize(), checkpoint.float32(f"{name}.weight"))


def test_a_type_with_minima_is_not_imported(made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"left float \(Q4_1 is dequantized.*and \d+ more\..*convert"):
        import_checkpoint(made("llama", "Q4_1"), tmp_path / "artifact", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_limit_of_memory_holds_while_it_is_dequantized(made, tmp_path, monkeypatch):
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path))
    with pytest.raises(WontFitError, match=r"dequantized once, takes about .* max_ram is 0.001; give the folder"):
        Checkpoint.open(made(), max_ram=0.001)
