#!/usr/bin/env bash
# Makes .venv with everything in requirements.lock, our rustbpe and this project. Run it any number of times: when
# nothing has changed it is done in a blink.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: $*" >&2; exit 1; }

inputs=$(cat dev/setup.sh requirements.lock pyproject.toml rustbpe/Cargo.toml rustbpe/pyproject.toml rustbpe/src/*.rs \
    | sha256sum)
stamp=.venv/.setup-done
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then exit 0; fi

# uv: the one on the PATH, or one of our own from pip, or from uv's installer where there is no pip
find_uv() {
    uv_dir="${XDG_CACHE_HOME:-$HOME/.cache}/nanochat-uv"
    export PATH="$PATH:$uv_dir/bin:$HOME/.local/bin"
    command -v uv >/dev/null && return
    echo "setup: installing uv"
    local python
    for python in python3 python; do
        "$python" -m pip install --quiet --target "$uv_dir" uv 2>/dev/null && return
    done
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        { apt-get update && apt-get install --yes --no-install-recommends python3-pip; } >/dev/null 2>&1 \
            && python3 -m pip install --quiet --target "$uv_dir" uv && return
    fi
    curl -LsSf https://astral.sh/uv/install.sh 2>/dev/null | sh >/dev/null 2>&1 && command -v uv >/dev/null && return
    fail "cannot get uv; install it (see https://docs.astral.sh/uv) or pip, then run this again"
}

find_uv
export VIRTUAL_ENV="$PWD/.venv"
rm -f "$stamp"
echo "setup: installing packages into .venv (the first time a few GB are downloaded)"
[ -x .venv/bin/python ] || uv venv --quiet --python ">=3.10" .venv \
    || fail "no Python >= 3.10 found; install one, for instance with: uv python install 3.12"
uv pip sync --quiet --require-hashes requirements.lock || fail "could not install requirements.lock (see above)"
echo "setup: building rustbpe"
uv pip install --quiet --reinstall-package rustbpe --no-deps ./rustbpe \
    || fail "could not build rustbpe: it needs a Rust toolchain (https://rustup.rs) and a C linker (apt-get install gcc)"
uv pip install --quiet --no-deps --editable . || fail "could not install the project itself (see above)"
echo "$inputs" >"$stamp"
