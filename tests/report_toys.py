"""Packages made by hand: a manifest, and whatever was recorded about it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from roundexport.formats.artifact_manifest import Algorithm, LayerEntry, Manifest, Source
from roundexport.formats.package import PackageManifest, write_manifest
from roundexport.formats.verification_record import write_record
from roundexport.quant.spec import LinearInfo, QuantSpec

KINDS = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (128, 64)}
DECODER_QUALITY: dict[str, Any] = {
    "windows": 16, "tokens": 1000, "kl": {"mean": 0.01234, "stderr": 0.0005}, "kl_p99": 0.0871, "kl_max": 1.5,
    "top1": {"mean": 0.9312, "stderr": 0.004}, "perplexity_float": 20.25, "perplexity": 21.5,
    "nll_float": {"mean": 3.0, "stderr": 0.1}, "nll": {"mean": 3.1, "stderr": 0.1},
    "first_divergence": [48, 3], "divergence_horizon": 48,
    "kl_histogram": {"edges": [0.001, 0.01, 0.1, 1.0], "counts": [100, 500, 300, 90, 10]},
}  # fmt: skip
ENCODER_QUALITY: dict[str, Any] = {
    "texts": 64, "cosine": {"mean": 0.9987, "stderr": 0.0001}, "cosine_min": 0.9911, "rank_correlation": 0.9977,
    "same_neighbour": 0.9375,
}  # fmt: skip


@dataclasses.dataclass
class Toy:
    """A conversion's folder, filled as a test asks for."""

    folder: Path
    location: str = "m"

    def artifact(self, bits: int = 4, losses: bool = True, algorithm: str = "gram", name: str = "artifact") -> str:
        """An artifact's manifest; returns its sha256."""
        layers = [
            LayerEntry(
                LinearInfo(f"model.layers.{block}.{kind}", shape[1], shape[0], "linear", ()),
                QuantSpec(bits, 32, True),
                0.08 / (1 + block) if losses else None,
                0.02 / (1 + block) if losses else None,
            )
            for block in range(3)
            for kind, shape in KINDS.items()
        ]
        manifest = Manifest(
            Source(location=self.location, model_type="llama", task="generate", digest="d" * 64, files={}),
            Algorithm(name=algorithm, settings={"sweeps": 6, "damping": 0.3}),
            {"kind": "self", "num_samples": 128, "sample_len": 512},
            tuple(layers),
            (("lm_head", "asked for"),),
            {"torch": "2.13"},
        )
        data = json.dumps(manifest.to_json()).encode()
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / name / "manifest.json").write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    def package(
        self, name: str = "onnx", *, bits: int = 4, artifact: str = "a", task: str = "generate",
        quality: dict[str, Any] | None = None, failures: tuple[str, ...] = (), size: int = 4096,
    ) -> Path:  # fmt: skip
        """A package; ``quality`` is recorded in it."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(bytes(size))
        (folder / "genai_config.json").write_text("{}")
        decoder = task == "generate"
        manifest = PackageManifest(
            target="onnx",
            task="generate" if decoder else "embed",
            model_file="model.onnx",
            model_type="llama",
            kv=({"layer": 0, "num_kv_heads": 2, "head_dim": 16},) if decoder else (),
            vocab_size=384,
            hidden_size=64,
            max_context=512,
            tokens={"bos": None, "eos": (0,), "pad": 1},
            pooling=None if decoder else {"mode": "cls", "normalize": True},
            settings={"accuracy_level": 4},
            source={
                "location": self.location, "digest": "d" * 64, "artifact": artifact,
                "calibration": {"kind": "self", "num_samples": 128, "sample_len": 512},
            },
            layers={
                f"model.layers.{block}.{kind}": {
                    "bits": bits, "group_size": 32, "symmetric": True, "stored": "MatMulNBits",
                }
                for block in range(3)
                for kind in KINDS
            },
            kept_float=(("lm_head", "asked for"),),
            fusions={"skip norm": 6},
            versions={"onnx": "1.23"},
        )  # fmt: skip
        write_manifest(folder, manifest)
        if quality is not None:
            write_record(folder, report(quality, failures))
        return folder

    def bench(self, *contestants: tuple[str, float]) -> Path:
        """A benchmark record of contestants and their tokens per second."""
        shape = {"prompt_len": 64, "output_len": 32}
        found = {
            "machine": {"cpu": "A Processor", "instruction_sets": ["AVX2"], "read_bandwidth_gbps": 12.5},
            "settings": {"rounds": 2, "threads": 2, "device": "CPU", "precise": False, "seed": 0},
            "contestants": [
                {
                    "name": name,
                    "info": {"engine": "ort", "library": "onnxruntime", "version": "1.31", "package": Path(name).name},
                }
                for name, _ in contestants
            ],
            "rows": [
                {"contestant": name, **shape, "ttft_ms": 12.0, "decode_tps": speed, "itl_p99_ms": 31.5}
                for name, speed in contestants
            ],
            "runs": [
                {"contestant": name, "round": n, "shape": shape, "metrics": {}, "step_ms": [1e3 / speed + n] * 31}
                for n in (1, 2)
                for name, speed in contestants
            ],
        }
        path = self.folder / "bench.json"
        path.write_text(json.dumps(found))
        return path


def report(quality: dict[str, Any], failures: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `verify` says of a package, as it keeps it."""
    return {
        "package": "/somewhere/p", "against": "/somewhere/m", "text": "bundled text",
        "engine": {"engine": "ort", "library": "onnxruntime", "version": "1.31", "device": "CPU", "threads": 2},
        "quality": quality, "integers_checked": 6, "failures": list(failures),
    }  # fmt: skip
