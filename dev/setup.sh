#!/usr/bin/env bash
# Create or update .venv: the packages of requirements.lock, rustbpe and this project. --tests takes the packages
# of tests/requirements.lock, which adds those of the checks and tests. Without changes a second run does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: $*" >&2; exit 1; }
has() { command -v "$1" >/dev/null; }

case "${1:-}" in
    "") lock=requirements.lock ;;
    --tests) lock=tests/requirements.lock ;;
    *) fail "unknown argument $1; the only one is --tests" ;;
esac
checksum() { if has sha256sum; then sha256sum; else shasum -a 256; fi; } # older macOS has no sha256sum
inputs=$(cat dev/setup.sh {,tests/}requirements.lock pyproject.toml rustbpe/*.toml rustbpe/*.pyi rustbpe/src/*.rs | checksum)
stamp=.venv/.setup-done
case "$(cat "$stamp" 2>/dev/null)" in
    "$lock $inputs" | "tests/requirements.lock $inputs") [ ! -x .venv/bin/python ] || exit 0 ;; # unless an update removed its Python
esac

apt_install() {
    has apt-get && [ "$(id -u)" = 0 ] || return 1
    echo "setup: installing $* with apt-get"
    apt-get update >/dev/null && apt-get install --yes --no-install-recommends "$@" >/dev/null
}

# Find uv on the PATH, or install it with pip (which apt-get may have to install), or with uv's own installer.
get_uv() {
    local home=${XDG_CACHE_HOME:-$HOME/.cache}/nanochat-uv
    export PATH="$PATH:$home/bin:$HOME/.local/bin"
    has uv && return
    echo "setup: installing uv"
    python3 -m pip --version >/dev/null 2>&1 || apt_install python3-pip ca-certificates || true
    python3 -m pip install --quiet --target "$home" uv 2>/dev/null && return
    has curl && curl -LsSf https://astral.sh/uv/install.sh | sh >/dev/null 2>&1 && has uv && return
    fail "cannot install uv: install it (https://docs.astral.sh/uv) or pip, then run this again"
}

get_uv
export VIRTUAL_ENV="$PWD/.venv"
rm -f "$stamp"
[ -x .venv/bin/python ] || uv venv --quiet --clear --python ">=3.10" .venv \
    || fail "found no Python 3.10 or newer; install one, for instance with: uv python install 3.12"
echo "setup: installing packages into .venv (a few GB the first time)"
uv pip sync --quiet --require-hashes "$lock" || fail "could not install $lock, see above"
echo "setup: building rustbpe"
has cc || apt_install gcc libc6-dev || fail "rustbpe needs a C linker: install gcc (apt-get install gcc)"
uv pip install --quiet --no-deps --reinstall-package rustbpe ./rustbpe \
    || fail "could not build rustbpe, see above; it needs Rust 1.85 or newer (https://rustup.rs)"
uv pip install --quiet --no-deps --editable . || fail "could not install the project itself, see above"
echo "$lock $inputs" >"$stamp"
