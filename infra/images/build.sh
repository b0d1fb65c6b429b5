#!/usr/bin/env bash
# Builds retort:latest and retort-light:latest (and each tagged with the commit) from what is committed.
# Arguments go to 'docker build', such as --build-arg BASE=... or --network=host.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! docker info >/dev/null 2>&1; then
  echo "images: no Docker engine answers; start one (DOCKER_HOST says where it listens)" >&2
  exit 1
fi
commit=$(git rev-parse --short=12 HEAD)
[ -z "$(git status --porcelain -- requirements.lock pyproject.toml components pipelines infra/images)" ] ||
  echo "images: uncommitted changes are not built" >&2
for kind in light full; do
  name=retort
  [ "$kind" = full ] || name=retort-$kind
  echo "images: building $name:$commit"
  git archive HEAD requirements.lock pyproject.toml components pipelines infra/images |
    docker build --file infra/images/Dockerfile --build-arg KIND="$kind" \
      --tag "$name:$commit" --tag "$name:latest" "$@" -
done
docker image ls --format '{{.Repository}}:{{.Tag}}  {{.Size}}' --filter reference='retort*:latest'
echo "images: push them, and give kubeflow.image and kubeflow.light_image by digest (NAME@sha256:...)"
