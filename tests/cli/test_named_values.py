"""An option that is repeated with NAME=VALUE."""

from __future__ import annotations

import pytest

from roundexport.cli.shared_options import named_values
from roundexport.errors import UsageError


def test_names_and_values() -> None:
    assert named_values(["A=1", "B=x=y"], "--property") == {"A": "1", "B": "x=y"}
    assert named_values(None, "--property") == {}


@pytest.mark.parametrize(("given", "says"), [
    (["A"], "takes NAME=VALUE, not 'A'"), (["=1"], "not '=1'"), (["A="], "not 'A='"), (["A=1", "A=2"], "twice"),
])  # fmt: skip
def test_what_is_no_pair_is_refused(given: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        named_values(given, "--property")
