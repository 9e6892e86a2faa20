#!/usr/bin/env bash
# Update both lock files after a change of the dependencies in pyproject.toml. Versions stay as they are locked where
# possible; --upgrade or --upgrade-package=NAME takes newer ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock() {
    uv pip compile --quiet --universal --python-version 3.10 --all-extras --generate-hashes \
        --no-annotate --no-header --no-emit-index-url pyproject.toml "$@"
}
lock --output-file requirements.lock "$@"
lock --group dev --output-file tests/requirements.lock "$@"
