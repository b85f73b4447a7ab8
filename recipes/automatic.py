"""What `train --method auto` takes for a model within a budget, and what that gains over the fastest program of no worse perplexity.

    python recipes/automatic.py "Gemma 3 270M, Q4_K_M" FILE.gguf --budget 0.01 --text train.txt.xz --valid 'valid/*.txt' -o runs/auto

In: a name for the table, a model and texts. Out: the adapter in the folder of -o (used again where there is one; none where dense is kept),
and a record of kind "automatic" in results/quality.jsonl: of every process of `dejavu bench` the ratios of decode and of whole requests,
in turns within that process. A program counts as a rival where its perplexity on the texts is no worse than the sparse model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dejavu.bench.rows import append_rows
from dejavu.config import require
from dejavu.model.adapter_config import AdapterConfig
from processes import repeated
from records import QUALITY, AutomaticResult, Record
from speeds import PROCESSES

REQUESTS = ("128+128", "1024+128")
OPS = ("decode", *REQUESTS)
DENSE = "dense"


def trained(model: str, options: argparse.Namespace) -> bool:
    """Whether there is an adapter now."""
    if not (options.output / "config.json").is_file():
        texts = [each for text in options.text for each in ("--text", text)]
        command = ["train", model, "--method", "auto", "--budget", str(options.budget), *texts, "-o", str(options.output)]
        subprocess.run([sys.executable, "-m", "dejavu", *command], check=True)
    return (options.output / "config.json").is_file()


def taken(adapter: AdapterConfig) -> str:
    """What selects, in words."""
    parts = [] if adapter.method == "head" else [adapter.method]
    return " and ".join([*parts, *(["screened head"] if adapter.screened_head is not None else [])])


def op_of(row: Mapping[str, Any]) -> str | None:
    """decode, or a request by its tokens; None for what is not compared here."""
    if row["op"] == "request":
        return f"{row['context']}+{row['new_tokens']}"
    return "decode" if row["op"] == "decode" else None


def sparse_mode(found: Mapping[str, Any]) -> str:
    """Of our modes the one that is not dense; of several the fastest."""
    own = {row["mode"]: row["tok_s"] for row in found["rows"] if row["op"] == "decode" and not row["peer"] and row["mode"] != DENSE}
    return max(own, key=lambda mode: own[mode])


def rival_of(found: Mapping[str, Any], sparse: str) -> tuple[str, float, float]:
    """Of a process that measured perplexity: the mode that decodes fastest among those of no worse perplexity, and perplexities of it and
    of the sparse mode. What a screened head misses counts as so much more."""
    ppl = {row["mode"] + ("+heads" if row["sparse_heads"] else ""): row["ppl"] for row in found["perplexity"]}  # modes as of speeds
    missed = found["screen"]["missed"] if "screen" in found else 0.0
    ours = (ppl[DENSE] if sparse == "screened" else ppl[sparse]) * (1 + missed)
    speed = {row["mode"]: row["tok_s"] for row in found["rows"] if row["op"] == "decode"}
    rivals = [mode for mode in ppl if mode != sparse and ppl[mode] <= ours]
    if not rivals:  # sparse is better than dense, and every program is worse: the fastest of all is told
        rivals = [mode for mode in ppl if mode != sparse]
    best = max(rivals, key=lambda mode: speed[mode])
    return best, ppl[best], ours


def compared(objects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ratios of the sparse mode over the rival, op by op, one for each process."""
    sparse = sparse_mode(objects[0])
    rival, ppl_rival, ppl = rival_of(objects[0], sparse)
    ratios: dict[str, list[float]] = {}
    for ratio in (each for found in objects for each in found["ratios"]):
        op = op_of(ratio)
        if op is not None and ratio["mode"] == sparse and ratio["against"] == rival:
            ratios.setdefault(op, []).append(ratio["ratio"])
    speeds = [row["tok_s"] for found in objects for row in found["rows"] if row["op"] == "decode" and row["mode"] == sparse]
    return {"rival": rival, "ppl_rival": ppl_rival, "ppl": ppl, "tok_s": statistics.median(speeds), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what the table calls the model")
    parser.add_argument("model")
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--valid", action="append", required=True)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "budget": options.budget,
        "takes": DENSE,
        "rival": DENSE,
        "ppl": None,
        "ppl_rival": None,
        "tok_s": None,
        "ratios": {},
    }
    if trained(options.model, options):
        adapter = AdapterConfig.from_dict(json.loads((options.output / "config.json").read_text()))
        wrong = f"{options.output} has an adapter of budget {adapter.budget}, not {options.budget}; choose another folder"
        require(adapter.budget == options.budget, wrong)
        requests = [each for request in REQUESTS for each in ("--request", request)]
        texts = [each for text in options.valid for each in ("--text", text)]
        arguments = [options.model, "--adapter", str(options.output), "--against", "llama.cpp", *texts, *requests]
        found |= {"takes": taken(adapter), **compared(repeated(arguments, options.processes))}
    result = AutomaticResult(**found)
    append_rows(QUALITY, [Record(kind="automatic", model=options.name, result=result)])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
