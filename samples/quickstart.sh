#!/usr/bin/env bash
# From a fresh machine to a running 4-bit model in both formats, and what it cost and gained beside what you would get
# otherwise.  Usage: bash samples/quickstart.sh [OUT]      OUT is a folder to make; default: quickstart-out
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-quickstart-out}"
source samples/environment.sh "convert,compare"

if [ ! -e "$out/ours/quality.json" ]; then
  echo "== roundexport convert samples/model $out/ours --to onnx,openvino"
  roundexport convert samples/model "$out/ours" --to onnx,openvino --text samples/text/heldout.txt
fi
python samples/quickstart.py "$out"
