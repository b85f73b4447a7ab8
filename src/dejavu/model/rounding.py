"""What rounding the weights to a dtype is known to cost a model, so that whoever chooses it is told.

In: a base hash, the dtype that was chosen, the digest of the adapter that runs. Out: a note, or None where there is nothing to say. The
figures are in models/rounding.json, which recipes/tables.py writes from results/perplexity.jsonl: the rise of perplexity over fp32,
dense and by the digest of the adapter that ran.
"""

from __future__ import annotations

from dejavu.files import read_json
from dejavu.model.bundle import MODELS_FOLDER

ROUNDING_FILE = MODELS_FOLDER / "rounding.json"
NOTICEABLE = 0.03  # of perplexity
FOUR_BITS = ("int4", "q4_0", "q4_1")
ROUNDS = ("int8", *FOUR_BITS)  # dtypes whose cost depends on the model


def rounding_note(base_hash: str, dtype: str, *, stored_dtype: str, adapter: str | None) -> str | None:
    """A sentence where the dtype is known to cost over NOTICEABLE, or is of four bits and nobody knows what it costs this model.

    adapter: its digest, None for dense. A sparse figure is of one adapter; another one gets the dense figure.
    """
    if dtype not in ROUNDS or dtype == stored_dtype:
        return None
    models = read_json(ROUNDING_FILE)
    rises = next((each["rises"] for each in models if base_hash in each["base_hashes"]), {}).get(dtype, {})
    mode = "sparse" if adapter in rises else "dense"
    rise = rises.get(adapter, rises.get("dense"))
    if rise is not None:
        other = "" if adapter is None or mode == "sparse" else "; with this adapter it was not measured"
        return f"{dtype} costs this model {100 * rise:.0f} % of perplexity, {mode}, beside fp32{other}" if rise > NOTICEABLE else None
    if dtype not in FOUR_BITS:
        return None
    seen = [each["rises"]["int4"]["dense"] for each in models if "dense" in each["rises"].get("int4", {})]
    others = f" (others measured, in int4: {', '.join(f'{rise:+.0%}' for rise in seen)})" if seen else ""
    return f"what {dtype} costs this model in perplexity is not known{others}; dejavu eval tells, beside --dtype fp32"
