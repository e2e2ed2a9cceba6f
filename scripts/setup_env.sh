#!/usr/bin/env bash
# Make .venv with everything a developer, a test or `baton up` needs, or return at once if it is up to date.
#
# The versions are those of constraints.txt, which every developer and CI share: a release of the night before breaks
# nobody's morning. `make lock` moves to the newest. Who installs the package with pip is bound by pyproject.toml alone.
# The stamp is the hash of all three: a new dependency, other versions or a moved checkout make the environment again.
# uv installs the set in a minute where pip takes several, so it is fetched when it is missing; pip is the fallback.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/.baton-stamp
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/baton
EXTRAS=worker,operator,nixl,dev
CONSTRAINTS=scripts/constraints.txt
QUIET=--quiet
[ -t 2 ] && QUIET= # somebody is watching: show how far it is

say() { printf 'setup: %s\n' "$*" >&2; }

wanted_stamp() {
    { cat pyproject.toml "$CONSTRAINTS" scripts/setup_env.sh; pwd -P; } | { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1
}

# A python >= 3.11 on PATH; uv can bring one where there is none.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
}

# A uv that runs (a pyenv shim may exist without one behind it): PATH, the bootstrap folder, else installed there.
find_uv() {
    local bootstrap=$CACHE/uv-bootstrap candidate
    for candidate in uv "$bootstrap/bin/uv"; do
        if "$candidate" --version >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    say "uv not found: installing it into $bootstrap"
    if python3 -m venv "$bootstrap" >/dev/null 2>&1 && "$bootstrap/bin/python" -m pip install --quiet uv >&2; then
        echo "$bootstrap/bin/uv"
    elif python3 -m pip install --quiet --target "$bootstrap" uv >&2; then
        echo "$bootstrap/bin/uv"
    fi
}

install_with_uv() {
    local uv=$1 python=$2
    "$uv" venv --quiet --clear --python "${python:->=3.11}" "$VENV" || return
    with_or_without_constraints "$uv" pip install $QUIET --python "$VENV/bin/python" -e ".[$EXTRAS]"
}

install_with_pip() {
    local python=$1
    if [ -z "$python" ]; then
        say "Python 3.11 or newer is needed, and uv, which could bring one, cannot be had. Install Python, then try again."
        return 1
    fi
    "$python" -m venv --clear "$VENV" || return
    with_or_without_constraints "$VENV/bin/python" -m pip install $QUIET -e ".[$EXTRAS]"
}

# A platform for which a locked version was never built still gets what pyproject.toml allows.
with_or_without_constraints() {
    "$@" --constraint "$CONSTRAINTS" && return
    say "the versions of $CONSTRAINTS cannot be had here: taking the newest that pyproject.toml allows"
    "$@"
}

# The newest versions that go together, for every platform and Python that the package runs on. Its tool is uv.
lock() {
    "$(find_uv)" pip compile pyproject.toml --quiet --universal --upgrade --python-version 3.11 --no-header --no-annotate \
        $(printf -- '--extra %s ' ${EXTRAS//,/ }) --output-file "$CONSTRAINTS"
    say "$CONSTRAINTS: $(grep -c == "$CONSTRAINTS") packages"
}

# The engine's CPU kernels are compiled at first use. Without any compiler the product runs on torch's operators, slower.
ensure_compiler() {
    local compiler
    for compiler in c++ g++ clang++; do
        command -v "$compiler" >/dev/null && return
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "no C++ compiler: installing g++"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq g++; } >&2 && return
    fi
    say "no C++ compiler: installing ziglang, whose 'python -m ziglang c++' is one"
    { "${UV:-}" pip install --quiet --python "$VENV/bin/python" ziglang || "$VENV/bin/python" -m pip install --quiet ziglang; } 2>/dev/null && return
    say "no C++ compiler can be had: native CPU kernels are off. Install g++ or clang to have them."
}

main() {
    local wanted started=$SECONDS
    wanted=$(wanted_stamp)
    if [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    local python
    python=$(find_python)
    UV=$(find_uv || true)
    if [ -n "$UV" ]; then
        say "making $VENV with $("$UV" --version)"
        install_with_uv "$UV" "$python" || { say "uv could not: trying pip"; install_with_pip "$python"; }
    else
        say "making $VENV with pip"
        install_with_pip "$python"
    fi
    ensure_compiler
    echo "$wanted" >"$STAMP"
    say "$VENV is ready after $((SECONDS - started)) s"
}

case "${1:-}" in
lock) lock ;;
*) main ;;
esac
