#!/bin/sh
# What torch.compile needs on a CPU: a C++ compiler and Python's headers. Installed where we may, named where we may not.
set -eu

missing=""
command -v g++ >/dev/null || missing="$missing g++"
headers=$(${PYTHON:-python3} -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$headers/Python.h" ] || missing="$missing python3-dev"
[ -z "$missing" ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq $missing
else
    echo "weft: torch.compile will not work before you install:$missing" >&2
fi
