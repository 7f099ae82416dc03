"""`list families`: the table that ships, its page, and what goes with it."""

from __future__ import annotations

import json

from cli_tools import Run

from conftest import ROOT
from roundexport.families.configurations import families
from roundexport.families.table import markdown, proven


def test_the_shipped_table_is_of_the_list_and_the_page_is_made_of_it(run: Run) -> None:
    table = proven()
    assert {row.family for row in table.rows} == set(families())
    page = (ROOT / "roundexport" / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == markdown(table)
    code, out, _ = run("list", "families", "llama", "--json")
    assert code == 0 and [row["family"] for row in json.loads(out)["rows"]] == ["llama"]
    code, out, _ = run("list", "families")
    assert code == 0 and "families:" in out
    assert run("list", "families", "no_such_thing")[0] == 2
    assert run("list", "targets", "llama")[0] == 2
