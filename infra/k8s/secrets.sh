#!/usr/bin/env bash
# Prints the secrets that the manifests name, with new random keys; keeps them nowhere. Once for a namespace:
#   infra/k8s/secrets.sh | kubectl --namespace NAMESPACE create --filename -
# 'create' stops where one exists. A second set would shut the servers out of what they hold already.
set -euo pipefail

word() { openssl rand -hex "$1"; }

secret() { # NAME, then lines 'key: value' on the standard input
  printf -- '---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\n' "$1"
  printf '  labels:\n    app.kubernetes.io/part-of: retort\ntype: Opaque\nstringData:\n'
  sed 's/^/  /'
}

identity() { # NAME, ACCESS KEY, SECRET KEY, then its actions: a user of the store
  local name=$1 access=$2 key=$3 actions
  shift 3
  actions=$(printf '"%s", ' "$@")
  printf '{"name": "%s", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": [%s]}' \
    "$name" "$access" "$key" "${actions%, }"
}

all() { # BUCKET...: everything but making and removing the bucket itself
  printf '%s\n' "${@/#/Read:}" "${@/#/Write:}" "${@/#/List:}" "${@/#/Tagging:}"
}

declare -A access key
for user in admin mlflow dvc pipeline; do
  access[$user]=$(word 10) key[$user]=$(word 20)
done
who() { printf '%s %s %s' "$1" "${access[$1]}" "${key[$1]}"; }

secret retort-database <<<"password: \"$(word 24)\""
secret retort-mlflow <<END
admin-password: "$(word 16)"
flask-key: "$(word 32)"
END
secret retort-tracker <<END
MLFLOW_TRACKING_USERNAME: pipeline
MLFLOW_TRACKING_PASSWORD: "$(word 16)"
END
# shellcheck disable=SC2046  # words are split on purpose
secret retort-store <<END
AWS_ACCESS_KEY_ID: "${access[admin]}"
AWS_SECRET_ACCESS_KEY: "${key[admin]}"
s3.json: |
  {"identities": [
    $(identity $(who admin) Admin Read Write List Tagging),
    $(identity $(who mlflow) $(all mlflow)),
    $(identity $(who dvc) $(all dvc data)),
    $(identity $(who pipeline) $(all pipeline) Read:data List:data)
  ]}
END
for user in mlflow dvc pipeline; do
  secret "retort-store-$user" <<END
AWS_ACCESS_KEY_ID: "${access[$user]}"
AWS_SECRET_ACCESS_KEY: "${key[$user]}"
END
done
