#!/bin/sh
# Triton's load generator for the tests of the servers: NVIDIA's wheel, in a folder of its own. It wants glibc 2.38 or newer;
# on an older Debian it runs with Debian 13's, unpacked beside it. Where it cannot be had, its tests are skipped.
set -eu

python=.venv/bin/python
version=2.60.0
home=$("$python" -c 'import sys; print(sys.prefix)')/perf_analyzer
[ -e "$home/$version" ] && exit 0
rm -rf "$home"
mkdir -p "$home/apt/lists/partial" "$home/apt/cache"

get() {
    # by name, pip takes an empty package for it where glibc is older
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --platform manylinux_2_38_x86_64 --dest "$home" "perf-analyzer==$version" || return 1
    "$python" -m zipfile -e "$home"/*.whl "$home" || return 1
    program=$home/perf_analyzer/bin/perf_analyzer
    chmod +x "$program"
    if "$program" --version >/dev/null 2>&1; then
        ln -s "$program" "$home/run"
        return
    fi
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -e "$keys" ] && command -v apt-get dpkg >/dev/null || return 1
    echo "deb [signed-by=$keys] http://deb.debian.org/debian trixie main" >"$home/apt/sources.list"
    apt() {
        apt-get -qq -o Dir::Etc::SourceList="$home/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
            -o Dir::State::Lists="$home/apt/lists" -o Dir::Cache="$home/apt/cache" -o APT::Sandbox::User= "$@"
    }
    apt update || return 1
    (cd "$home/apt" && apt download libc6 libstdc++6 libgcc-s1) || return 1
    for package in "$home"/apt/*.deb; do dpkg -x "$package" "$home/debian" || return 1; done
    libraries=$home/debian/usr/lib/x86_64-linux-gnu
    cat >"$home/run" <<END
#!/bin/sh
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries:/usr/lib/x86_64-linux-gnu" "$program" "\$@"
END
    chmod +x "$home/run"
    "$home/run" --version >/dev/null
}

if get; then
    touch "$home/$version"
else
    rm -rf "$home"
    echo "weft: perf_analyzer could not be installed; its tests will be skipped" >&2
fi
