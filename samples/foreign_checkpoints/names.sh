#!/usr/bin/env bash
# The names by which models keep their folders, a line each: that of the folder, or of the GGUF file without its ending.
#   bash samples/foreign_checkpoints/names.sh MODEL…
# Two models of one name would take each other's results, and are refused.
set -euo pipefail
names=()
for model in "$@"; do
  name="$(basename "$model")"
  names+=("${name%.gguf}")
done
twice="$(printf '%s\n' "${names[@]}" | sort | uniq -d)"
if [ -n "$twice" ]; then
  echo "two models are called $twice; rename one, or give them to two runs with an OUT each" >&2
  exit 2
fi
printf '%s\n' "${names[@]}"
