#!/usr/bin/env bash
# Checks style and types and runs all tests, on a machine with nothing but Python 3.11: with MindFormers 1.7.0 and MindSpore
# 2.7.1, and the hook's main tests again with the newest pair that pip gives. Arguments go to pytest instead.
set -euo pipefail

cd "$(dirname "$0")/.."
newest="${AUTO_TRANS_VENV:-$PWD/.venv-newest}" making=""
[ -z "${AUTO_TRANS_VENV:-}" ] || newest+="-newest"
if [ $# = 0 ]; then # downloads while the fast tests run
    (
        export AUTO_TRANS_VENV="$newest" AUTO_TRANS_PAIR=newest AUTO_TRANS_BARE=1
        source scripts/venv.sh
    ) &
    making=$!
fi
source scripts/venv.sh
pip --disable-pip-version-check -qq install ".[mindformers,test]"
for version in 1.3.2 1.6.0 1.8.0 1.9.0 2.0.0 2.1.0; do # how the hook judges these is tested, too
    target="$venv/other_mindformers/$version"
    [ -d "$target" ] || pip --disable-pip-version-check -qq install --no-deps --target "$target" "mindformers==$version"
done
# a real browser for the page of `inspect --html`; its test is skipped where there is none
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || true
fi
ruff check .
ruff format --check .
mypy
if [ $# -gt 0 ]; then
    exec pytest "$@"
fi
pytest -m "not slow" -n 2 --dist loadfile # the fast tests, on two cores
wait "$making"
(
    export AUTO_TRANS_VENV="$newest" AUTO_TRANS_PAIR=newest
    source scripts/venv.sh
    pip --disable-pip-version-check -qq install ".[test]"
)
export AUTO_TRANS_OTHER_PYTHON="$newest/bin/python"
pytest -m slow                            # one after the other: they kill, delay and count on time
"$newest/bin/auto-trans" doctor
exec "$newest/bin/python" -m pytest -m pairs
