#!/usr/bin/env bash
# Checks style and types and runs all tests, on a machine with nothing but Python 3.11. Arguments go to pytest instead.
set -euo pipefail

cd "$(dirname "$0")/.."
source scripts/venv.sh
pip --disable-pip-version-check -qq install ".[mindformers,test]"
for version in 1.6.0 1.8.0 1.9.0; do # the hook must also apply to these
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
exec pytest -m slow                       # one after the other: they kill, delay and count on time
