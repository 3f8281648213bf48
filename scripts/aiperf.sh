#!/bin/sh
# NVIDIA's load generator for the tests of the servers, in an environment of its own: it wants older packages than weft does.
# What both want it takes from weft's. Where it cannot be had, its tests are skipped.
set -eu

python=.venv/bin/python
version=0.13.0
home=$("$python" -c 'import sys; print(sys.prefix)')/aiperf
[ -e "$home/$version" ] && exit 0
rm -rf "$home"
"$python" -m venv "$home"
"$python" - "$home" <<'END'
import pathlib, sys, sysconfig

[site] = pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages")
outer = sysconfig.get_path("purelib")
(site / "weft-see-through.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
END
if "$home/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "aiperf==$version"; then
    touch "$home/$version"
else
    rm -rf "$home"
    echo "weft: aiperf could not be installed; its tests will be skipped" >&2
fi
