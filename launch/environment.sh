# Sourced by the other files here: makes `python` one that has mnist_dist, and goes to the repository's root.
# The active environment is used if it has the package already; else .venv is made from pyproject.toml, once.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

# under nohup SIGHUP is ignored; torch's launcher would take it back
[ -z "$(trap -p HUP)" ] || export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT

has_package() { (cd / && "$1" -c 'import importlib.metadata as m; m.version("mnist-dist")') >/dev/null 2>&1; }

if ! { [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && has_package python; }; then
    # the stamp is written last: a set-up that was interrupted, or a changed pyproject.toml, is gone through again
    stamp=.venv/.complete
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
        python=
        for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
            if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
                python=$candidate
                break
            fi
        done
        [ -n "$python" ] || { echo "launch: Python 3.10 or newer is needed, and none was found" >&2; exit 2; }
        echo "launch: setting up .venv with $("$python" --version) (some minutes, once)" >&2
        [ -x .venv/bin/python ] || "$python" -m venv .venv ||
            { rm -rf .venv; echo "launch: $python cannot make environments: install its venv module (Debian, Ubuntu: python3-venv)" >&2; exit 2; }
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' ||
            { echo "launch: the packages could not be installed (see above): check the network, then run this again" >&2; exit 2; }
        touch "$stamp"
    fi
    PATH="$root/.venv/bin:$PATH"
    export VIRTUAL_ENV="$root/.venv"
fi
