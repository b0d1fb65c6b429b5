#!/bin/sh
# Whether the step in this container can go on: its main process is neither stopped nor dead, and the folders that
# it writes into take a file (a full disk, or a volume that went away, do not).
set -eu
state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' /proc/1/status)
case "$state" in
  T | t | Z | X) echo "process 1 is in state $state" >&2; exit 1 ;;
esac
for folder in "$HOME" "${TMPDIR:-/tmp}"; do
  file=$(mktemp "$folder/.healthy-XXXXXX") || exit 1
  head -c 65536 /dev/zero >"$file" || { rm -f "$file"; echo "$folder takes no file" >&2; exit 1; }
  rm -f "$file"
done
