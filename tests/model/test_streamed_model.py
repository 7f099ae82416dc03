"""Weights per block: the same values and the same calls as with the whole model, and only one block of them at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from conftest import FAMILIES, build_model
from roundexport.model import streamed_model
from roundexport.model.block_call import capture_calls, first_hidden, run_all
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.experts import Expert
from roundexport.model.streamed_model import StreamedModel

CPU = torch.device("cpu")
Models = Callable[[str], Path]


def sample_ids(rows: int = 4, length: int = 24) -> Tensor:
    return torch.randint(0, 384, (rows, length), generator=torch.Generator().manual_seed(0))


def compact(weights: StreamedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids and their rows of the token embedding."""
    distinct = ids.unique()
    return distinct, weights.rows(weights.embedding_name, distinct)


def resident_blocks(weights: StreamedModel) -> int:
    return sum(not any(p.is_meta for p in block.parameters()) for block in weights.stack.blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_the_loaded_model(family: str, models: Models) -> None:
    checkpoint = Checkpoint.open(models(family))
    weights, model = StreamedModel(checkpoint), checkpoint.load_model()
    assert weights.streamed and resident_blocks(weights) == 0
    expected = dict(model.named_parameters())
    assert [name for name, _ in weights.model.named_parameters()] == list(expected)
    buffers = dict(weights.model.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())
    for name, value in expected.items():
        assert torch.equal(weights.read(name), value), name
        assert torch.equal(torch.cat(list(weights.row_chunks(name))), value), name
    for index, block in enumerate(weights.stack.blocks):
        with weights.block(index) as taken:
            assert taken is block and resident_blocks(weights) == 1
            for name, value in taken.named_parameters():
                assert torch.equal(value, expected[f"{weights.stack.block_name(index)}.{name}"])
        assert resident_blocks(weights) == 0
    head, table = weights.model.get_output_embeddings(), weights.model.get_input_embeddings()
    loaded_head, loaded_table = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head is None) == (loaded_head is None)
    if head is not None:
        assert (head.weight is table.weight) == (loaded_head.weight is loaded_table.weight)


@pytest.mark.parametrize("family", [*FAMILIES, "t5_encoder"])  # which looks ids up in a module of another name
def test_blocks_are_called_as_in_the_loaded_model(family: str, models: Models) -> None:
    checkpoint, ids = Checkpoint.open(models(family)), sample_ids()
    whole, weights = StreamedModel(checkpoint, whole=True), StreamedModel(checkpoint)
    assert not whole.streamed
    calls = capture_calls(whole.model, whole.stack, ids)
    hidden = first_hidden(whole.model, whole.stack, ids, 2)
    with weights.embedding(*compact(weights, ids)):
        with weights.streamed_forward():
            streamed = capture_calls(weights.model, weights.stack, ids)
        assert resident_blocks(weights) == 0
        found = first_hidden(weights.model, weights.stack, ids, 2, torch.empty_like(hidden))
    assert torch.equal(found, hidden)
    for index, (call, other) in enumerate(zip(calls, streamed, strict=True)):
        with weights.block(index) as block, whole.block(index) as loaded:
            found = run_all(block, other, found, 2, CPU)
            hidden = run_all(loaded, call, hidden, 2, CPU)
        assert torch.equal(found, hidden)


def test_the_table_is_whole_again_afterwards(models: Models) -> None:
    weights, ids = StreamedModel(Checkpoint.open(models("llama"))), sample_ids()
    table = weights.model.get_input_embeddings()
    before = (table.weight, table.padding_idx)
    with weights.embedding(*compact(weights, ids)):
        assert table.weight.shape[0] == len(ids.unique())
    assert (table.weight, table.padding_idx) == before and not table._forward_pre_hooks


def test_rows_come_from_any_part(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = StreamedModel(Checkpoint.open(models("gpt2")))
    name = "transformer.wte.weight"
    ids = torch.tensor([0, 6, 7, 8, 200, 383])
    expected = weights.read(name)[ids]
    monkeypatch.setattr("roundexport.model.streamed_model._PART", 64 * 7)  # seven rows
    assert torch.equal(weights.rows(name, ids), expected)
    assert [len(part) for part in weights.row_chunks(name)] == [7] * 54 + [6]


def test_what_was_changed_in_a_block_is_dropped_with_it(models: Models) -> None:
    weights = StreamedModel(Checkpoint.open(models("llama")))
    with weights.block(0) as block:
        block.mlp.up_proj.weight.zero_()
    with weights.block(0) as block:
        assert bool(block.mlp.up_proj.weight.any())


def test_a_block_is_dropped_when_its_work_fails(models: Models) -> None:
    weights = StreamedModel(Checkpoint.open(models("llama")))
    with pytest.raises(ZeroDivisionError), weights.block(1):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), weights.streamed_forward() as model:
        model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
        with weights.embedding(*compact(weights, sample_ids())):
            model(input_ids=sample_ids())
    assert resident_blocks(weights) == 0


def test_files_of_half_precision_are_read_as_the_model_reads_them(models: Models, tmp_path: Path) -> None:
    folder = build_model("qwen3", tmp_path / "model")
    tensors = {name: value.astype(np.float16) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    weights = StreamedModel(checkpoint)
    assert weights.streamed
    assert all(
        torch.equal(weights.read(n), p) and p.dtype == torch.float32
        for n, p in checkpoint.load_model().named_parameters()
    )


def moe(family: str, folder: Path, **changes: Any) -> torch.nn.Module:
    """A mixture of experts of one layer, saved as its family saves them."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
        "num_hidden_layers": 1, "shared_expert_intermediate_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


# one tensor per matrix; w1, w2, w3; stacked under other names; transposed, gate and up in turn, with biases
@pytest.mark.parametrize("family", ["Qwen2Moe", "Mixtral", "Phimoe", "GraniteMoe", "GptOss", "MiniMaxM2"])
def test_every_expert_is_a_linear_of_its_own(family: str, tmp_path: Path) -> None:
    model = moe(family, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    weights = StreamedModel(checkpoint)
    assert weights.streamed
    whole = checkpoint.load_model()
    names = [name for name, _ in whole.named_parameters()]
    assert sum("experts.3.up_proj.weight" in name for name in names) == 1
    assert all(torch.equal(weights.read(name), parameter) for name, parameter in whole.named_parameters())
    assert sorted(checkpoint.owned()) == sorted(checkpoint.names()) == sorted({*names, *checkpoint.names()})
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad(), weights.tables(ids), weights.streamed_forward() as streamed:
        found, expected = streamed(ids, use_cache=False).logits, model(ids).logits
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5 * expected.std()


def test_rows_of_an_expert_in_a_stack_are_read_alone(tmp_path: Path) -> None:
    moe("GptOss", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    whole = checkpoint.float32(name)
    assert whole.shape == checkpoint.shape(name) == (32, 32)
    np.testing.assert_array_equal(checkpoint.float32(name, (3, 7)), whole[3:7])


def test_experts_are_in_memory_one_at_a_time(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(build_model("mixtral", tmp_path))
    weights, model = StreamedModel(checkpoint), checkpoint.load_model()
    ids = sample_ids(2, 8)
    experts = [module for module in weights.model.modules() if isinstance(module, Expert)]
    seen = []

    def note(*_: Any) -> None:
        seen.append(sum(not any(p.is_meta for p in expert.parameters()) for expert in experts))

    with weights.tables(ids), weights.streamed_forward() as streamed:
        for expert in experts:
            expert.get_submodule("down_proj").register_forward_hook(note)
        given = streamed(input_ids=ids).logits
    assert set(seen) == {1} and resident_blocks(weights) == 0
    torch.testing.assert_close(given, model(input_ids=ids).logits)


def test_chunks_of_rows_are_of_sizes_that_any_number_of_threads_multiplies_alike(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = StreamedModel(Checkpoint.open(models("llama")))
    whole = weights.read("lm_head.weight")
    monkeypatch.setattr(streamed_model, "_PART", 41 * whole.shape[1])
    chunks = [*weights.row_chunks("lm_head.weight")]
    assert {len(chunk) for chunk in chunks[:-1]} == {32} and len(chunks) > 2
    assert torch.equal(torch.cat(chunks), whole)
