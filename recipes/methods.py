"""What a way to select costs and saves, for the table of methods: quality by `dejavu eval`, speed by `dejavu bench`.

    python recipes/methods.py smollm2-sparse --method adapted --text 'text/valid/*.txt' --tasks 'tasks/*.jsonl'
    python recipes/methods.py opt-mini --adapter runs/gate --method gate --text ... --tasks ...

In: a model, an adapter, held-out texts and task items. Out: a record of kind "method" in results/quality.jsonl, under the name that
--name gives (MODEL where it is not given); `python recipes/tables.py render` shows the newest of each model and method.
Quality is that of fp32, every token masked; speed is one sequence on the native engine in --dtype, dense and sparse in turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from dejavu.bench.rows import SpeedRow
from tables import record


def printed(*arguments: str) -> dict[str, Any]:
    """The object that a command of dejavu prints."""
    found = subprocess.run([sys.executable, "-m", "dejavu", *arguments, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--method", required=True, help="what the table calls it")
    parser.add_argument("--name", help="what the table calls the model")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--tasks", action="append", required=True)
    parser.add_argument("--max-tokens", type=int, default=2000, help="of each text")
    parser.add_argument("--limit", type=int, default=50, help="items of each task")
    parser.add_argument("--dtype", default="int8", help="of the engine that is timed")
    options = parser.parse_args()
    subject = [options.model, *([] if options.adapter is None else ["--adapter", options.adapter])]
    texts = [part for flag, values in (("--text", options.text), ("--tasks", options.tasks)) for value in values for part in (flag, value)]
    quality = printed("eval", *subject, *texts, "--dtype", "fp32", "--max-tokens", str(options.max_tokens), "--limit", str(options.limit))
    speed = printed("bench", *subject, "--backend", "native", "--dtype", options.dtype)
    decodes = [row for row in map(SpeedRow.from_dict, speed["rows"]) if row.op == "decode"]
    timed = {"dense": next(row for row in decodes if row.dense), "sparse": next(row for row in decodes if row.sparse)}
    sides = {"dense": quality["dense"], "sparse": quality["sparse"]}
    dense, sparse = sides.values()
    record(
        "method",
        f"{options.name or options.model}: {options.method}",
        {
            "model": options.name or options.model,
            "method": options.method,
            "mlp_density": quality["mlp_density"],
            "head_density": quality["head_density"],
            "rise": quality["rise"],
            "rise_stderr": quality["rise_stderr"],
            "text_rises": {name: sparse["texts"][name]["ppl"] / value["ppl"] - 1 for name, value in dense["texts"].items()},
            "tokens": dense["tokens"],
            "accuracy": {side: {name: task["acc"] for name, task in scores["tasks"].items()} for side, scores in sides.items()},
            "items": sum(task["n"] for task in dense["tasks"].values()),
            "dtype": options.dtype,
            "tok_s": {side: row.tok_s for side, row in timed.items()},
        },
    )


if __name__ == "__main__":
    main()
