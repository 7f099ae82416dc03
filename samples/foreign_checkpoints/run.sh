#!/usr/bin/env bash
# Checkpoints that others' tools write of models, imported and held against what those tools compute with; and folders
# that roundexport writes in their formats, loaded by transformers with their packages:
#   bash samples/foreign_checkpoints/run.sh [MODEL[,MODEL…]] [OUT] [ENVS]
# MODEL is a folder (samples/model by default) or a GGUF file, which is read as a float model; several share the
# environments; OUT/<name of the model>/log.txt has the tables of each.
# Makes an environment for each tool below ENVS (OUT/envs), unless one is there that has the tool.  A tool that cannot be
# installed, and a case that it cannot make, is told and left out; cases that are there already are not made again.
# docs/importing.md and docs/exporting.md show the tables.  The exit code is 1 where a bit or a logit differs, or a
# folder is not read or loaded.
set -euo pipefail
cd "$(dirname "$0")/../.."
source samples/environment.sh convert
here="$PWD/samples/foreign_checkpoints" text="$PWD/samples/text/calibration.txt"
all="$(realpath -m "${2:-foreign_checkpoints}")"
envs="$(realpath -m "${3:-$all/envs}")"
IFS=, read -ra models <<<"${1:-samples/model}"
for at in "${!models[@]}"; do models[at]="$(realpath "${models[at]}")"; done
called="$(bash "$here/names.sh" "${models[@]}")"
mapfile -t names <<<"$called"
mkdir -p "$envs"
export OLIVE_DISABLE_TELEMETRY=1 # it would tell its makers what it is used for

python_with() { # NAME MODULE PACKAGES…: the Python of an environment that has the module; made where it is not there
  local folder="$envs/$1" module="$2"
  shift 2
  if ! "$folder/bin/python" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$module'))" 2>/dev/null; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.13.0 setuptools wheel >&2
    "$folder/bin/pip" install --quiet --no-build-isolation torch==2.13.0 "$@" >&2
  fi
  echo "$folder/bin/python"
}

tried() { # COMMAND…: runs it; what a tool cannot make is told and the rest goes on
  "$@" || echo "FAILED: $*" >&2
}

wrong=0
proven() { # PYTHON SCRIPT FOLDER…: runs it and keeps what it prints; what fails is told, the rest goes on, and this
  # script fails in the end
  if [ $# = 2 ] || "$@" | tee -a "$log"; then return; fi # no folders: the tool is not here
  wrong=1
  echo "FAILED: $*" >&2
}

auto_round="$(python_with auto-round auto_round auto-round==0.16.1 compressed-tensors==0.19.0 || true)"
gptqmodel="$(python_with gptqmodel gptqmodel gptqmodel==7.6.0 optimum==2.3.0 || true)"
llmcompressor="$(python_with llmc llmcompressor llmcompressor==0.14.0.1 || true)"
olive="$(python_with olive olive olive-ai==0.13.0 transformers==5.23.0 requests || true)"
autoawq="$(python_with awq awq autoawq==0.2.9 transformers==4.51.3 || true)"
llama="$(python_with llama llama_cpp llama-cpp-python==0.3.36 gguf==0.19.0 safetensors || true)"

of_model() { # MODEL OUT: everything of one model
  local model="$1" out="$2" file="$1"
  log="$out/log.txt"
  : >"$log"
  if [ -f "$file" ]; then # roundexport keeps the floats that it reads of a GGUF file as a folder
    model="$(python -c "from roundexport.model.checkpoint import Checkpoint; print(Checkpoint.open('$file').folder)")"
  else # one in eight bits, which llama.cpp turns into floats
    file="$out/float/model.gguf"
    if [ ! -f "$file" ]; then
      roundexport tune "$model" "$out/eight" --algorithm rtn --bits 8 --group-size 32
      roundexport export "$out/eight" "$out/float" --to gguf
    fi
  fi
  cd "$out" # tools write logs where they are started
  tried "$auto_round" "$here/auto_round_side.py" "$model" "$text" "$out/made"
  tried "$gptqmodel" "$here/gptqmodel_side.py" "$model" "$text" "$out/made"
  tried "$llmcompressor" "$here/llmcompressor_side.py" "$model" "$out/made"
  tried "$olive" "$here/olive_side.py" "$model" "$out/made"
  tried "$autoawq" "$here/autoawq_side.py" "$model" "$text" "$out/made"
  tried "$llama" "$here/gguf_side.py" "$file" "$out/made"

  proven "$auto_round" "$here/owners.py" "$out"/made/auto_round-* "$out"/made/awq-by-auto_round-* "$out"/made/ct-*
  proven "$olive" "$here/owners.py" "$out"/made/olive-*
  proven "$autoawq" "$here/owners.py" "$out"/made/awq-by-autoawq-*
  proven "$gptqmodel" "$here/owners.py" "$out"/made/gptq-*
  proven python "$here/compare.py" "$out"/made/*/

  proven python "$here/going_out.py" "$model" "$out/out"
  proven "$auto_round" "$here/loaded.py" "$out"/out/auto_round-*
  proven "$llmcompressor" "$here/loaded.py" "$out"/out/compressed-tensors-*
  proven "$gptqmodel" "$here/loaded.py" "$out"/out/gptq-* "$out"/out/awq-*
  proven "$llama" "$here/asked.py" "$out/out/gguf-w4g32-sym/model.gguf" "$model/tokenizer.json" "What is the capital of France?"
}

shopt -s nullglob
for at in "${!models[@]}"; do
  model="${models[at]}" name="${names[at]}"
  mkdir -p "$all/$name/made" "$all/$name/out"
  of_model "$model" "$all/$name"
done
exit "$wrong"
