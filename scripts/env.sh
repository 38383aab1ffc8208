# Sourced by the scripts beside it: makes the virtual environment of this checkout on first use, and
# again when its dependencies change. Nothing is written outside the checkout.
#   prepare run     what the product needs
#   prepare dev     that, and what its tests need

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export TMPDIR="$root/.tmp" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p "$TMPDIR"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "vstack needs Python 3.11 or newer: install it, or name it with PYTHON=/path/to/python" >&2
    return 1
}

prepare() {
    local what=$1 target=. log="$root/.tmp/install.log" python stamp
    [ "$what" = run ] || target=".[dev]"
    stamp="$root/.venv/.ready-$what-$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum | cut -d' ' -f1)"
    [ -e "$stamp" ] && return
    python=$(find_python)
    trap 'echo "interrupted while preparing .venv: run it again" >&2; exit 130' INT TERM
    echo "preparing .venv with $($python --version) (once)..." >&2
    # An interrupted first try may have left half of it.
    "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$root/.venv"
    if ! (cd "$root" && .venv/bin/python -m pip install --quiet -c constraints.txt -e "$target") >"$log" 2>&1; then
        cat "$log" >&2
        echo "the packages could not be installed: see above" >&2
        return 1
    fi
    touch "$stamp"
    trap - INT TERM
}
