"""What a package lost: the float model and the package on its own runtime, over the same held-out tokens.

Decoders, per predicted token, with p the float model's distribution and q the package's:

    KL(p ‖ q) = Σ_v p_v · (log p_v - log q_v)      mean, 99th percentile, maximum; nats
    top-1     = share of positions where both models' likeliest token is the same
    perplexity = exp(mean negative log likelihood), for both, with the standard error of the mean taken over windows
    divergence = first position at which greedy decoding of both models differs, over a few prompts

Encoders: cosine between both embeddings of a text (mean, least), Spearman's rank correlation of all pairwise
similarities, and the share of texts whose nearest neighbor stays the same.

Standard errors are over windows (or texts), not tokens: tokens of one window are not independent.
Text must be disjoint from calibration text; where the package knows what it was calibrated on, that file is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.package import PackageManifest, read_package
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.torch_threads import torch_threads
from roundexport.storage.checksums import sha256_file

if TYPE_CHECKING:
    from roundexport.runtime.types import DecoderEngine, EncoderEngine

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Figure:
    """A mean with the standard error of that mean."""

    mean: float
    stderr: float

    @classmethod
    def over(cls, values: Floats) -> Figure:
        """Mean and standard error of independent values [n]."""
        values = np.asarray(values, np.float64)
        spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        return cls(float(values.mean()), float(spread))

    def __str__(self) -> str:
        return f"{self.mean:.5f} ± {self.stderr:.5f}"


@dataclass(frozen=True)
class DecoderQuality:
    """Loss of a decoder package against its float model; nats, shares and token counts."""

    windows: int
    tokens: int
    kl: Figure
    kl_p99: float
    kl_max: float
    top1: Figure
    perplexity_float: float
    perplexity: float
    nll_float: Figure
    nll: Figure
    first_divergence: tuple[int, ...]
    divergence_horizon: int


@dataclass(frozen=True)
class EncoderQuality:
    """Loss of an encoder package against its float model."""

    texts: int
    cosine: Figure
    cosine_min: float
    rank_correlation: float
    same_neighbour: float


@dataclass(frozen=True)
class QualityReport:
    """What `verify` found.

    Args:
        package: the folder.
        against: the float model's location.
        text: where the held-out text came from.
        engine: what ran the package, with its effective precisions.
        quality: figures by task.
        integers_checked: layers whose integers were read back and equal the artifact's; None: no artifact was given.
        failures: gates that failed, one sentence each.
    """

    package: str
    against: str
    text: str
    engine: dict[str, Any]
    quality: DecoderQuality | EncoderQuality
    integers_checked: int | None = None
    failures: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


@torch_threads()
def verify(  # noqa: PLR0913  (the parameters are the verb's flags)
    package: str | Path,
    *,
    against: str | Path,
    artifact: str | Path | None = None,
    text: str | Path | None = None,
    num_samples: int = 32,
    sample_len: int = 512,
    max_kl: float | None = None,
    min_top1: float | None = None,
    min_cosine: float | None = None,
    precise: bool = False,
) -> QualityReport:
    """Compare a package, on its own runtime, with the float model it came from.

    Args:
        package: package folder; every file's hash is checked first.
        against: the float model.
        artifact: the artifact it was exported from; its integers are then read back from the package and compared.
        text: held-out text file; without one, a decoder's own text, or words of an encoder's vocabulary, drawn with a
            seed that calibration does not use.
        num_samples: windows (decoders) or texts (encoders).
        sample_len: tokens per window.
        max_kl: gate on mean KL, nats per token (decoders).
        min_top1: gate on top-1 agreement, 0 to 1 (decoders).
        min_cosine: gate on mean cosine (encoders).
        precise: run the runtime in float32 throughout, instead of with the settings it ships with.

    Returns:
        The figures; ``failures`` is empty when every gate held.

    Raises:
        ArtifactError: the package is damaged, was made from another model, or its integers differ from the artifact's.
        UsageError: the text cannot be read, is too short, or is the calibration text; or a gate is not for this task.
    """
    from roundexport.runtime.loading import load

    folder = Path(package)
    manifest = read_package(folder)
    check_gates(manifest.task, max_kl, min_top1, min_cosine)
    if num_samples < 2:
        raise UsageError(f"num_samples must be at least 2, as figures carry a standard error; got {num_samples}")
    if text is not None:
        _check_disjoint(manifest, text)
    checkpoint = Checkpoint.open(against)
    if checkpoint.digest != manifest.source["digest"]:
        raise ArtifactError(
            f"{checkpoint.location} is not the model {folder} was made from: its weights hash to "
            f"{checkpoint.digest[:12]}, the package names {manifest.source['digest'][:12]}; pass the right --against"
        )
    checked = None if artifact is None else _check_integers(folder, manifest, Path(artifact))
    engine = load(folder, check_hashes=False, precise=precise)
    if manifest.task == "generate":
        ids, source = _heldout_ids(checkpoint, manifest, text, num_samples, min(sample_len, manifest.max_context))
        quality: DecoderQuality | EncoderQuality = measure_decoder(checkpoint, engine, ids)  # type: ignore[arg-type]
    else:
        texts, source = _heldout_texts(checkpoint, manifest, text, num_samples)
        quality = measure_encoder(checkpoint, engine, texts)  # type: ignore[arg-type]
    return QualityReport(
        package=str(package),
        against=str(against),
        text=source,
        engine=engine.info(),
        quality=quality,
        integers_checked=checked,
        failures=_failures(quality, max_kl, min_top1, min_cosine),
    )


def check_gates(
    task: str, max_kl: float | None = None, min_top1: float | None = None, min_cosine: float | None = None
) -> None:
    """Refuse a gate that the task has no figure for, or that no figure could decide, before any work."""
    for name, value, least, most in (("max-kl", max_kl, 0, sys.float_info.max), ("min-top1", min_top1, 0, 1),
                                     ("min-cosine", min_cosine, -1, 1)):  # fmt: skip
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name} must be {'0 or more' if most > 1 else f'from {least} to {most}'}, not {value}")
    if task == "embed" and (max_kl is not None or min_top1 is not None):
        raise UsageError("--max-kl and --min-top1 are gates for decoders; use --min-cosine for an encoder")
    if task == "generate" and min_cosine is not None:
        raise UsageError("--min-cosine is a gate for encoders; use --max-kl or --min-top1 for a decoder")


def _failures(
    quality: DecoderQuality | EncoderQuality, max_kl: float | None, min_top1: float | None, min_cosine: float | None
) -> tuple[str, ...]:
    if isinstance(quality, EncoderQuality):
        low = min_cosine is not None and not quality.cosine.mean >= min_cosine
        return (f"mean cosine {quality.cosine.mean:.5f} is below --min-cosine {min_cosine}",) if low else ()
    failures = []
    if max_kl is not None and not quality.kl.mean <= max_kl:
        failures.append(f"mean KL {quality.kl.mean:.5f} nats is above --max-kl {max_kl}")
    if min_top1 is not None and not quality.top1.mean >= min_top1:
        failures.append(f"top-1 agreement {quality.top1.mean:.4f} is below --min-top1 {min_top1}")
    return tuple(failures)


def _check_integers(folder: Path, manifest: PackageManifest, artifact_path: Path) -> int:
    from roundexport.formats.artifact import Artifact
    from roundexport.targets.interface import load_target

    artifact = Artifact.open(artifact_path)
    found = load_target(manifest.target).read_back(folder)
    wrong = [n for n in artifact.names() if n not in found or not found[n].equals(artifact.linear(n))]
    extra = sorted(set(found) - set(artifact.names()))
    if wrong or extra:
        raise ArtifactError(
            f"{folder}: integers differ from {artifact_path} in {len(wrong)} layers {wrong[:3]}, "
            f"and {len(extra)} layers are not in the artifact {extra[:3]}; export it again"
        )
    return len(found)


HELDOUT_SEED = 20_001
"""Seed of text drawn for verification, unless calibration used it; calibration's default is 42."""


def _heldout_ids(
    checkpoint: Checkpoint, manifest: PackageManifest, text: str | Path | None, samples: int, length: int
) -> tuple[NDArray[np.int64], str]:
    """Windows of a text file; without one, text that the float model writes."""
    from roundexport.calibration.samples import load_calibration

    source = "self" if text is None else str(text)
    drawn = load_calibration(
        checkpoint, source, num_samples=samples, sample_len=length, seed=_seed_for(manifest.source["calibration"])
    )
    return drawn.ids, "sampled from the float model" if text is None else Path(text).name


def _heldout_texts(
    checkpoint: Checkpoint, manifest: PackageManifest, text: str | Path | None, samples: int
) -> tuple[list[str], str]:
    """Lines of a text file; without one, words drawn from the vocabulary, since an encoder cannot write."""
    if text is None:
        from roundexport.calibration.samples import load_calibration
        from roundexport.runtime.tokenizer import Tokenizer

        seed = _seed_for(manifest.source["calibration"])
        drawn = load_calibration(checkpoint, "self", num_samples=max(8, samples), sample_len=32, seed=seed)
        tokenizer = Tokenizer(checkpoint.folder)
        return [tokenizer.decode(row) for row in drawn.ids.tolist()], "words drawn from the vocabulary"
    lines = [line.strip() for line in read_heldout(text).split("\n") if len(line.split()) >= 5]
    if len(lines) < 8:
        raise UsageError(f"{text}: found {len(lines)} lines of at least five words; at least 8 are needed")
    return lines[:: max(1, len(lines) // samples)][:samples], Path(text).name


def _seed_for(calibration: dict[str, Any]) -> int:
    return HELDOUT_SEED + (calibration.get("seed") == HELDOUT_SEED)


def read_heldout(text: str | Path) -> str:
    """The held-out text.

    Raises:
        UsageError: it cannot be read as UTF-8 text.
    """
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {text}: the held-out text cannot be read: {error}") from error


def _check_disjoint(manifest: PackageManifest, text: str | Path) -> None:
    read_heldout(text)
    calibrated_on = manifest.source["calibration"].get("text_sha256")
    if calibrated_on is not None and sha256_file(Path(text)) == calibrated_on:
        raise UsageError(f"--text {text} is the text this package was calibrated on; give held-out text")


def measure_decoder(
    checkpoint: Checkpoint, engine: DecoderEngine, ids: NDArray[np.int64], *, horizon: int = 48
) -> DecoderQuality:
    """Figures of a decoder package over windows of tokens.

    Args:
        checkpoint: the float model.
        engine: the opened package.
        ids: int64 [windows, length].
        horizon: tokens of greedy decoding compared, from the first 32 tokens of up to eight windows.
    """
    import torch

    model = checkpoint.load_model()
    kl: list[Floats] = []
    same: list[NDArray[np.bool_]] = []
    nll_float: list[Floats] = []
    nll: list[Floats] = []
    for window in _batches(ids, tokens=1024):
        with torch.no_grad():
            reference = torch.log_softmax(model(input_ids=torch.from_numpy(window)).logits.float(), -1)
        found = torch.log_softmax(torch.from_numpy(engine.logits(window)).float(), -1)
        kl.append((reference.exp() * (reference - found)).sum(-1).numpy())
        same.append((reference.argmax(-1) == found.argmax(-1)).numpy())
        targets = torch.from_numpy(window)[:, 1:, None]
        nll_float.append(-reference[:, :-1].gather(-1, targets)[..., 0].numpy())
        nll.append(-found[:, :-1].gather(-1, targets)[..., 0].numpy())
    per_token = np.concatenate(kl)
    lost, kept = Figure.over(np.concatenate(nll_float).mean(1)), Figure.over(np.concatenate(nll).mean(1))
    return DecoderQuality(
        windows=len(ids),
        tokens=int(ids.size),
        kl=Figure.over(per_token.mean(1)),
        kl_p99=float(np.quantile(per_token, 0.99)),
        kl_max=float(per_token.max()),
        top1=Figure.over(np.concatenate(same).mean(1)),
        perplexity_float=float(np.exp(lost.mean)),
        perplexity=float(np.exp(kept.mean)),
        nll_float=lost,
        nll=kept,
        first_divergence=_first_divergence(model, engine, ids[:8, :32], horizon),
        divergence_horizon=horizon,
    )


def _batches(ids: NDArray[np.int64], tokens: int) -> Iterator[NDArray[np.int64]]:
    """Windows in batches of about this many tokens: both models' logits [tokens, V] are in memory at once."""
    size = max(1, tokens // ids.shape[1])
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _first_divergence(model: Any, engine: DecoderEngine, prompts: NDArray[np.int64], horizon: int) -> tuple[int, ...]:
    """Per prompt, the number of greedy tokens that agree before the first that differs; ``horizon`` if all do."""
    import torch

    with torch.no_grad():
        inputs = torch.from_numpy(prompts)
        written = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=horizon, min_new_tokens=horizon,
            do_sample=False, pad_token_id=0,
        ).numpy()[:, prompts.shape[1] :]  # fmt: skip
    ours = np.stack(engine.greedy([list(map(int, p)) for p in prompts], horizon))
    agree = np.cumprod(written == ours, axis=1).sum(1)
    return tuple(int(n) for n in agree)


def measure_encoder(checkpoint: Checkpoint, engine: EncoderEngine, texts: list[str]) -> EncoderQuality:
    """Figures of an encoder package over texts."""
    reference = float_embeddings(checkpoint, engine, texts)
    found = engine.embed(texts)
    unit = [e / np.linalg.norm(e, axis=1, keepdims=True) for e in (reference, found)]
    cosine = (unit[0] * unit[1]).sum(1)
    similar = [u @ u.T for u in unit]
    upper = np.triu_indices(len(texts), 1)
    neighbor = [np.where(np.eye(len(texts), dtype=bool), -2.0, s).argmax(1) for s in similar]
    ranks = [s[upper].argsort().argsort().astype(np.float64) for s in similar]
    return EncoderQuality(
        texts=len(texts),
        cosine=Figure.over(cosine),
        cosine_min=float(cosine.min()),
        rank_correlation=float(np.corrcoef(*ranks)[0, 1]),
        same_neighbour=float((neighbor[0] == neighbor[1]).mean()),
    )


def float_embeddings(checkpoint: Checkpoint, engine: EncoderEngine, texts: list[str]) -> NDArray[np.float32]:
    """Embeddings [n, H] of the float model, tokenized and pooled exactly as the engine does."""
    import torch

    model = checkpoint.load_model()
    rows = []
    for text in texts:
        inputs = engine.encode([text])
        with torch.no_grad():
            out = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        rows.append(engine.pool(out.last_hidden_state.numpy(), inputs["attention_mask"])[0])
    return np.stack(rows)
