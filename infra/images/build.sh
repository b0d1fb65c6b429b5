#!/usr/bin/env bash
# Builds retort and retort-data, tagged with version and commit, from what is committed; leaves beside them, in
# outputs/images, what each contains (CycloneDX). Arguments go to 'docker build': --build-arg BASE=..., --network=host.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! docker info >/dev/null 2>&1; then
  echo "images: no Docker engine answers; start one (DOCKER_HOST says where it listens)" >&2
  exit 1
fi
commit=$(git rev-parse HEAD)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
tag=$version-${commit:0:12}
[ -z "$(git status --porcelain -- requirements.lock pyproject.toml components pipelines infra/images)" ] ||
  echo "images: uncommitted changes are not built" >&2
mkdir -p outputs/images
for target in data train; do
  name=retort-data
  [ "$target" = data ] || name=retort
  echo "images: building $name:$tag"
  git archive "$commit" requirements.lock pyproject.toml components pipelines infra/images |
    docker build --file infra/images/Dockerfile --target "$target" --build-arg VERSION="$version" \
      --build-arg COMMIT="$commit" --build-arg CREATED="$(git show --no-patch --format=%cI "$commit")" \
      --tag "$name:$tag" --tag "$name:latest" "$@" -
  docker run --rm --network none --entrypoint cat "$name:$tag" /opt/retort/sbom.cdx.json \
    >"outputs/images/$name-$tag.cdx.json"
done
for name in retort-data retort; do
  bytes=$(docker image inspect --format '{{.Size}}' "$name:$tag")
  echo "images: $name:$tag  $((bytes / 1000000)) MB  outputs/images/$name-$tag.cdx.json"
done
echo "images: push them, and give kubeflow.image and kubeflow.light_image by digest (NAME@sha256:...)"
