"""Claim: weft computes on a GPU what it computes on a CPU, fits where its plan says, and trains fast there.

    python benchmarks/gpu.py                      # every section, in at most nine minutes on an H100 or H200
    python benchmarks/gpu.py --section blocks --minutes 4
"""
