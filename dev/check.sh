#!/usr/bin/env bash
# Check style, format, the direction of imports and types, as CI does before the tests. bash dev/setup.sh --tests installs
# the checkers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports --no-cache --no-logo
.venv/bin/pyright
