#!/bin/sh
# The journey in miniature. Each command is shown before it runs, and can be typed by hand.
set -eu

out=demo
rm -rf $out
text=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')  # real text that every machine has

bold='' dim='' plain=''
if [ -t 1 ]; then bold=$(printf '\033[1m') dim=$(printf '\033[2m') plain=$(printf '\033[0m'); fi
say() { printf '\n%s── %s%s\n' "$bold" "$*" "$plain"; }
run() { printf '%s$ %s%s\n' "$dim" "$*" "$plain"; "$@"; }

say "Data: the Python standard library's own source becomes tokens"
run weft data tokenizer "$text" --glob '*.py' --vocab 1024 --out $out/tokenizer
run weft data prepare "$text" --glob '*.py' --tokenizer $out/tokenizer --out $out/stdlib

say "Plan: what this run will be, before anything starts"
run weft train examples/demo.toml --layout tp2 --dry-run

say "Train: over two processes, each holding half of every matrix"
run weft train examples/demo.toml --layout tp2 --run $out/tp2

say "Train: over two processes, each holding half of every weight, gradient and optimizer state"
run weft train examples/demo.toml --layout fsdp2 --run $out/fsdp2 --steps 60

say "Prove: both computed what one process computes"
run weft verify layout single tp2 examples/demo.toml
run weft verify layout single fsdp2 examples/demo.toml
run weft verify checkpoint $out/tp2

say "Prompt: the checkpoint, loaded by a new process, completes some code"
run weft generate $out/tp2 'def __init__(self, name, value=None):
' --max-tokens 80 --temperature 0.5 --top-p 0.9 --seed 1

say "Look: $out/tp2/loss.png is the loss curve; $out/tp2/checkpoints/ loads in transformers as it lies"
