#!/usr/bin/env bash
# Runs the fast tests on every CPython from 3.9 on that this machine has, each in a virtual environment of its own with
# nothing but the base install: no MindSpore. Prints a table; fails if one fails. Arguments go to pytest:
# -m "not mindspore and not trainer" runs the slow tests too that need no MindSpore.
set -euo pipefail

cd "$(dirname "$0")/.."
folder=${AUTO_TRANS_PYTHONS:-$PWD/.venv-pythons}
tests=(pytest pytest-timeout hypothesis safetensors)

candidates() { # one interpreter a line
    if command -v pyenv >/dev/null; then
        printf '%s\n' "$(pyenv root)"/versions/*/bin/python
    fi
    local number
    for number in $(seq 9 30); do
        command -v "python3.$number" || true
    done
}

version() { # of an interpreter, if it is a CPython from 3.9 on; a shim of pyenv may stand for nothing
    "$1" -c 'import sys; v = sys.version_info
if sys.implementation.name == "cpython" and v >= (3, 9): print("%d.%d.%d" % v[:3])' 2>/dev/null
}

count() { # word: how many pytest's last line tells of it
    grep -oE "[0-9]+ $1" <<<"$summary" | grep -oE '[0-9]+' || echo 0
}

declare -A found
while read -r python; do
    number=$(version "$python" || true)
    [ -z "$number" ] || found[$number]=${found[$number]:-$python}
done < <(candidates)
[ "${#found[@]}" != 0 ] || { echo "no CPython from 3.9 on is found" >&2; exit 1; }

mkdir -p "$folder"
failed=0
rows=()
for number in $(printf '%s\n' "${!found[@]}" | sort -V); do
    venv=$folder/$number log=$folder/$number.log
    echo "== Python $number"
    begin=$SECONDS
    if {
        { [ -x "$venv/bin/pip" ] || "${found[$number]}" -m venv --clear "$venv"; } &&
            rm -rf build &&
            "$venv/bin/python" -m pip --disable-pip-version-check -q install . "${tests[@]}" &&
            "$venv/bin/python" -m pip --disable-pip-version-check -q install --no-deps --force-reinstall .
    } >"$log" 2>&1; then
        begin=$SECONDS
        result=ok
        "$venv/bin/python" -m pytest -m "not slow" "$@" 2>&1 | tee -a "$log" || result=FAILED
        summary=$(grep -E '^(=+ )?[0-9]+ (passed|failed|skipped|error)|^[0-9]+ deselected|^no tests ran' "$log" | tail -n 1 || true)
    else
        tail -n 20 "$log"
        result=FAILED summary="cannot be installed"
    fi
    [ "$result" = ok ] || failed=1
    rows+=("$(printf '%-10s %8s %8s %8s %7s  %s' "$number" "$(count passed)" "$(count failed)" "$(count skipped)" \
        "$((SECONDS - begin)) s" "$result")")
done

echo
printf '%-10s %8s %8s %8s %7s  %s\n' Python passed failed skipped time result
printf '%s\n' "${rows[@]}"
exit "$failed"
