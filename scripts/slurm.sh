#!/bin/sh
# Slurm, real and small, for the tests of what runs over several nodes. Where it cannot be had, they are skipped.
set -eu

command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && command -v ip >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2 && exit 0
fi
echo "weft: Slurm could not be installed; its tests will be skipped" >&2
