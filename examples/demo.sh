#!/usr/bin/env bash
# The whole way on the bundled model: quantize, judge, look inside, generate, chat, serve.
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
  qoq quantize "$model" -o "$out" \
    --calibration "$model/calibration.txt" --eval-text "$model/heldout.txt"
fi

say "The accuracy table: every scheme, and the passes of QoQ added one by one"
echo "(32 calibration samples and 4 windows a text, so that it takes minutes; docs/accuracy.md has more)"
qoq eval table "$model" --rows accuracy --samples 32 --windows 4 --checkpoint "$out" \
  --calibration "$model/calibration.txt" --save demo-out/accuracy.json

say "What is inside"
qoq inspect "$out"

say "Text from the packed checkpoint"
qoq generate "$out" --prompt "It was a dark and stormy night, and" --max-tokens 64

say "One turn of a chat (the model has read only novels)"
qoq chat "$out" --message "My dear Watson, what do you make of it?" --max-tokens 48 \
  --temperature 0.8 --top-p 0.95 --seed 1

say "Serve it, ask it over HTTP as OpenAI's clients do, and stop it"
log=demo-out/serve.log
qoq serve "$out" --port 0 --served-model-name books > "$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
until grep -q 'serving on' "$log"; do
  kill -0 "$server" 2>/dev/null || { cat "$log"; exit 1; }
  sleep 0.2
done
url=$(sed -n 's/.*serving on \(http[^ ]*\).*/\1/p' "$log")
echo "$url has a page for people, too: qoq serve $out"
qoq complete books --base-url "$url" --prompt "The ship had been at sea for" --max-tokens 32
kill -TERM "$server"
wait "$server"
