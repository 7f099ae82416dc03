#!/usr/bin/env bash
# Make an environment and pass the tests.  Usage: bash tests/run.sh [pytest arguments]
# The environment is .venv here, or the folder that ROUNDEXPORT_ENV names; it is made once and used again.
set -euo pipefail
cd "$(dirname "$0")/.."
source samples/environment.sh "convert,compare,dev"
# Three workers: on two cores the third computes while the others wait, for servers, browsers and processes they killed.
exec pytest -n "${ROUNDEXPORT_TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
