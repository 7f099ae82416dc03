"""A server against its own description: schemathesis makes requests from /openapi.json and checks every answer.

    pip install schemathesis
    python samples/serve_schema.py PACKAGE [--examples 30] [--seed 1]

Every body names the model that is served (or none): with a name by chance nearly all would be answered by 404, and what
lies behind (sounds, tools, grammars) would not be reached.

Bodies that the schema allows and bodies that it does not, methods that are not there, missing and odd headers; checked
are statuses, content types and bodies against the description, that nothing is a 5xx, and that what is refused is
refused.  400, 404 and 429 count as proper answers to bodies that the schema allows: some limits (a context that is too
long, a model that is not here, a grammar that cannot be) do not fit into a schema.  ``st``, its command, must be on the
PATH; it may live in an environment of its own.  Exit code 1 where something is found.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

from roundexport.runtime.benchmarking.server_process import ServerProcess

NAME = "checked"
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404, 429]

[generation]
database = "none"
"""


def named(value: Any) -> Any:
    """A part of the document, in which every body's ``model`` is the one that is served."""
    if isinstance(value, list):
        return [named(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: named(one) for key, one in value.items()}
    if isinstance(found.get("properties"), dict) and "model" in found["properties"]:
        optional = found["properties"]["model"] != {"type": "string"}
        found["properties"]["model"] = {"enum": [NAME, None] if optional else [NAME]}
    return found


def main() -> None:
    """Start a server, let schemathesis loose on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--examples", type=int, default=30, help="per path and phase")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    tester = shutil.which("st")
    if tester is None:
        sys.exit("schemathesis is not on the PATH: pip install schemathesis")
    # Short answers: what is tested is what is said, not how much.
    with ServerProcess([f"{NAME}={given.package}"], "--max-tokens", "16") as server, TemporaryDirectory() as work:
        config = Path(work) / "schemathesis.toml"
        config.write_text(CONFIG)
        document = Path(work) / "openapi.json"
        with urlopen(f"{server.url}/openapi.json") as found:
            document.write_text(json.dumps(named(json.load(found))))
        command = [tester, "--config-file", str(config), "run", str(document), "--url", server.url, "--no-color"]
        command += ["--max-examples", str(given.examples), "--seed", str(given.seed), "--request-timeout", "60"]
        code = subprocess.run(command, check=False, cwd=work).returncode
    sys.exit(code)


if __name__ == "__main__":
    main()
