#!/usr/bin/env bash
# Checkpoints that others' tools write of a model, imported and held against what those tools compute with:
#   bash samples/foreign_checkpoints/run.sh [MODEL] [OUT]
# Makes an environment for each tool below OUT/envs.  The last lines are a table; docs/importing.md shows it.
set -euo pipefail
cd "$(dirname "$0")/../.."
source samples/environment.sh convert
model="${1:-samples/model}" out="${2:-foreign_checkpoints}" here=samples/foreign_checkpoints
mkdir -p "$out/envs" "$out/made"

environment() { # NAME PACKAGES…: an environment of its own; prints its Python
  local folder="$out/envs/$1"
  shift
  [ -x "$folder/bin/python" ] || python3 -m venv "$folder"
  [ -f "$folder/done" ] || { "$folder/bin/pip" install --quiet torch==2.13.0 setuptools wheel >&2 &&
    "$folder/bin/pip" install --quiet --no-build-isolation torch==2.13.0 "$@" >&2 && touch "$folder/done"; }
  echo "$folder/bin/python"
}

auto_round="$(environment auto-round auto-round==0.16.1 compressed-tensors==0.19.0)"
gptqmodel="$(environment gptqmodel gptqmodel==7.6.0)"
"$auto_round" "$here/auto_round_side.py" "$model" "$out/made"
"$auto_round" "$here/owners.py" "$out"/made/auto_round-* "$out"/made/awq-* "$out"/made/ct-*
"$gptqmodel" "$here/owners.py" "$out"/made/gptq-*
python "$here/compare.py" "$out"/made/*/
