#!/usr/bin/env bash
# Refuse what git would keep forever, weights and files above 1 MB: scripts/check_files.sh FILE ...
set -euo pipefail
refused=0
for file in "$@"; do
    [ -f "$file" ] || continue # a deleted file, or a link to a folder
    case $file in
        *.safetensors | *.bin | *.pt) why="weights are not committed; put them on a hub" ;;
        *) [ "$(wc -c <"$file")" -gt 1000000 ] || continue; why="larger than 1,000,000 bytes; make it smaller" ;;
    esac
    echo "error: $file: $why" >&2
    refused=1
done
exit $refused
