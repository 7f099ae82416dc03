"""Which files name families: a closed list, so that the next one is a file of its own or a reason to be written here.

A file names a family where a text in its code is, or lists, a `model_type` of transformers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import roundexport

ROOM = Path(roundexport.__file__).resolve().parent
ARCHITECTURES = "graph/architectures/"  # a file per family, where names belong
OTHER_MEANINGS = {"bit", "git"}  # 4-bit; the command
LONGEST = 60  # words of a list of names; more is prose

ALLOWED = {
    # What files of weights call their tensors, and what is tied or counted otherwise there: tables by model_type.
    "model/derived_tensors.py", "model/encoder_decoder.py", "model/expert_names.py", "model/imported_weights.py",
    "model/model_config.py", "model/packed_names.py", "model/positions.py", "model/tensor_names.py",
    # Formats and clients of others that have names of their own for families.
    "exporters/_gguf_model.py", "exporters/_gguf_tokenizer.py", "exporters/awq.py", "importers/_opening.py",
    "model/gguf_check.py", "targets/onnx/client.py", "targets/onnx/speech_client.py", "targets/onnx/vision_client.py",
    # Encoders in integers are BERTs.
    "integer_encoder/float_encoder.py",
}  # fmt: skip


def test_no_other_file_names_a_family() -> None:
    naming = {}
    for path in ROOM.rglob("*.py"):
        name = path.relative_to(ROOM).as_posix()
        if not name.startswith(ARCHITECTURES) and (found := set(names_in(path))):
            naming[name] = sorted(found)
    others = {name: found for name, found in naming.items() if name not in ALLOWED}
    assert not others, f"families belong into a file of {ARCHITECTURES}, or the reason into this test: {others}"
    assert not ALLOWED - set(naming), f"these name no family any more; take them off the list: {ALLOWED - set(naming)}"


def names_in(path: Path) -> Iterator[str]:
    """Names of families in the texts of a file, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words = node.value.split()
            yield from (set(words) if len(words) < LONGEST else set()) & set(CONFIG_MAPPING_NAMES) - OTHER_MEANINGS


def test_a_name_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text('"""Of llama."""\nTYPES = frozenset("gpt2 mpt".split())\nif kind == "t5": pass\n')
    assert sorted(names_in(file)) == ["gpt2", "mpt", "t5"]
