"""Our ONNX package against the one of onnxruntime-genai's own model builder, at the shapes of Qwen3-0.6B.

    python samples/bench_vendor_onnx.py [--work DIR] [--layers 28] [--group-size 32] [--rounds 5] [--threads 2]
                                        [--plan ARTIFACT] [--kernels] [--builder OPTIONS]…
    python samples/bench_vendor_onnx.py --model MODEL --artifact ARTIFACT --kernels --builder algo_config=k_quant
    python samples/vendor_kl.py MODEL FOLDER…           KL of the same packages: the folders that it prints

Makes a checkpoint with random weights (speed does not depend on their values), packages it both ways at 4 bits,
symmetric, embedding and head included, and runs both in turn, A B A B, in onnxruntime-genai: prefill of 128 tokens,
then 64 steps, each turn in a process of its own (of two models in one process the one loaded first is up to 5 %
slower).  On a machine that does other work too, run it with ``--threads 1`` and compare the CPU time of a step, which
waiting does not enter (with more threads it counts their spinning).
With ``--plan`` ours gets the schemes that another model was tuned to, as by ``roundexport tune samples/model ARTIFACT
--cost latency --target-speedup 1.25``: layer i of n takes those of the layer at the same depth there, module by module.
With ``--kernels`` ours takes part a second time, with products by our own operator (kernels/native/), whose library is
built and put into the package.  Every ``--builder`` is the vendor's package once more with these options of its builder
(comma-separated, as in ``algo_config=k_quant,block_size=64``), so that ours meets its best; the first is its default.
With ``--model`` (a folder or GGUF file) and ``--artifact``, what it was tuned to, both are of a real model.
Needs `pip install roundexport[export-onnx,compare]`, 4 GiB of disk and 6 GiB of memory (the builder's need, not ours).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

PROMPT, STEPS, WARM_UP = 128, 64, 4

MAKE_CHECKPOINT = """
import sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
out, layers = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
config = Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-6, tie_word_embeddings=True,
    bos_token_id=1, eos_token_id=2, pad_token_id=0)
Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
special = ["<pad>", "<s>", "</s>"]
trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
    pad_token="<pad>").save_pretrained(out)
"""
TUNE = """
import sys, roundexport
rules = sys.argv[4] if len(sys.argv) > 4 else None
settings = roundexport.TuneSettings(recipe="rtn", group_size=int(sys.argv[3]), embedding_bits=4, rules=rules)
roundexport.tune(sys.argv[1], sys.argv[2], settings, progress=False)
"""
EXPORT = """
import sys, roundexport
print(roundexport.export(sys.argv[1], sys.argv[2], to="onnx", settings={"kernels": sys.argv[3] == "kernels"}).fusions)
"""
LIBRARY = "roundexport.kernels.native.build"


@dataclass(frozen=True)
class Wanted:
    """Packages to make.

    Args:
        layers: of the model with random weights.
        group_size: of both sides; the vendor's call it block_size.
        model: a real one instead: what `Checkpoint.open` takes; None: random weights.
        artifact: what ``model`` was tuned to.
        plan: an artifact whose schemes ours gets, layer by layer.
        kernels: whether ours is made with our own operator as well.
        builders: options of the vendor's builder, a package for each.
        vendor: whether the vendor's are made at all.
    """

    layers: int
    group_size: int
    model: str | None = None
    artifact: Path | None = None
    plan: Path | None = None
    kernels: bool = False
    builders: tuple[str, ...] = ()
    vendor: bool = True

    def __post_init__(self) -> None:
        if (self.model is None) != (self.artifact is None):
            raise SystemExit("--model and --artifact belong together: the float model, and what it was tuned to")
        if self.plan is not None and self.artifact is not None:
            raise SystemExit("--plan is for random weights; an artifact has schemes of its own")


@dataclass(frozen=True)
class Places:
    """Folders below a work folder, each named by a digest of all that decides its bytes.

    Args:
        work: the folder.
        wanted: what is made in it.
    """

    work: Path
    wanted: Wanted

    def model(self) -> Path:
        """The checkpoint with random weights."""
        return self._place("model", self.wanted.layers)

    def rules(self) -> Path:
        """The rules of a plan, carried over."""
        return self._place("rules", *self._scheme()).with_suffix(".json")

    def artifact(self) -> Path:
        """What it is rounded to."""
        return self._place("artifact", *self._scheme())

    def ours(self, kernels: bool = False) -> Path:
        """Our package."""
        return self._place("ours-kernels" if kernels else "ours", *self._scheme())

    def vendor(self, options: str) -> Path:
        """The vendor's package."""
        model = [self.wanted.model, _manifest(self.wanted.artifact)] if self.wanted.model else [self.wanted.layers]
        name = re.sub(r"[^\w.-]+", "-", f"vendor {options}".strip())
        return self._place(name, *model, self.wanted.group_size, options)

    def _scheme(self) -> list[object]:
        wanted = self.wanted
        if wanted.model is not None:
            return [wanted.model, _manifest(wanted.artifact)]
        return [wanted.layers, wanted.group_size, _manifest(wanted.plan)]

    def _place(self, name: str, *made_of: object) -> Path:
        return self.work / f"{name}-{sha256(json.dumps(made_of).encode()).hexdigest()[:8]}"


def _manifest(artifact: Path | None) -> str | None:
    """The sha256 of an artifact's manifest, which lists those of its files."""
    return None if artifact is None else sha256((artifact / "manifest.json").read_bytes()).hexdigest()


def run(what: str, command: list[str], log: Path) -> None:
    """Run a command with its output in a file; print its time and peak memory."""
    start = time.perf_counter()
    with log.open("wb") as output:
        child = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{what} failed, see {log}")
    print(f"{what:24} {time.perf_counter() - start:6.1f} s   peak RSS {usage.ru_maxrss / 1024:6.0f} MiB", flush=True)


def rule(name: str, spec: object) -> dict[str, object]:
    """The rule (roundexport/schemes/rules.py) that gives one layer a scheme."""
    return {
        "match": f"^{re.escape(name)}$",
        **{key: getattr(spec, key) for key in ("bits", "group_size", "symmetric")},
    }


def carried_over(plan: Path, layers: int) -> list[dict[str, object]]:
    """Rules that give a model of so many layers the schemes of an artifact's."""
    from roundexport.formats.artifact import Artifact

    artifact, found = Artifact.open(plan), {}
    for name in artifact.names():
        place = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if place:
            found[int(place[1]), place[2]] = artifact.entry(name).spec
    depth = 1 + max(index for index, _ in found)
    return [
        rule(f"model.layers.{layer}.{module}", spec)
        for layer in range(layers)
        for (index, module), spec in found.items()
        if index == layer * depth // layers
    ]


def make_packages(work: Path, wanted: Wanted) -> dict[str, Path]:
    """Name -> package; what is there already of the same ingredients is taken as it is."""
    places = Places(work, wanted)
    model, artifact, ours = places.model(), places.artifact(), places.ours()
    rules = []
    if wanted.plan is not None:
        places.rules().write_text(json.dumps(carried_over(wanted.plan, wanted.layers)))
        rules = [str(places.rules())]
    python = [sys.executable, "-c"]
    if wanted.model is not None and wanted.artifact is not None:
        from roundexport.model.checkpoint import Checkpoint

        model, artifact = Checkpoint.open(wanted.model).folder, wanted.artifact
    else:
        made(model, "checkpoint", [*python, MAKE_CHECKPOINT, str(model), str(wanted.layers)], work)
        tuned = [*python, TUNE, str(model), str(artifact), str(wanted.group_size), *rules]
        made(artifact, "artifact (rtn)", tuned, work)
    packages = {"ours": made(ours, "export (ours)", [*python, EXPORT, str(artifact), str(ours), ""], work)}
    if wanted.kernels:
        fast = places.ours(kernels=True)
        made(fast, "export (ours, kernels)", [*python, EXPORT, str(artifact), str(fast), "kernels"], work)
        for where in ([], [str(fast)]):  # for this machine, then beside the package, where genai looks for it
            run("library", [sys.executable, "-m", LIBRARY, *where], work / "library.log")
        packages["ours --kernels"] = fast
    for given in ("", *wanted.builders) if wanted.vendor else ():
        name = f"vendor {given}".strip()
        out = places.vendor(given)
        fixed = f"hf_token=false block_size={wanted.group_size} accuracy_level=4 is_symmetric=true".split()
        own = [option for option in given.split(",") if option]
        named = {option.partition("=")[0] for option in own}
        options = [option for option in fixed if option.partition("=")[0] not in named] + own
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
        told = ["-p", "int4", "-e", "cpu", "-c", str(work / "cache"), "--extra_options", *options]
        packages[name] = made(out, f"builder ({name})", [*builder, *told], work)
    return packages


def made(out: Path, what: str, command: list[str], work: Path) -> Path:
    """What a command writes; it runs where that is not there."""
    if not out.exists():
        run(what, command, work / f"{out.name}.log")
    return out


def measure(package: Path, threads: int) -> None:
    """One turn, in a process of its own: print the figures as JSON."""
    model = open_model(package, threads)
    prompts = np.random.default_rng(0).integers(3, 250, (3, PROMPT)).astype(np.int32)
    runs = [generate(model, prompt) for prompt in prompts][1:]  # the first warms up
    print(json.dumps([[first for first, _, _ in runs], *([x for r in runs for x in r[i]] for i in (1, 2))]))


def open_model(package: Path, threads: int) -> object:
    """Load a package with the same session options as the other."""
    import onnxruntime_genai as genai

    config = genai.Config(str(package))
    options = {"session_options": {"intra_op_num_threads": threads, "inter_op_num_threads": 1}}
    config.overlay(json.dumps({"model": {"decoder": options}, "search": {"past_present_share_buffer": True}}))
    return genai.Model(config)


def generate(model: object, prompt: np.ndarray) -> tuple[float, list[float], list[float]]:
    """Seconds to the first token, seconds of each step after it, and CPU seconds of each step."""
    import onnxruntime_genai as genai

    length = PROMPT + STEPS + 1
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    start = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first, steps, busy = time.perf_counter() - start, [], []
    for _ in range(STEPS):
        begin, cpu = time.perf_counter(), time.process_time()
        generator.generate_next_token()
        steps.append(time.perf_counter() - begin)
        busy.append(time.process_time() - cpu)
    return first, steps[WARM_UP:], busy[WARM_UP:]


def report(name: str, package: Path, firsts: list[float], steps: list[float], busy: list[float]) -> list[float]:
    """Print a package's figures; seconds a step: best, 10th percentile, median, and CPU time (10th percentile)."""
    size = sum(path.stat().st_size for path in package.iterdir()) / 1e6
    times = [min(steps), *np.percentile(steps, [10, 50]), float(np.percentile(busy, 10))]
    rates = "   ".join(
        f"{what} {1 / seconds:5.1f}" for what, seconds in zip(("best", "p10", "median"), times, strict=False)
    )
    prefill = PROMPT / min(firsts)
    print(
        f"{name:24} {size:5.0f} MB   prefill {prefill:6.1f} tok/s   decode {rates} tok/s   CPU {times[3] * 1e3:5.1f} ms"
    )
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench_vendor_onnx"))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plan", type=Path, help="artifact whose schemes ours gets, layer by layer")
    parser.add_argument("--kernels", action="store_true", help="ours with its own operator as well")
    parser.add_argument("--builder", action="append", default=[], help="options of the vendor's builder; repeatable")
    parser.add_argument("--model", help="a real model instead of random weights")
    parser.add_argument("--artifact", type=Path, help="what --model was tuned to")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        return measure(given.measure, given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    builders = tuple(given.builder)
    wanted = Wanted(given.layers, given.group_size, given.model, given.artifact, given.plan, given.kernels, builders)
    packages = make_packages(given.work, wanted)
    for name, package in packages.items():
        print(f"{name:24} {package}", flush=True)
    seen: dict[str, tuple[list[float], list[float], list[float]]] = {name: ([], [], []) for name in packages}
    for _ in range(given.rounds):
        for name, package in packages.items():
            worker = [sys.executable, __file__, "--measure", str(package), "--threads", str(given.threads)]
            figures = json.loads(subprocess.run(worker, check=True, capture_output=True, text=True).stdout)
            for found, new in zip(seen[name], figures, strict=True):
                found.extend(new)
    times = {name: report(name, packages[name], *found) for name, found in seen.items()}
    for ours in (name for name in times if name.startswith("ours")):
        for vendor in (name for name in times if name.startswith("vendor")):
            ratios = [theirs / own for own, theirs in zip(times[ours], times[vendor], strict=True)]
            figures = "best {:.2f}, p10 {:.2f}, median {:.2f}, by CPU time {:.2f}".format(*ratios)
            print(f"decode speed, {ours} / {vendor}: {figures}")
    return print_machine()


def print_machine() -> None:
    from roundexport.runtime.machine import machine_info

    info = machine_info()
    print(
        json.dumps({key: info[key] for key in ("cpu", "instruction_sets", "physical_cores", "load_1min", "versions")})
    )


if __name__ == "__main__":
    main()
