"""The vendor's own pipelines load our folders and give our tokens: paged attention, stateful attention, embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from greedy_reading import likeliest, reader
from openvino_tools import EXACT, Package

from conftest import DECODERS, FAMILIES, build_model
from roundexport.quant.spec import QuantSpec

genai = pytest.importorskip("openvino_genai")

NEW_TOKENS = 20


def is_greedy(package: Package, prompt: np.ndarray, written: list[int]) -> bool:
    """Whether torch with the dequantized weights writes these tokens too."""
    return len(written) == NEW_TOKENS and written == likeliest(reader(package.reference), prompt[0].tolist(), written)


def vendor_greedy(folder: Path, prompt: np.ndarray, backend: str, **properties: Any) -> list[int]:
    """Tokens of openvino_genai; a backend that is asked for by name does not fall back on the other."""
    pipeline = genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND=backend, **properties)
    config = genai.GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True, do_sample=False)
    inputs = genai.TokenizedInputs(ov.Tensor(prompt), ov.Tensor(np.ones_like(prompt)))
    return list(pipeline.generate(inputs, config).tokens[0])


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
@pytest.mark.parametrize("family", DECODERS)
def test_vendor_pipeline_gives_the_models_greedy_tokens(openvino_packages, family: str, backend: str) -> None:
    # 30 prompt tokens and 20 new ones: far beyond the window of 8 in Gemma 3's first layer.
    prompt = np.random.default_rng(3).integers(4, 380, (1, 30))
    package = openvino_packages(family)
    assert is_greedy(package, prompt, vendor_greedy(package.folder, prompt, backend, **EXACT))


def test_spelled_out_attention_is_served_by_the_stateful_pipeline(tmp_path: Path, monkeypatch) -> None:
    values = {**FAMILIES["gemma3"][2], "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
    monkeypatch.setitem(FAMILIES, "gemma2", ("Gemma2Config", "Gemma2ForCausalLM", values))
    package = Package(build_model("gemma2", tmp_path / "model"), tmp_path)
    prompt = np.random.default_rng(5).integers(4, 380, (1, 30))
    assert is_greedy(package, prompt, vendor_greedy(package.folder, prompt, "SDPA", **EXACT))
    with pytest.raises(RuntimeError):  # asked for by name, paged attention refuses rather than drop the cap
        vendor_greedy(package.folder, prompt, "PA", **EXACT)


def test_vendor_tokenizer_agrees_with_tokenizer_json(sample_model: Path, heldout_text: Path, openvino_packages) -> None:
    from tokenizers import Tokenizer

    package = openvino_packages("sample")
    ours = Tokenizer.from_file(str(sample_model / "tokenizer.json"))
    vendors = genai.Tokenizer(str(package.folder))
    text = heldout_text.read_text(encoding="utf-8")
    for start in range(0, 20_000, 400):
        piece = text[start : start + 300] + " — “naïve” 12,345 🙂\t日本"
        ids = ours.encode(piece).ids
        assert np.array(vendors.encode(piece).input_ids.data).reshape(-1).tolist() == ids
        assert vendors.decode(ids) == ours.decode(ids)
    pipeline = genai.LLMPipeline(str(package.folder), "CPU")
    assert pipeline.generate("It was a dark night and", max_new_tokens=8, do_sample=False)


def test_two_bits_run_in_the_vendors_pipeline_with_its_own_defaults(models, tmp_path: Path) -> None:
    def two_bits(info: Any) -> QuantSpec:
        return QuantSpec(2, 32, False)

    package = Package(models("llama, one block"), tmp_path, two_bits)
    prompt = np.random.default_rng(4).integers(4, 380, (1, 12))
    assert len(vendor_greedy(package.folder, prompt, "PA")) == NEW_TOKENS


def test_vendor_embedding_pipeline_gives_the_models_vectors(openvino_packages) -> None:
    package = openvino_packages("minilm")
    config = genai.TextEmbeddingPipeline.Config()
    config.pooling_type = genai.TextEmbeddingPipeline.PoolingType.MEAN
    config.normalize = True
    pipeline = genai.TextEmbeddingPipeline(str(package.folder), "CPU", config, **EXACT)
    texts = ["A man is eating food.", "Someone eats a meal, slowly and with evident pleasure.", "The sky."]
    vectors = np.array(pipeline.embed_documents(texts))
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(package.checkpoint.folder, local_files_only=True)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = package.reference(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-5)  # float32 on both sides, values below 1
