#!/usr/bin/env bash
# Sets everything up and runs all tests; arguments go to pytest (bash tests/run.sh -m gpu).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash dev/setup.sh --tests
if command -v cargo >/dev/null; then
    (
        cd rustbpe
        cargo fmt --check
        cargo clippy --quiet --all-features --all-targets -- -D warnings
        cargo test --quiet
    )
else
    echo "cargo is not on the PATH: the Rust tests of rustbpe are not run"
fi
.venv/bin/python -m pytest "$@"
