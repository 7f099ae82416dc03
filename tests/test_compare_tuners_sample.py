"""samples/compare_tuners: where a first sentence ends, how far an answer agrees, what table and plot make of rows."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sample_modules import SAMPLES, sample_modules

from conftest import ROOT

ROW = {
    "scheme": "4,64,sym", "label": "default", "tuner": "ours", "variant": "--recipe default", "version": "0",
    "bits_per_weight": 4.25, "kl": 0.05, "kl_se": 0.001, "top1": 0.86, "perplexity": 36.4, "cpu_s": 564.3,
    "peak_gib": 3.73,
}  # fmt: skip
LLAMA = {**ROW, "label": "llama Q4_0", "tuner": "llama", "variant": "Q4_0", "scheme": "4,32,sym", "kl": 0.16}
ASKED = {**ROW, "label": "rtn", "kl": 0.3, "chat_prompts": 50, "chat_sentences": 7, "chat_tokens": 0.213}


@pytest.fixture(scope="module")
def sample() -> Iterator[dict[str, ModuleType]]:
    with sample_modules(
        "compare_tuners", "evaluate", "chat", "cost", "rows", "plot", "side", "ours_side", "contestants", "calibrations"
    ) as found:
        yield found


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    earlier = {**ROW, "kl": 9.0}  # the last row of a label and scheme counts
    file.write_text("".join(json.dumps(row) + "\n" for row in (earlier, ROW, LLAMA, ASKED)))
    return file


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("The capital of France is Paris. It lies", "The capital of France is Paris."),
        ("It has 3.5 parts! Each", "It has 3.5 parts!"),
        ("1. Red\n2. Blue", "1. Red"),
        ("\n\nHello? Yes", "\n\nHello?"),
        ("It goes on", "It goes on"),
    ],
)
def test_first_sentence(sample: dict[str, ModuleType], answer: str, sentence: str) -> None:
    length = sample["chat"].sentence_length([answer[:count] for count in range(1, len(answer) + 1)])
    assert answer[:length] == sentence


def test_losses_on_answers_leave_prompts_out(sample: dict[str, ModuleType]) -> None:
    chat = sample["chat"]

    def says(shift: float) -> Callable[..., SimpleNamespace]:  # of two tokens the first, by how much with each token
        def model(input_ids: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.stack([shift * input_ids, torch.zeros(input_ids.shape)], -1))

        return model

    asked = [chat.Question([50, 1], [0, 1], 1), chat.Question([7], [1], 1)]
    kl, top1, loss = chat.losses_on(says(1.0), says(-1.0), asked)
    # After a token t the float model gives the first one σ(t), the other model σ(-t).
    wanted = [torch.tensor(t).mul(torch.tanh(torch.tensor(t) / 2)).item() for t in (1.0, 0.0, 7.0)]
    np.testing.assert_allclose(kl, [(wanted[0] + wanted[1]) / 2, wanted[2]], rtol=1e-5)
    assert top1.tolist() == [0.5, 0.0]
    np.testing.assert_allclose(loss, [(np.log1p(np.e) + np.log(2)) / 2, np.log1p(np.exp(-7))], rtol=1e-4)


def test_agreement_counts_up_to_the_first_other_token(sample: dict[str, ModuleType]) -> None:
    chat = sample["chat"]

    def model(input_ids: torch.Tensor) -> SimpleNamespace:  # says the next number, but 9 after 5
        said = torch.where(input_ids == 5, 9, input_ids + 1)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, 16).float())

    asked = [chat.Question([0, 1], [2, 3, 4], 3), chat.Question([3], [4, 5, 6, 7], 2), chat.Question([4], [5, 6, 7], 2)]
    found = chat.agreement(model, asked)
    assert found.same == (3, 2, 1)
    figures = found.to_json()
    assert figures["chat_sentences"] == 2 and figures["chat_first"]
    assert figures["chat_tokens"] == pytest.approx((1 + 2 / 4 + 1 / 3) / 3)
    assert found.text() == "2/3, 61 %"


def test_prompts_are_fifty(sample: dict[str, ModuleType]) -> None:
    lines = sample["chat"].PROMPTS.read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == 50 and lines[0] == "What is the capital of France?"


def test_a_process_does_not_count_the_memory_of_the_one_that_starts_it(sample: dict[str, ModuleType]) -> None:
    held = torch.ones(75_000_000)  # 300 MB, resident
    small = sample["cost"].measured([sys.executable, "-S", "-c", "sum(range(10**6))"], 1)
    assert small.peak_gib < 0.1 < held.nbytes / 2**30 and small.cpu_s > 0 and small.wall_s > 0
    large = sample["cost"].measured([sys.executable, "-S", "-c", "bytearray(b'1' * 200_000_000)"], 1)
    assert large.peak_gib > 0.18


def test_a_process_that_fails_says_what_it_printed(sample: dict[str, ModuleType]) -> None:
    with pytest.raises(sample["cost"].TunerError, match="no such scheme"):
        sample["cost"].measured([sys.executable, "-S", "-c", "raise SystemExit('no such scheme')"], 1)
    with pytest.raises(sample["cost"].TunerError, match="No such file"):
        sample["cost"].measured(["/nowhere/python"], 1)


def test_the_documents_table_and_plot_are_those_of_the_record(sample: dict[str, ModuleType]) -> None:
    record, docs = SAMPLES / "compare_tuners" / "record.jsonl", ROOT / "roundexport" / "docs"
    table = sample["rows"].markdown(record)
    assert table in (docs / "measurements.md").read_text(encoding="utf-8").split("\n\n"), (
        f"write what rows.py prints of record.jsonl into measurements.md:\n{table}"
    )
    plot = sample["plot"]
    rows = [row for schemes in sample["rows"].points(record).values() for row in schemes.values()]
    drawn = plot.standing_alone(plot.draw(plot.series(rows)))
    assert drawn == (docs / "kl-over-bits.svg").read_text(encoding="utf-8"), "draw it again: plot.py record.jsonl"


def test_the_record_says_where_every_row_is_from() -> None:
    lines = (SAMPLES / "compare_tuners" / "record.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    kept = [row for row in map(json.loads, lines) if row["version"] != "not kept"]
    newest = {(row["scheme"], row["label"], row.get("when")): row for row in map(json.loads, lines)}
    lost = {label for (_, label, when), row in newest.items() if row not in kept and when is None}
    assert lost <= {"rtn"}, "a figure of today without the code that it is of"
    for row in map(json.loads, lines):
        assert row["model"] and "/" not in row["model"], row
        assert (
            row["version"]
            and row["instruction_set"]
            and row["threads"]
            and {"torch", "transformers"} <= row["versions"].keys()
        ), row


def test_a_row_of_another_day_stays_beside_the_new_one(sample: dict[str, ModuleType], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ({**ROW, "when": "before", "kl": 0.06}, ROW)))
    _, _, *lines = sample["rows"].markdown(file).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| ours, `default` (before)", "| **ours, `default`**"]
    found = [row for schemes in sample["rows"].points(file).values() for row in schemes.values()]
    assert {one.name for one in sample["plot"].series(found)} == {"ours, default", "ours, default (before)"}


def test_table(sample: dict[str, ModuleType], rows: Path) -> None:
    _, _, *lines = sample["rows"].markdown(rows).splitlines()
    assert lines == [
        "| round-to-nearest | W4G64 sym | 4.25 | 0.3000 ± 0.0010 | 86.0 % | 36.40 | 7 of 50 | 21 % | 564 | 3.7 |",
        "| llama.cpp-python 0, Q4_0 | its own | 4.25 | 0.1600 ± 0.0010 | 86.0 % | 36.40 | – | – | 564 | 3.7 |",
        "| **ours, `default`** | W4G64 sym | 4.25 | 0.0500 ± 0.0010 | 86.0 % | 36.40 | – | – | 564 | 3.7 |",
    ]


def test_a_plan_of_bits_is_called_one(sample: dict[str, ModuleType]) -> None:
    planned = {**ROW, "variant": "--recipe light --target-bits 5.5 --choices 4,8", "scheme": "4,64,asym"}
    assert sample["rows"].scheme(planned) == "plan, asym"


def test_plot_is_a_file_of_its_own(sample: dict[str, ModuleType], rows: Path) -> None:
    plot = sample["plot"]
    found = [row for schemes in sample["rows"].points(rows).values() for row in schemes.values()]
    text = plot.standing_alone(plot.draw(plot.series(found)))
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert [name for name in ("round-to-nearest", "llama.cpp", "ours, default") if f">{name}</text>" not in text] == []
    tips = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "llama.cpp, Q4_0: 0.1600" in tips and len(tips) == 3


@pytest.mark.parametrize("stopped", ["before", "behind tune", "at the end"])
def test_a_comparison_of_texts_that_was_stopped_goes_on(
    stopped: str, sample: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sample["calibrations"]
    made: list[str] = []

    def tune(job: Any) -> Path:
        assert not (job.out / "artifact").exists(), "roundexport tune refuses a folder that is there"
        (job.out / "artifact").mkdir()
        made.append("tuned")
        return Path(job.out / "artifact")

    def answer(job: Any, *_: object) -> None:
        made.append("answered")
        (job.out / "report.json").touch()

    for name, stand_in in (("tune", tune), ("answer", answer)):
        monkeypatch.setattr(module, name, stand_in)
    for name in ("dequantized", "stored"):
        monkeypatch.setattr(module, name, lambda _: {})
    monkeypatch.setattr(module.Artifact, "open", lambda path: path)
    sources = module.Sources(SimpleNamespace(digest="0", location="m"), "--recipe rtn", tmp_path)
    folder = sources.tuned("self")
    (folder / "report.json").unlink()
    if stopped == "before":
        (folder / "artifact").rmdir()
    if stopped == "at the end":
        (folder / "report.json").touch()
    made.clear()
    assert sources.tuned("self") == folder
    assert made == {"before": ["tuned", "answered"], "behind tune": ["answered"], "at the end": []}[stopped]
