"""The speeds of docs/performance.md, measured again on this machine's GPU: one command of `dejavu bench` after the other.

    python recipes/gpu_speeds.py --results results/bench.jsonl
    python recipes/gpu_speeds.py --results rows.jsonl --only rows --only inputs-8b

In: nothing; models are made up on the GPU. Out: rows, and what each command prints. A command that fails does not end the others; exit
status 1 then. An H200 takes ten minutes for all, of which half are the peers; 60 GB of GPU memory are enough for all but the 30B shape.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ALL_OF_6B = "--density 0.1 --head-density 0.5 --batch 1 4 16 --context 256 2000 --prompt 256 2000 --request 256+256"
COMMANDS = {
    "planted-6.7b": f"opt-6.7b {ALL_OF_6B} --against transformers --perplexity 0",
    "compiled-6.7b": "opt-6.7b --density 0.1 --head-density 0.5 --context 256 --against transformers-compile --perplexity 0",
    "rows": "opt-6.7b --density 0.1 --batch 2 8 32 --context 256",
    "rows-published": "opt-6.7b --density 0.1 --selection published --batch 2 4 8 --context 256",
    "planted-1.3b": "opt-1.3b --density 0.1 --head-density 0.5 --context 256",
    "planted-nemotron": "minitron-4b --density 0.1 --context 256",
    "planted-30b": ("opt-30b --density 0.1 --head-density 0.5 --context 256 2000 --prompt 256 2000 --against transformers --perplexity 0"),
    "inputs-7b": "llama-2-7b --method input --density 0.75 0.6 0.5 --context 256",
    "inputs-8b": "llama-3.1-8b --method input --density 0.75 0.6 0.5 --context 256",
    "inputs-contexts": "llama-3.1-8b --method input --density 0.5 --context 256 2000 8000 32000",
    "gates-7b": "llama-2-7b --method gate --density 0.5 0.3 --context 256",
    "gates-8b": "llama-3.1-8b --method gate --density 0.5 0.3 --context 256",
    "ops": "opt-6.7b --ops --ahead in-line",
}


def arguments(words: str) -> list[str]:
    """Of `dejavu bench`: the shape and its options, one in front of each of its values."""
    shape, *rest = words.split()
    found, option, values = ["--synthetic", shape], "", 0
    for word in rest:
        if word.startswith("--"):
            found += [option] if option and not values else []
            option, values = word, 0
        else:
            found += [option, word]
            values += 1
    return found + ([option] if option and not values else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="the .jsonl file that rows are appended to")
    parser.add_argument("--only", action="append", choices=COMMANDS, help="this command; may repeat (default: all)")
    given = parser.parse_args()
    failed = []
    for name in given.only or COMMANDS:
        started = time.perf_counter()
        print(f"== {name}: {COMMANDS[name]}", flush=True)
        bench = [sys.executable, "-m", "dejavu", "bench", *arguments(COMMANDS[name])]
        done = subprocess.run([*bench, "--backend", "cuda", "--results", str(given.results)], check=False)
        failed += [name] if done.returncode else []
        print(f"== {name}: {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
