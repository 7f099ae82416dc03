"""Beside sentence-transformers itself: modules behind an embedder, and rerankers made of a decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import FAMILIES, _tokenizer, tuned
from roundexport import export, verify
from roundexport.errors import CheckpointError, UsageError
from roundexport.formats.embedding_head import module_files, read_head
from roundexport.model.checkpoint import Checkpoint
from roundexport.runtime import load
from roundexport.runtime.reranking import Reranker
from roundexport.storage.paths import ListedFiles

WIDTH = 8
HIDDEN = np.random.default_rng(0).standard_normal((3, 6, WIDTH)).astype(np.float32)
MASK = (np.arange(6) < np.array([[6], [4], [1]])).astype(np.int64)
TEMPLATE = (
    "{%- for m in messages if m.role == 'system' %}{{ m.content }}\n{% endfor %}"
    "<Query>: {{ (messages | selectattr('role', 'eq', 'query') | first).content }}\n"
    "<Document>: {{ (messages | selectattr('role', 'eq', 'document') | first).content }}\nanswer:"
)
QUERY, DOCUMENTS = "the sea", ["An old man stood on the shore.", "Boats", "Night fell upon the sea, nobody came." * 3]


def write(folder: Path) -> Path:
    """A tiny Qwen3 as sentence-transformers saves such a model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    values = {**FAMILIES["qwen3"][2], "num_hidden_layers": 1, "initializer_range": 0.3}
    Qwen3ForCausalLM(Qwen3Config(**values)).save_pretrained(folder)
    _tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    kinds = [
        ("sentence_transformers.base.modules.transformer.Transformer", ""),
        ("sentence_transformers.cross_encoder.modules.logit_score.LogitScore", "1_LogitScore"),
    ]
    modules = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (kind, path) in enumerate(kinds)]
    output = {"method": "forward", "method_output_name": "logits"}
    files = {
        "modules.json": modules,
        "1_LogitScore/config.json": {"true_token_id": 20, "false_token_id": 30},
        "sentence_bert_config.json": {
            "transformer_task": "text-generation",
            "modality_config": {"text": output, "message": {**output, "format": "flat"}},
            "module_output_name": "causal_logits",
        },
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder", "prompts": {"search": "Judge."}, "default_prompt_name": "search",
        },
    }  # fmt: skip
    (folder / "1_LogitScore").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def folder(shared: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return shared("reranker", write)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_scores_are_those_of_sentence_transformers(target: str, folder: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    assert Checkpoint.open(folder).task == "rerank"
    report = export(folder, tmp_path / "p", to=target, progress=False)
    assert report.outputs is not None and report.outputs.difference < 1e-4
    package = load(tmp_path / "p", precise=True)
    assert isinstance(package, Reranker) and package.labels == ("relevance",)
    wanted = sentence_transformers.CrossEncoder(str(folder), device="cpu").predict([(QUERY, d) for d in DOCUMENTS])
    found = package.score(QUERY, DOCUMENTS, batch_size=2)
    assert np.ptp(wanted) > 0.01 and np.abs(found - wanted).max() < 1e-5
    rows, _ = package.pairs(QUERY, DOCUMENTS, 60)
    whole, _ = package.pairs(QUERY, DOCUMENTS)
    assert [len(row) for row in rows[:2]] == [len(row) for row in whole[:2]] and len(rows[2]) <= 60 < len(whole[2])
    assert rows[2][-5:] == whole[2][-5:]  # what the template writes behind the document stays
    with pytest.raises(UsageError, match="leave no room for a query and a document"):
        package.pairs(QUERY, DOCUMENTS, 20)
    with pytest.raises(UsageError, match="reads pairs"):
        package.classify(["alone"])


def test_it_is_tuned_and_verified(folder: Path, tmp_path: Path) -> None:
    artifact = tuned(folder, tmp_path / "a", algorithm="rtn", bits=8, group_size=32)
    export(artifact, tmp_path / "p", to="onnx", progress=False)
    report = verify(tmp_path / "p", against=folder, artifact=artifact, num_samples=4, progress=False)
    assert report.integers_checked and report.quality.kl.mean < 0.1  # type: ignore[union-attr]


def test_tokens_that_are_no_ids_are_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    (copy / "1_LogitScore" / "config.json").write_text('{"true_token_id": "yes"}')
    with pytest.raises(CheckpointError, match="must be a token's id"):
        Checkpoint.open(copy)


def write_modules(folder: Path, modules: list[Any]) -> ListedFiles:
    """A folder as sentence-transformers saves it, of modules behind a Transformer."""
    kinds: list[dict[str, Any]] = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    for number, module in enumerate(modules, 1):
        path = f"{number}_{type(module).__name__}"
        (folder / path).mkdir(parents=True)
        module.save(str(folder / path))
        kinds.append({"type": f"{type(module).__module__}.{type(module).__name__}", "path": path})
    (folder / "modules.json").write_text(json.dumps([{"idx": n, "name": str(n), **k} for n, k in enumerate(kinds)]))
    return ListedFiles(folder)


def made(name: str) -> list[Any]:
    st: Any = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    dense: Any = pytest.importorskip("sentence_transformers.base.modules").Dense
    torch.manual_seed(0)
    pool: Callable[..., Any] = lambda *modes: st.Pooling(WIDTH, pooling_mode=modes)  # noqa: E731
    norm = st.LayerNorm(WIDTH)
    torch.nn.init.normal_(norm.norm.weight)
    rows: dict[str, list[Any]] = {
        "every way side by side": [
            pool("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"), st.Normalize(),
        ],
        "two linears": [
            pool("mean"), dense(WIDTH, 24, bias=False, activation_function=torch.nn.Identity()), dense(24, 5),
            st.Normalize(),
        ],
        "residual": [pool("lasttoken"), dense(WIDTH, 5, use_residual=True, activation_function=torch.nn.GELU())],
        "residual of one width": [pool("cls"), dense(WIDTH, WIDTH, use_residual=True)],
        "norm and dropout": [pool("mean"), st.Dropout(0.1), norm],
    }  # fmt: skip
    return rows[name]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["every way side by side", "two linears", "residual", "residual of one width", "norm and dropout"]
)
def test_vectors_are_those_of_sentence_transformers(name: str, tmp_path: Path) -> None:
    modules = made(name)
    files = write_modules(tmp_path, modules)
    head = read_head(files, WIDTH)
    features: dict[str, Any] = {
        "token_embeddings": torch.from_numpy(HIDDEN), "attention_mask": torch.from_numpy(MASK),
    }  # fmt: skip
    for module in modules:
        features = module.eval()(features)
    wanted = features["sentence_embedding"].numpy()
    found = head(HIDDEN, MASK)
    assert found.shape == wanted.shape == (3, head.width(WIDTH)) and np.abs(found - wanted).max() < 1e-5
    assert head.pooling["mode"] == "modules"
    assert all(name.endswith((".json", ".safetensors")) for name in module_files(files))
