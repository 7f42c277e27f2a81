#!/bin/sh
# The whole round, on the twelve real adapters of examples/zoo. Run by `make demo`; needs `lorazip` on the PATH.
set -eu
cd "$(dirname "$0")/.."
zoo=examples/zoo
out=build/demo
adapter=fv_lowercase_first_letter

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

rm -rf "$out"
mkdir -p "$out"
run lorazip compress "$zoo" -o "$out/zoo.lorazip" --report "$out/report.html"
run lorazip verify "$out/zoo.lorazip" --against "$zoo"
run lorazip export "$out/zoo.lorazip" "$adapter" -o "$out/exported"
run lorazip info "$out/zoo.lorazip"
printf '\nThe report: %s/report.html\nOne adapter back, as PEFT and vLLM load it: %s/exported/%s\n' "$out" "$out" "$adapter"
