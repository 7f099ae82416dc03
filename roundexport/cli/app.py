"""The command line: one verb per public function, with the same names for the same things.

Results go to stdout (``--json``: one JSON document), logs and progress to stderr.  Exit codes: 0 fine, 1 failed,
2 usage, 3 a verification gate failed, 4 it will not fit, 130 interrupted (resumable).
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from roundexport.errors import GateError, UsageError
from roundexport.model.parts import ALL
from roundexport.progress import Progress
from roundexport.tuning.settings import TuneSettings

from . import printing
from .benching import bench
from .chatting import chat
from .classifying import classify
from .failures import guarded
from .importing import import_checkpoint
from .listing import list_names
from .options import set_threads, takes_settings, tell_threads
from .reporting import report
from .rewriting import rewrite
from .serving import serve
from .shared_options import (
    LOADING,
    Cluster,
    Engine,
    HeldOut,
    InputsEmbeds,
    Json,
    Kernels,
    MaxKl,
    MaxRam,
    MinCosine,
    MinTop1,
    Part,
    Precise,
    Properties,
    RuntimeDevice,
    Threads,
    named_values,
)
from .sweeping import sweep
from .text_options import Choosing, Guessing, gain, takes
from .transcribing import transcribe
from .translating import translate, translates

app = typer.Typer(
    name="roundexport",
    help="Tune a transformer's rounding, export the same integers to ONNX and OpenVINO, prove and time the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# As a person meets them: from a model to packages, then what packages are for, then what is known of it all.
_ORDER = (
    "inspect", "convert", "tune", "import", "export", "verify", "generate", "chat", "serve", "transcribe", "classify",
    "bench", "sweep", "report", "rewrite", "list",
)  # fmt: skip

app.command()(report)
app.command()(serve)
app.command()(chat)
app.command()(bench)
app.command()(classify)
app.command("list")(list_names)
app.command("import")(import_checkpoint)
app.command()(transcribe)
app.command()(rewrite)
app.command()(sweep)


def main() -> None:
    """Entry point of the console script: runs a verb and turns deliberate errors into exit codes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    printing.survive_narrow_encodings()
    guarded(app)


@app.command()
def inspect(path: str, part: Part = None, json: Json = False) -> None:
    """Say what is in a model, artifact or package folder; of a model, its size in each scheme and who refuses it."""
    with Progress() as shown, shown.stage(f"inspecting {path}"):
        from roundexport.conversion.inspection import inspect as run

        found = run(path, part, shown)
    if json:
        printing.document(found.to_json())
    else:
        printing.inspection(found)


@app.command()
@takes_settings
def tune(
    model: str,
    out: Path,
    settings: TuneSettings,
    resume: Annotated[bool, typer.Option(help="Go on from an interrupted run of the same settings.")] = True,
    cluster: Cluster = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Tune a model's rounding; writes an artifact of integers, scales and zero points."""
    set_threads(threads)
    with Progress() as shown:
        with shown.stage(LOADING):
            from roundexport.conversion.tune import tune as run
            from roundexport.formats.artifact import Artifact
            from roundexport.model.artifact_size import sizes_at_hand
        folder = run(model, out, settings, cluster=cluster, resume=resume, progress=shown)
    artifact = Artifact.open(folder, check_hashes=False)
    measured = sizes_at_hand(artifact)
    if json:
        printing.document(
            {
                "artifact": str(folder),
                "bits_per_weight": artifact.bits_per_weight,
                "layers": len(artifact.names()),
                "sizes": measured.to_json(),
            }
        )
    else:
        all_told = "" if measured.ratio is None else f", {measured.ratio:.2f} times smaller than float32 in all"
        printing.line(
            f"{folder}: {len(artifact.names())} layers, {artifact.bits_per_weight:.3f} bits per weight{all_told}"
        )


@app.command()
def export(  # noqa: PLR0913, PLR0917
    artifact: Path,
    out: Path,
    to: Annotated[
        str, typer.Option(help="onnx, openvino, or a format of others: roundexport list exporters.")
    ] = "onnx",
    model: Annotated[str | None, typer.Option(help="The float model, if no longer where the artifact says.")] = None,
    device: Annotated[Literal["cpu", "gpu"], typer.Option()] = "cpu",
    max_context: Annotated[int | None, typer.Option(help="Longest sequence to serve.")] = None,
    accuracy_level: Annotated[
        int | None, typer.Option(help="ONNX: 0 float32 or 4 int8 activations (default 4).")
    ] = None,
    activation_time: Annotated[
        float | None,
        typer.Option(
            help="How much longer a token's products may take, as a share (default 0.03), for layers that keep "
            "float activations; which ones, `tune --activations` measures."
        ),
    ] = None,
    pooled: Annotated[
        bool, typer.Option("--pooled", help="Of an embedder: vectors come out of the graph, not hidden states.")
    ] = False,
    dialect: Annotated[
        str | None,
        typer.Option(help="ONNX: onnxruntime (default), its fast operators, or standard, ONNX's own for any runtime."),
    ] = None,
    inputs_embeds: InputsEmbeds = False,
    kernels: Kernels = False,
    max_ram: MaxRam = None,
    json: Json = False,
) -> None:
    """Write an artifact (or, float, a model) for a runtime or in a format of others; prove that integers arrived."""
    with Progress() as shown:
        tell_threads(shown)
        with shown.stage(LOADING):
            from roundexport.targets.export import export as run
        report = run(
            artifact, out, to=to, model=model, device=device, max_context=max_context,
            settings={
                "accuracy_level": accuracy_level, "pooled": pooled or None, "dialect": dialect,
                "inputs_embeds": inputs_embeds or None, "activation_time": activation_time,
                "kernels": kernels or None,
            }, max_ram=max_ram, progress=shown,
        )  # fmt: skip
    if json:
        printing.document(report.to_json())
    else:
        printing.exported(out, to, report)


@app.command()
def verify(  # noqa: PLR0913, PLR0917
    package: Path,
    against: Annotated[str | None, typer.Option(help="The float model; needed unless --files.")] = None,
    artifact: Annotated[
        Path | None, typer.Option(help="Also read the integers back and compare with this artifact.")
    ] = None,
    text: HeldOut = None,
    num_samples: int = 16,
    sample_len: int = 512,
    max_kl: MaxKl = None,
    min_top1: MinTop1 = None,
    min_cosine: MinCosine = None,
    precise: Precise = False,
    properties: Properties = None,
    activations: Annotated[
        bool,
        typer.Option("--activations", help="Also measure what 8-bit activations cost each product of a decoder."),
    ] = False,
    max_ram: MaxRam = None,
    threads: Threads = None,
    files: Annotated[bool, typer.Option("--files", help="Only check the hash of every file.")] = False,
    json: Json = False,
) -> None:
    """Compare a package with its float model; exit code 3 when a gate fails."""
    from roundexport.formats.package import read_package

    if files:
        manifest = read_package(package)
        if json:
            printing.document({"package": str(package), "files": len(manifest.files)})
        else:
            printing.line(f"{package}: {len(manifest.files)} files have the sizes and sha256 that its manifest lists")
        return
    if against is None:
        raise UsageError("verify compares with a float model: give --against MODEL, or --files to check hashes only")
    set_threads(threads)
    with Progress() as shown:
        tell_threads(shown)
        with shown.stage(LOADING):
            from roundexport.verification.verify import verify as run
        report = run(
            package, against=against, artifact=artifact, text=text, num_samples=num_samples, sample_len=sample_len,
            max_kl=max_kl, min_top1=min_top1, min_cosine=min_cosine, precise=precise,
            properties=named_values(properties, "--property"), activations=activations, max_ram=max_ram, progress=shown,
        )  # fmt: skip
    if json:
        printing.document(report.to_json())
    else:
        printing.qualities({str(package): report})
    if report.failures:
        raise GateError("; ".join(report.failures))


@app.command()
@takes_settings
def convert(  # noqa: PLR0913, PLR0917
    model: str,
    out: Path,
    settings: TuneSettings,
    to: Annotated[
        str | None,
        typer.Option(help="Targets, comma-separated; default: onnx,openvino, less one that cannot take the model."),
    ] = None,
    text: HeldOut = None,
    max_kl: MaxKl = None,
    min_top1: MinTop1 = None,
    min_cosine: MinCosine = None,
    inputs_embeds: InputsEmbeds = False,
    kernels: Kernels = False,
    cluster: Cluster = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Tune, export to every target and verify: a model in, verified packages out."""
    set_threads(threads)
    with Progress() as shown:
        with shown.stage(LOADING):
            from roundexport.conversion.asked_targets import Asked
            from roundexport.conversion.convert import Conversion, convert_as
            from roundexport.conversion.settings import ConvertSettings
            from roundexport.conversion.vision_language import WholeConversion, convert_whole
            from roundexport.verification.gates import Gates
        wanted = ConvertSettings(
            Asked.of(to), text, Gates(max_kl, min_top1, min_cosine), inputs_embeds, kernels, cluster
        )
        done: Conversion | WholeConversion
        if settings.part == ALL:
            done = convert_whole(model, out, settings, wanted, shown)
        else:
            done = convert_as(model, out, settings, wanted, shown)
    if json:
        printing.document(done.to_json())
    else:
        printing.converted(done)
    printing.check_gates_held(done)


@app.command()
@takes(Choosing, Guessing)
def generate(  # noqa: PLR0913, PLR0917
    package: Path,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    choosing: Choosing,
    guessing: Guessing,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the package's chat template.")] = False,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture that the prompt is about; may be given several times.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Answers to write; only the first streams.")] = 1,
    beams: Annotated[
        int | None, typer.Option(help="Beams, of a package that translates; else what the model's files say.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities of the tokens and so many alternatives.")
    ] = None,
    engine: Engine = "auto",
    device: RuntimeDevice = "CPU",
    threads: Threads = None,
    properties: Properties = None,
    json: Json = False,
) -> None:
    """Write text from a package, streaming; needs neither torch nor transformers."""
    from roundexport.runtime.writing import drafter_for, load_decoder, write

    settings, told, guesser = choosing.settings(logprobs), named_values(properties, "--property"), guessing.told()
    if translates(package):
        translate(
            package, prompt, settings,
            beams=beams, engine=engine, device=device, threads=threads, properties=told, json=json,
        )  # fmt: skip
        return
    if beams is not None:
        raise UsageError(f"{package} is a decoder; --beams is for packages that answer a text with a text")
    alone = settings if n == 1 and guessing.draft is None and not guessing.lookup else None
    decoder = load_decoder(package, engine=engine, device=device, threads=threads, request=alone, properties=told)
    print(decoder.choice, file=sys.stderr)
    drafter = drafter_for(decoder, guessing.draft, guessing.lookup, device=device, threads=threads, properties=guesser)
    answers = write(
        decoder,
        prompt,
        settings,
        chat=chat,
        pictures=image or (),
        n=n,
        drafter=drafter,
        on_text=None if json else printing.piece,
    )
    if json:
        printing.document(asdict(answers[0]) if n == 1 else {"answers": [asdict(answer) for answer in answers]})
        return
    print()
    for number, answer in enumerate(answers[1:], 2):
        printing.line(f"--- {number} of {n}")
        printing.piece(answer.text + "\n")
    if drafter is not None and answers[0].counts is not None:
        print(gain(answers[0].counts), file=sys.stderr)


app.registered_commands.sort(key=lambda verb: _ORDER.index(verb.name or getattr(verb.callback, "__name__", "")))


if __name__ == "__main__":
    main()
