#!/usr/bin/env bash
# Set up and run the tests. Arguments go to pytest: `bash tests/run.sh -m "not slow and not gpu"` leaves out the
# slow tests, `-m gpu` runs those that need an NVIDIA GPU.
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
workers=2
[[ " $* " != *" -m gpu "* ]] || workers=0 # tests on one GPU run one at a time
.venv/bin/python -m pytest --numprocesses=$workers --dist=worksteal "$@"
