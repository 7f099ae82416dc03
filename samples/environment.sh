# Sourced by the scripts that need an environment: `source samples/environment.sh EXTRAS`.
# Makes .venv (or the folder that ROUNDEXPORT_ENV names) if it is not there, installs roundexport with the extras into it
# when they changed, and activates it.  To be sure of a CPU build of torch where the default index offers CUDA builds:
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
_env="${ROUNDEXPORT_ENV:-.venv}"
_python="${PYTHON:-python3}"
[ -x "$_env/bin/python" ] || "$_python" -m venv "$_env"
# shellcheck disable=SC1091
source "$_env/bin/activate"
_want="$1 $(sha256sum pyproject.toml | cut -d' ' -f1) $(pwd)"
if [ "$(cat "$_env/.roundexport" 2>/dev/null)" != "$_want" ]; then
  echo "installing roundexport[$1] into $_env" >&2
  pip install --quiet --disable-pip-version-check -e ".[$1]" >&2
  echo "$_want" > "$_env/.roundexport"
fi
