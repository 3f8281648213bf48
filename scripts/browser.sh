#!/bin/sh
# A browser for the tests of the playground: the system's, or one of playwright's. Where none can be had, they are skipped.
set -eu

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq chromium && exit 0
fi
.venv/bin/python -m playwright install chromium-headless-shell && exit 0
echo "weft: no browser could be installed; the playground's tests will be skipped" >&2
