#!/usr/bin/env bash
# Builds .venv from requirements.lock when it is missing or the lock has changed; says that it is moving.
# Called by the Makefile before every other word. Needs Python 3.11, 3.12 or 3.13 with venv,
# and a package index.
set -euo pipefail
cd "$(dirname "$0")/.."

# the lock decides about the environment, pyproject.toml about the project's own commands
lock_sum=$(sha256sum <requirements.lock)
project_sum=$(sha256sum <pyproject.toml)
same() { [ "$(cat ".venv/$1.sha256" 2>/dev/null)" = "$2" ]; }

install_project() {
  .venv/bin/pip install --quiet --no-deps --no-build-isolation --editable . >>.venv/install.log 2>&1 || {
    echo "set-up: installing the project itself failed; see .venv/install.log" >&2
    exit 1
  }
  echo "$project_sum" >.venv/project.sha256
}

if same lock "$lock_sum"; then
  same project "$project_sum" || install_project
  exit 0
fi

python=""
said="no python3 here is one"
candidates=(python3.11 python3.12 python3.13 python3)
[ -z "${PYTHON:-}" ] || { candidates=("$PYTHON"); said="$PYTHON is none"; }
for candidate in "${candidates[@]}"; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    # the interpreter itself: 'make' has .venv on its path, and .venv is removed below
    python=$("$candidate" -c 'import os, sys; print(os.path.realpath(sys.executable))')
    break
  fi
done
if [ -z "$python" ]; then
  echo "set-up: Python 3.11, 3.12 or 3.13 is needed ($said); name it with PYTHON=..." >&2
  exit 2
fi

packages=$(grep -c '^[a-zA-Z0-9]' requirements.lock)
echo "set-up: installing $packages packages into .venv (about 4 minutes and 8 GB, only when the lock changes)"
rm -rf .venv
"$python" -m venv .venv
log=.venv/install.log
.venv/bin/pip install --no-deps --require-hashes -r requirements.lock >"$log" 2>&1 &
pip=$!
trap 'kill "$pip" 2>/dev/null || true' INT TERM
seconds=0
while kill -0 "$pip" 2>/dev/null; do
  sleep 1
  seconds=$((seconds + 1))
  if [ $((seconds % 10)) = 0 ]; then
    collected=$(grep -c '^Collecting' "$log" || true)
    if grep -q '^Installing collected' "$log"; then
      echo "  unpacking: $(du -sh .venv | cut -f1), $seconds s"
    else
      echo "  downloading: $((100 * collected / packages))% ($collected/$packages, $seconds s)"
    fi
  fi
done
if ! wait "$pip"; then
  echo "set-up: pip failed; the last lines of $log:" >&2
  grep -v 'is ignored' "$log" | tail -n 5 >&2
  exit 1
fi
install_project
echo "$lock_sum" >.venv/lock.sha256
echo "set-up: done in $seconds s"
