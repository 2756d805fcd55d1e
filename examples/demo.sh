#!/usr/bin/env bash
# The whole way on the bundled model: quantize, judge, look inside, generate.
# `make demo` runs it with .venv/bin on the PATH; output goes to demo-out/.
set -euo pipefail
cd "$(dirname "$0")/.."

model=examples/books-llama
out=demo-out/books-llama-w4a8kv4-g128

say() { printf '\n== %s\n' "$*"; }

say "Quantize $model to W4A8KV4 g128"
if [ -e "$out/config.json" ]; then
  echo "$out is there already; remove it to quantize again."
else
  qoq quantize "$model" -o "$out" --calibration "$model/calibration.txt"
fi

say "What it costs: every scheme and pass against full precision"
qoq eval table "$model" --checkpoint "$out" \
  --calibration "$model/calibration.txt" --text "$model/heldout.txt" --text "$model/wikitext2-test.txt"

say "What is inside"
qoq inspect "$out"

say "Text from the packed checkpoint"
qoq generate "$out" --prompt "It was a dark and stormy night, and" --max-tokens 64
