#!/usr/bin/env bash
# Graphs of other people's exporters with this project's integers in them:
#   bash samples/foreign_graphs.sh [MODEL] [OUT] [EXPORTER…]
# Makes an environment for each kind of exporter below OUT/envs, lets every exporter write a float graph of MODEL, tunes
# MODEL by rtn and rewrites every graph.  The last lines are a table.
set -euo pipefail
cd "$(dirname "$0")/.."
source samples/environment.sh convert
model="${1:-samples/model}" out="${2:-foreign}"
shift $(($# > 2 ? 2 : $#))
[ $# -gt 0 ] || set -- torch-dynamo torch-legacy openvino transformers-onnx transformers-onnx-decode \
  transformers-openvino optimum-onnx optimum-intel
own="$(command -v python)"
mkdir -p "$out/envs"

environment() { # NAME PACKAGES…: an environment of its own; prints its Python
  local name="$1" folder="$out/envs/$1"
  shift
  [ -x "$folder/bin/python" ] || python3 -m venv "$folder"
  # A torch without CUDA, which would bring gigabytes; optimum-onnx and optimum-intel want another transformers each.
  [ -f "$folder/done" ] ||
    { "$folder/bin/pip" install --quiet --no-compile "$@" "$(grep ^torch= .ci/constraints.txt)" >&2 && touch "$folder/done"; }
  echo "$folder/bin/python"
}

graphs=()
for exporter in "$@"; do
  case "$exporter" in
    optimum-onnx) python="$(environment optimum-onnx 'optimum-onnx[onnxruntime]')" ;;
    optimum-intel)
      python="$(environment optimum-intel 'optimum-intel[openvino]')"
      # A torchvision for CUDA comes with it, which no CPU build of torch can load.
      "$(dirname "$python")/pip" uninstall --quiet --yes torchvision >&2
      ;;
    *) python="$own" ;;
  esac
  [ -d "$out/$exporter" ] || "$python" samples/foreign_graphs.py make "$exporter" "$model" "$out/$exporter" ||
    { echo "$exporter could not export the model" >&2; rm -rf "${out:?}/$exporter"; continue; }
  for graph in "$out/$exporter"/*.onnx "$out/$exporter"/openvino_*.xml; do
    [ -f "$graph" ] && [[ $graph != *tokenizer.xml ]] && graphs+=("$graph")
  done
done
python samples/foreign_graphs.py try "$model" "$out/rewritten" "${graphs[@]}"
