"""The run over families: what is tried and how, what becomes of a process that dies, what is kept."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from roundexport.environment import tree_commit as tree_commit_module
from roundexport.environment.tree_commit import tree_commit
from roundexport.errors import ArtifactError, UsageError
from roundexport.families import proving
from roundexport.families.configurations import chosen, families
from roundexport.families.row import Outcome, Row
from roundexport.families.table import Table, markdown

WORK = "families_work"
BOTH = ("onnx", "openvino")


def test_a_process_that_dies_is_a_row(tmp_path: Path) -> None:
    prover = proving.Prover(WORK, preloaded=(), longest=120)
    file = tmp_path / "table.json"
    table = proving.prove_all(chosen(["opt", "llama", "bloom"]), BOTH, prover, file, progress=False)
    rows = {row.family: row for row in table.rows}
    assert list(rows) == ["llama", "opt", "bloom"]  # in the order of the list
    assert rows["llama"].outcomes["onnx"].state == "right"
    assert rows["bloom"].reason == "its process died by SIGABRT: the last words"
    assert rows["opt"].reason == "its process died with exit code 7"
    assert Table.read(file) == table
    late = proving.Prover(WORK, preloaded=(), longest=0.5).prove(families()["gptj"], BOTH)
    stays = proving.Prover(WORK, preloaded=(), longest=120, leaving=0.2).prove(families()["mpt"], BOTH)
    assert stays.outcomes["onnx"].state == "right"
    assert late.reason == "it was ended after 0 s" and late.outcomes["onnx"].state == "failed"


def test_a_record_is_gone_on_with_by_the_same_versions_only(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    some = chosen(["llama", "qwen2"])
    assert proving.missing(some, BOTH, file) == some
    table = Table.here().with_row(Row("llama", "L", "generate", {"onnx": Outcome(1e-6)}), ["llama"])
    table.write(file)
    assert proving.missing(some, BOTH, file) == some
    assert proving.missing(some, ["onnx"], file) == some[1:]
    Table(table.machine, {**table.versions, "torch": "1"}, table.rows).write(file)
    with pytest.raises(UsageError, match="made with other versions"):
        proving.missing(some, BOTH, file)
    file.write_text("{}")
    with pytest.raises(ArtifactError, match="not a table of families"):
        Table.read(file)


def test_a_record_says_which_rows_are_of_another_machine_or_commit(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    here = Table.here()
    for row in (
        Row("llama", "L", "generate", {"onnx": Outcome(1e-6)}),
        Row("qwen2", "Q", "generate", {"onnx": Outcome(1e-6)}, 0.0, here.machine, "abc"),
        Row("opt", "O", "generate", {"onnx": Outcome(1e-6)}, 0.0, "a toaster", "def+"),
    ):
        here = here.with_row(row, list(families()))
    here.write(file)
    told = Table.read(file).rows_by_place
    assert told == "Rows: 1 at abc, 1 at def+ on a toaster, 1 before commits were kept"
    assert told in markdown(here) and not Table.here().rows_by_place
    made = proving.prove_all(chosen(["bert"]), BOTH, proving.Prover(WORK, preloaded=()), progress=False).rows[0]
    assert made.machine == here.machine and made.commit == tree_commit()


def test_the_page_tells_the_failures_of_its_own_rows() -> None:
    right = Table("a machine", {}, (Row("llama", "L", "generate", {"onnx": Outcome(1e-6)}),))
    assert "Failed." not in markdown(right)
    outcomes = {"onnx": Outcome(2.1e-4, where="beams"), "openvino": Outcome(failed="it died")}
    told = "**Failed.** mbart on onnx: off by 2.1e-04 in beams, where it may be by 1.0e-04; mbart on openvino: it died."
    assert told in markdown(Table("a machine", {}, (Row("mbart", "M", "translate", outcomes),)))


def test_what_was_lost_is_told() -> None:
    fused, spelled = Outcome(1e-6, attention=2, layers=2), Outcome(1e-6, attention=0, layers=2)
    assert spelled.lost_since(fused) == "0/2 of its attention layers run as one operator, where 2/2 did"
    assert not fused.lost_since(spelled) and not fused.lost_since(Outcome(refused="no"))
    assert Outcome(refused="no").lost_since(fused) == "no" and not Outcome(refused="no").lost_since(
        Outcome(refused="a")
    )
    assert Outcome(failed="KeyError").lost_since(Outcome(failed="KeyError")) == "KeyError"


def test_states_and_reasons() -> None:
    assert [Outcome(1e-5).state, Outcome(1e-3).state, Outcome(float("nan")).state] == ["right", "failed", "failed"]
    noisy = Outcome(3e-4, own=2e-4)
    assert noisy.state == "right" and noisy.noisy and not Outcome(3e-5, own=2e-4).noisy
    assert Outcome(3e-4, own=1e-4).state == "failed" and Outcome(9e-5, own=1e-6).state == "right"
    assert Outcome(refused="no").state == "refused" and Outcome(failed="KeyError").state == "failed"
    row = Row("a", "A", "", {"onnx": Outcome(refused="no"), "openvino": Outcome(refused="no")})
    assert row.reason == "no" and Row.from_json(json.loads(json.dumps(row.to_json()))) == row
    assert Row("a", "A", "", {"onnx": Outcome(refused="no"), "openvino": Outcome(1e-6)}).reason == "onnx: no"


def test_a_commit_is_of_the_tree_that_has_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "site-packages" / "tree_commit.py"
    copied.parent.mkdir()
    copied.write_text(Path(tree_commit_module.__file__).read_text())
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    for asked in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "c"]):
        subprocess.run([*git, *asked], check=True)
    monkeypatch.setattr(tree_commit_module, "__file__", str(copied))
    assert tree_commit() == ""
    subprocess.run(["git", "-C", str(tmp_path), "add", "-f", str(copied)], check=True)
    assert len(tree_commit()) == 11
