#!/usr/bin/env bash
# Run a tool of the project's environment, also where that is not activated: scripts/tool.sh ruff check .
here=$(cd "$(dirname "$0")/.." && pwd)
PATH=$here/.venv/bin:$PATH exec "$@"
