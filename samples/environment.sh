# Sourced by the scripts that need an environment: `source samples/environment.sh EXTRAS`.
# Makes .venv (or the folder that ROUNDEXPORT_ENV names) if it is not there, installs roundexport with the extras into it
# when they changed, and activates it; versions are those of .ci/constraints.txt, or of the file that
# ROUNDEXPORT_CONSTRAINTS names (/dev/null: the newest that pyproject.toml allows).  To be sure of a CPU build of torch
# where the default index offers CUDA builds:
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
_env="${ROUNDEXPORT_ENV:-.venv}"
_python="${PYTHON:-python3}"
[ -x "$_env/bin/python" ] || "$_python" -m venv "$_env"
# shellcheck disable=SC1091
source "$_env/bin/activate"
_have="$(cat "$_env/.roundexport" 2>/dev/null || true)"
_stamp="$(cat pyproject.toml .ci/constraints.txt | sha256sum | cut -d' ' -f1) $(pwd)"
_extras="$1"
[ "${_have#* }" = "$_stamp" ] && _extras="$(printf '%s' "${_have%% *},$1" | tr ',' '\n' | sort -u | paste -sd, -)"
if [ "$_have" != "$_extras $_stamp" ]; then
  echo "installing roundexport[$_extras] into $_env" >&2
  # --no-compile: Python compiles what is imported, once; pip would compile ten times as much, on one core.  That once
  # is here, in one process and whatever PYTHONDONTWRITEBYTECODE says: else every process of a first test run would
  # compile torch for itself, and every process for good where nothing may be written.
  pip install --quiet --disable-pip-version-check --no-compile -c "${ROUNDEXPORT_CONSTRAINTS:-.ci/constraints.txt}" -e ".[$_extras]" >&2
  env -u PYTHONDONTWRITEBYTECODE python - <<'END'
import contextlib
import importlib

for name in ("torch.onnx", "torch._dynamo", "onnxscript", "transformers.models.auto.modeling_auto",
             "transformers.models.llama.modeling_llama", "transformers.generation.utils", "openvino", "numba", "rich.live",
             "ray.serve", "uvicorn", "openai", "sentence_transformers"):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
END
  _sorted="$(printf '%s' "$_extras" | tr ',' '\n' | sort -u | paste -sd, -)"
  echo "$_sorted $_stamp" > "$_env/.roundexport"
fi
