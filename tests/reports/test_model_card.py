"""Model cards: front matter that YAML reads, the report's figures, a license only where somebody states it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_toys import DECODER_QUALITY, Toy

from roundexport.errors import UsageError
from roundexport.formats.package import read_package, write_manifest
from roundexport.formats.verification_record import read_record
from roundexport.reports.provenance import front_matter
from roundexport.reports.writing import CARD, card_after_conversion, write_cards


def front(package: Path) -> dict[str, Any]:
    start, matter, _ = (package / CARD).read_text(encoding="utf-8").split("---\n", 2)
    assert start == ""
    found = yaml.safe_load(matter)
    assert isinstance(found, dict)
    return found


def gguf(path: Path, **values: str) -> Path:
    """A GGUF file with a header and nothing else."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    pairs = b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in values.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + pairs)
    return path


def test_the_card_has_front_matter_and_figures_and_is_no_part_of_the_package(toy: Toy) -> None:
    package = toy.package(artifact=toy.artifact(), quality=DECODER_QUALITY)
    before = (package / "roundexport.json").read_bytes()
    assert write_cards([package]) == [package / CARD]
    assert front(package) == {
        "library_name": "onnx",
        "pipeline_tag": "text-generation",
        "quantized_by": "roundexport",
        "tags": ["roundexport", "onnx", "quantized", "int4"],
    }
    text = (package / CARD).read_text(encoding="utf-8")
    for figure in ("0.01234 ± 0.00050", "93.12 ± 0.40 %", "4.5 bits per", "0.25", "does not state its license"):
        assert figure in text, figure
    assert "onnxruntime-genai opens the folder" in text
    assert (package / "roundexport.json").read_bytes() == before
    assert CARD not in read_package(package).files and read_record(package) is not None


def test_the_card_names_the_bits_of_token_embedding_and_lm_head(toy: Toy) -> None:
    package = toy.package(artifact=toy.artifact())
    manifest = read_package(package)
    assert "outside the blocks" not in story_of(package)
    table = {**next(iter(manifest.layers.values())), "bits": 8}
    write_manifest(package, replace(manifest, layers={**manifest.layers, "model.embed_tokens": table}))
    assert "outside the blocks | model.embed\\_tokens int8 g32 sym" in story_of(package)


def story_of(package: Path) -> str:
    write_cards([package])
    return (package / CARD).read_text(encoding="utf-8")


def test_the_card_tells_how_a_picture_was_answered(toy: Toy) -> None:
    package = toy.package()
    manifest = read_package(package)
    for found, told in (
        ({"difference": 1.234e-5, "tokens": 31, "why": ""}, "logits within 1.2e-05 standard deviations"),
        ({"difference": None, "tokens": 31, "why": "it takes 9.0 GiB"}, "not compared with the whole model: it takes"),
    ):
        write_manifest(package, replace(manifest, settings={**manifest.settings, "sight": found}))
        write_cards([package])
        assert told in (package / CARD).read_text(encoding="utf-8")


SAID = [
    (
        "---\nlicense: mit\nbase_model: a/b\nlanguage:\n- en\n- de\n---\nText",
        {"license": "mit", "base_model": "a/b", "language": ["en", "de"]},
    ),
    (
        '---\nlicense: "other"\nlicense_name: my-license  # own\nbase_model: [a/b, c/d]\n---\n',
        {"license": "other", "license_name": "my-license", "base_model": "a/b"},
    ),
    ("---\nbase_model: ./local/folder\nmodel-index:\n- name: x\n  license: no\n---\n", {}),
    ("---\nlicense: mit\nnever closed", {}),
    ("license: mit", {}),
    ("", {}),
]


@pytest.mark.parametrize(("readme", "known"), SAID)
def test_license_and_base_model_are_what_the_source_says(
    toy: Toy, tmp_path: Path, readme: str, known: dict[str, Any]
) -> None:
    source = tmp_path / "my-model"
    source.mkdir()
    (source / "README.md").write_text(readme)
    toy.location = str(source)
    package = toy.package()
    write_cards([package])
    found = front(package)
    assert {key: found[key] for key in found.keys() - {"library_name", "pipeline_tag", "quantized_by", "tags"}} == known
    assert str(tmp_path) not in (package / CARD).read_text() and "my-model" in (package / CARD).read_text()


def test_a_hub_id_is_the_base_model(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    toy.location = "owner/name"
    package = toy.package()
    write_cards([package])
    assert (front(package)["base_model"], front(package)["base_model_relation"]) == ("owner/name", "quantized")
    assert "license" not in front(package)
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: who/else\n---\n")
    write_cards([package])
    assert front(package)["license"] == "apache-2.0" and front(package)["base_model"] == "owner/name"


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({"general.license": "Apache-2.0"}, {"license": "apache-2.0"}),
        ({"general.base_model.0.repo_url": "https://huggingface.co/a/b"}, {"base_model": "a/b"}),
        ({"general.name": "Some Model"}, {}),
    ],
)
def test_a_gguf_file_says_its_license(toy: Toy, tmp_path: Path, values: dict[str, str], known: dict[str, str]) -> None:
    toy.location = str(gguf(tmp_path / "m.gguf", **values))
    package = toy.package()
    write_cards([package])
    assert {key: front(package)[key] for key in ("license", "base_model") if key in front(package)} == known


def test_what_is_known_stays_known_when_the_source_is_gone(toy: Toy, tmp_path: Path) -> None:
    source = gguf(tmp_path / "m.gguf", **{"general.license": "mit"})
    toy.location = str(source)
    package = toy.package()
    write_cards([package])
    source.unlink()
    write_cards([package])
    assert front(package)["license"] == "mit"


@pytest.mark.parametrize("change", ["mine", "{card}\nmore", "changed {card}", "\udcff"])
def test_somebodys_own_card_is_left_alone(toy: Toy, change: str) -> None:
    package = toy.package()
    write_cards([package])
    data = change.format(card=(package / CARD).read_text()).encode(errors="surrogateescape")
    (package / CARD).write_bytes(data)
    with pytest.raises(UsageError, match="written or changed by somebody"):
        write_cards([package])
    assert "README.md" in str(card_after_conversion(package))
    assert (package / CARD).read_bytes() == data


def test_a_card_of_ours_is_renewed(toy: Toy) -> None:
    package = toy.package()
    assert card_after_conversion(package) is None
    assert "Not measured" in (package / CARD).read_text()
    other = toy.package("b", quality=DECODER_QUALITY)
    (package / "verification.json").write_bytes((other / "verification.json").read_bytes())
    assert card_after_conversion(package) is None
    assert "0.01234" in (package / CARD).read_text()


def test_words_of_strangers_are_no_markup(toy: Toy, tmp_path: Path) -> None:
    toy.location = str(gguf(tmp_path / "a|b`[x](y) <b>.gguf", **{"general.license": 'x"\ny: [1'}))
    package = toy.package()
    write_cards([package])
    assert front(package)["license"] == 'x"\ny: [1'
    body = (package / CARD).read_text()
    assert "<b>" not in body and r"a\|b\`\[x\]" in body


def test_front_matter_of_nothing_but_scalars_and_lists() -> None:
    assert front_matter("---\na: 1\nb:\n- x\n- 'y z'\nc: null\nd: >\n  folded\n---\n") == {
        "a": ("1",), "b": ("x", "y z"), "c": (), "d": (),
    }  # fmt: skip


def test_timings_are_told(toy: Toy) -> None:
    package = toy.package()
    write_cards([package], bench=[toy.bench(("onnx", 50.0))])
    text = (package / CARD).read_text()
    assert "| ort | 64 tokens in, 32 out | 12 | 50 |" in text and "A Processor" in text
    assert json.loads((package / "roundexport.json").read_text())["files"].keys() == {"model.onnx", "genai_config.json"}
