"""The HTML report: it parses, needs nothing from elsewhere, holds the figures, and says what was not recorded."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_toys import DECODER_QUALITY, ENCODER_QUALITY, Toy, report
from typer.testing import CliRunner

from roundexport.cli.app import app
from roundexport.errors import ArtifactError, UsageError
from roundexport.reports.writing import write_report

VOID = {"meta", "br", "hr", "img", "link", "input", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """A page's words; it fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "srcset", "xlink:href", "onload", "onclick"}
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<script|//[a-z]", text)
    return Page(text)


def test_the_page_parses_stands_alone_and_holds_the_figures(toy: Toy, tmp_path: Path) -> None:
    digest = toy.artifact()
    packages = [
        toy.package(artifact=digest, quality=DECODER_QUALITY),
        toy.package("other", bits=8, quality={**DECODER_QUALITY, "kl": {"mean": 0.002, "stderr": 0.0001}}, size=9000),
    ]
    bench = toy.bench(("onnx", 50.0), ("/somewhere/other", 25.0), ("torch", 10.0))
    out = tmp_path / "report.html"
    assert write_report(packages, out, bench=[bench]) == out.stat().st_size
    page = page_of(out)
    for figure in ("0.01234 ± 0.00050", "93.1 %", "0.0871", "21.50", "48, 3", "bundled text", "4.5", "50 tokens/s"):
        assert figure in page.text, figure
    assert "gram: sweeps 6, damping 0.3" in page.text and "128 samples of 512 tokens" in page.text
    assert "×0.25" in page.text and "A Processor" in page.text and "torch" in page.text
    assert "/somewhere" not in page.text
    assert page.tags.count("svg") > 8
    first = out.read_bytes()
    write_report(packages, out, bench=[bench])
    assert out.read_bytes() == first


def test_an_encoder_has_its_own_figures(toy: Toy, tmp_path: Path) -> None:
    write_report([toy.package(task="embed", quality=ENCODER_QUALITY)], tmp_path / "r.html")
    text = page_of(tmp_path / "r.html").text
    assert "0.99870 ± 0.00010" in text and "0.9977" in text and "93.8 %" in text and "nats" not in text


def test_a_package_without_records_gets_a_page_that_names_the_commands(toy: Toy, tmp_path: Path) -> None:
    write_report([toy.package()], tmp_path / "r.html")
    text = page_of(tmp_path / "r.html").text
    assert "roundexport verify onnx --against m" in text
    assert "roundexport bench onnx --json > bench.json" in text
    assert "--artifact ARTIFACT" in text
    assert "8 bits" not in text and "4 bits ×6, float ×1" in text


@pytest.mark.parametrize(
    ("algorithm", "says"), [("gram", "before they were recorded"), ("rtn", "rtn does not measure")]
)
def test_errors_that_were_not_recorded_are_named(toy: Toy, tmp_path: Path, algorithm: str, says: str) -> None:
    package = toy.package(artifact=toy.artifact(losses=False, algorithm=algorithm), quality=DECODER_QUALITY)
    write_report([package], tmp_path / "r.html")
    assert says in page_of(tmp_path / "r.html").text


def test_what_convert_left_beside_an_old_package_is_read(toy: Toy, tmp_path: Path) -> None:
    package = toy.package()
    old = {key: value for key, value in DECODER_QUALITY.items() if key != "kl_histogram"}
    kept = {"packages": {"onnx": "/elsewhere/onnx"}, "quality": {"onnx": report(old)}}
    (toy.folder / "quality.json").write_text(json.dumps(kept))
    write_report([package], tmp_path / "r.html")
    text = page_of(tmp_path / "r.html").text
    assert "0.01234 ± 0.00050" in text and "how KL is distributed over tokens" in text
    kept["packages"]["onnx"] = "/elsewhere/another"
    (toy.folder / "quality.json").write_text(json.dumps(kept))
    write_report([package], tmp_path / "r.html")
    assert "0.01234" not in page_of(tmp_path / "r.html").text


def test_words_of_strangers_are_words(toy: Toy, tmp_path: Path) -> None:
    toy.location = '<script>alert("m")</script>'
    hostile = {"windows": "many", "kl": {"mean": "<b>0</b>"}, "kl_p99": True, "first_divergence": {"a": 1},
               "kl_histogram": {"edges": [1, 0], "counts": [1]}}  # fmt: skip
    package = toy.package(quality=hostile, failures=("<img src=x>",))
    write_report([package], tmp_path / "r.html")
    page = page_of(tmp_path / "r.html")
    assert "img" not in page.tags and "script" not in page.tags and "b" not in page.tags
    assert "Gate failed, onnx: <img src=x>" in page.text


def test_a_gate_that_failed_is_said(toy: Toy, tmp_path: Path) -> None:
    write_report([toy.package(quality=DECODER_QUALITY, failures=("mean KL 0.012 is above 0.01",))], tmp_path / "r.html")
    assert "mean KL 0.012 is above 0.01" in page_of(tmp_path / "r.html").text


@pytest.mark.parametrize("text", [None, "", "[]", '{"rows": 1}', "[" * 100_000])
def test_a_benchmark_that_is_none_is_refused_with_the_command(toy: Toy, tmp_path: Path, text: str | None) -> None:
    bench = tmp_path / "b.json"
    if text is not None:
        bench.write_text(text)
    with pytest.raises(UsageError, match="roundexport bench PACKAGE --json"):
        write_report([toy.package()], tmp_path / "r.html", bench=[bench])


def test_what_is_no_report_is_not_overwritten(toy: Toy, tmp_path: Path) -> None:
    package, out = toy.package(), tmp_path / "r.html"
    out.write_text("my own page")
    with pytest.raises(UsageError, match="not a report"):
        write_report([package], out)
    assert out.read_text() == "my own page"
    with pytest.raises(UsageError, match="is a folder"):
        write_report([package], tmp_path)
    with pytest.raises(UsageError, match="at least one"):
        write_report([], out)
    with pytest.raises(UsageError, match="twice"):
        write_report([package, package], tmp_path / "s.html")
    with pytest.raises(ArtifactError, match="not a package"):
        write_report([tmp_path / "nothing"], tmp_path / "s.html")


def test_an_artifact_given_must_be_the_packages(toy: Toy, tmp_path: Path) -> None:
    digest = toy.artifact(name="elsewhere/deep")
    package = toy.package(artifact=digest, quality=DECODER_QUALITY)
    write_report([package], tmp_path / "r.html", artifacts=[toy.folder / "elsewhere/deep"])
    assert "4.5" in page_of(tmp_path / "r.html").text
    toy.artifact(bits=8, name="elsewhere/deep")
    with pytest.raises(UsageError, match="none of the packages was made from it"):
        write_report([package], tmp_path / "r.html", artifacts=[toy.folder / "elsewhere/deep"])


def test_the_verb_writes_and_tells_the_size(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    done = CliRunner().invoke(app, ["report", str(toy.package()), "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == [{"file": str(out), "bytes": out.stat().st_size}]
