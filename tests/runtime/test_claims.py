"""A manifest that describes another graph is refused at opening; threads do not get in each other's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runtime_toys as toys

from conftest import ROOT
from roundexport.errors import ArtifactError
from roundexport.runtime import Decoder, Encoder, load

GOLDEN = ROOT / "tests/golden"
HEADS = {"num_kv_heads": toys.KV_HEADS, "head_dim": toys.HEAD}


@pytest.mark.parametrize("build", [toys.onnx_decoder, toys.ov_decoder])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 10**6}, "vocab_size says 1000000, the graph gives 320"),
        ({"kv": ({"layer": 0, **HEADS},)}, r"kv names layers \[0\], the graph has caches of \[0, 1\]"),
        ({"kv": ({"layer": 0, **HEADS}, {"layer": 1, **HEADS, "head_dim": 32})}, "kv layer 1 says 2 heads of 32"),
        ({"kv": ({"layer": 0, **HEADS, "num_kv_heads": 4}, {"layer": 1, **HEADS})}, "kv layer 0 says 4 heads of 16"),
    ],
)
def test_a_decoder_whose_manifest_describes_another_graph(
    tmp_path: Path, build: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=rf"roundexport\.json does not describe .*{message}.*export again"):
        load(build(tmp_path / "package", **changes))


@pytest.mark.parametrize(
    ("build", "engine"), [(toys.onnx_decoder, "onnxruntime_genai"), (toys.ov_decoder, "openvino_genai")]
)
def test_vendors_loops_are_held_to_the_same(tmp_path: Path, build: Callable[..., Path], engine: str) -> None:
    pytest.importorskip(engine)
    with pytest.raises(ArtifactError, match="vocab_size says 1000000, the graph gives 320"):
        load(build(tmp_path / "package", vocab_size=10**6), engine=engine)


@pytest.mark.parametrize("build", [toys.onnx_encoder, toys.ov_encoder])
def test_an_encoder_of_another_width(tmp_path: Path, build: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match="hidden_size says 48, the graph gives 32"):
        load(build(tmp_path / "package", hidden_size=48))


def test_more_positions_than_the_rotary_table_has(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"max_context says 641, the graph's rotary table has {toys.CONTEXT}"):
        load(toys.onnx_decoder(tmp_path / "package", max_context=toys.CONTEXT + 1))


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_more_positions_than_the_model_was_made_for(tmp_path: Path, target: str) -> None:
    """OpenVINO's graphs compute their rotary angles, so the model's config is asked."""
    manifest = json.loads((GOLDEN / target / "roundexport.json").read_text())
    for path in (GOLDEN / target).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "roundexport.json").write_text(json.dumps({**manifest, "max_context": 10**12}))
    with pytest.raises(ArtifactError, match=r"max_context says 1000000000000, the (graph's|model's).* 64 positions"):
        load(tmp_path)


@pytest.mark.parametrize("build", [toys.onnx_encoder, toys.ov_encoder])
def test_two_threads_get_the_vectors_of_their_own_texts(tmp_path: Path, build: Callable[..., Path]) -> None:
    encoder = load(build(tmp_path / "package"), threads=1)
    assert isinstance(encoder, Encoder)
    rows = [np.random.default_rng(seed).integers(2, toys.VOCAB, (4, 200)).tolist() for seed in range(2)]
    wanted = [encoder.embed_ids(texts) for texts in rows]
    with ThreadPoolExecutor(2) as pool:
        for number, found in enumerate(pool.map(encoder.embed_ids, rows * 100)):
            np.testing.assert_array_equal(found, wanted[number % 2])


def test_a_package_of_every_target_opens_in_threads_from_another_folder(tmp_path: Path, monkeypatch: Any) -> None:
    """Relative paths with blanks and other alphabets, a trailing slash, a link; another working directory."""
    home = tmp_path / "модель 模型 é (1)"
    builds = {"пакет onnx": toys.onnx_decoder, "包 openvino é": toys.ov_decoder}
    wanted = {name: load(build(home / name)).greedy([[5, 6, 7]], 6)[0].tolist() for name, build in builds.items()}  # type: ignore[union-attr]
    (tmp_path / "elsewhere").mkdir()
    (home / "link").symlink_to(home / "пакет onnx", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "elsewhere")

    def answer(path: str) -> list[int]:
        decoder = load(path)
        assert isinstance(decoder, Decoder) and decoder.encode("so")
        return decoder.greedy([[5, 6, 7]], 6)[0].tolist()

    paths = {f"../{home.name}/{name}/": tokens for name, tokens in wanted.items()}
    paths[f"../{home.name}/link"] = wanted["пакет onnx"]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answer, [*paths] * 3)) == list(paths.values()) * 3


def test_openvino_is_imported_without_its_telemetry() -> None:
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): print('looked up', a); raise OSError\n"
        "socket.getaddrinfo = refuse\n"
        f"from roundexport.runtime import load\nload({str(GOLDEN / 'openvino')!r})\n"
        "from openvino.tools.ovc import convert_impl, telemetry_utils\n"
        "print(convert_impl.tm.__name__, telemetry_utils.tm.__name__, 'openvino_telemetry' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    stub = "openvino.tools.ovc.telemetry_stub"
    assert run.stdout.strip() == f"{stub} {stub} False"


def test_the_tests_send_nothing_either() -> None:
    """What conftest.py imports first; else each conversion forks a process that waits for the network."""
    from openvino.tools.ovc import convert_impl

    assert convert_impl.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
