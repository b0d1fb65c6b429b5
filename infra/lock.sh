#!/usr/bin/env bash
# Resolves requirements.lock anew from pyproject.toml: one lock for every Python that the project supports.
# Then checks that a wheel of each package exists for each of them, on both kinds of Linux machines: a package
# that had to be compiled would end the set-up of someone without a compiler. Called by 'make lock'; needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHONS=(3.11 3.12 3.13)                             # as pyproject.toml's requires-python, and infra/setup.sh
PLATFORMS=(x86_64-unknown-linux-gnu)                 # what the set-up is tried on
PURE=(antlr4-python3-runtime kfp-server-api)         # published as source only; pure Python

command -v uv >/dev/null || { echo "lock: uv is needed ('pip install uv')" >&2; exit 2; }
uv pip compile pyproject.toml --all-extras --universal --python-version "${PYTHONS[0]}" --generate-hashes \
  --quiet --output-file requirements.lock
# the tool that lists what is in an image has no part in the project
uv pip compile infra/images/sbom.in --universal --python-version "${PYTHONS[0]}" --generate-hashes \
  --quiet --output-file infra/images/sbom.lock

built=$(mktemp)
trap 'rm -f "$built"' EXIT
pattern=$(IFS='|'; echo "${PURE[*]}")
awk -v pure="^($pattern)==" '/^[a-z0-9]/ { left = $0 ~ pure } !left' requirements.lock >"$built"
for python in "${PYTHONS[@]}"; do
  for platform in "${PLATFORMS[@]}"; do
    uv pip compile "$built" --no-deps --only-binary :all: --python-version "$python" \
      --python-platform "$platform" --quiet --output-file /dev/null ||
      { echo "lock: no wheels for Python $python on $platform (see above)" >&2; exit 1; }
    echo "lock: every wheel exists for Python $python on $platform"
  done
done
