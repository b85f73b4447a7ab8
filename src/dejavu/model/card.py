"""The README.md of an adapter folder: what it selects and what was measured of it, for a person and for the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dejavu.model.selectors import POINTS

if TYPE_CHECKING:
    from dejavu.model.adapter_config import AdapterConfig, LayerConfig, PartConfig

PREDICTORS = """Predictors that tell, token by token, which MLP neurons and attention heads of `{base}` are needed
(Deja Vu, arXiv 2310.17157)."""
ABOUT = {
    "predicted": PREDICTORS,
    "adapted": PREDICTORS,
    "activation": "Changes of weights that make `{base}` sparse by zeros of its own: its MLPs get {activation}, and rows of up and down\n"
    "of neurons whose gate is zero are not read.",
    "exact": "The MLP of `{base}` from the neurons whose gate is not zero: nothing else is read, nothing is lost.",
    "gate": "Thresholds on the activated gate of every MLP of `{base}`: rows of up and down are read where it exceeds them\n"
    "(CATS, arXiv 2404.08763).",
    "input": "Thresholds on the inputs of every linear map of `{base}`, times the norms of their columns: columns of the others are\n"
    "not read (TEAL, arXiv 2408.14690; WINA, arXiv 2505.19427). Densities are of weights.",
}


def card(config: AdapterConfig) -> str:
    """Markdown, with the front matter that the hub reads."""
    budget = "none" if config.budget is None else f"{config.budget:.2%} of perplexity"
    measured = "\n".join(f"| {name} | {value:.5g} |" for name, value in config.quality.items())
    inputs = config.method == "input"
    columns = POINTS if inputs else ("MLP", "heads")
    rows = "\n".join(_row(entry.layer, _input_cells(entry) if inputs else _cells(entry)) for entry in config.layers)
    hashes = "\n".join(f"* `{value}`" for value in config.base_hashes)
    lora = config.lora
    activation = None if lora is None else lora.activation
    about = ABOUT[config.method if activation is None else "activation"].format(base=config.base_id, activation=activation)
    changed = (
        "" if lora is None else f"\nWeights change too, while it runs sparse: W + {lora.scale:g} B A of rank {lora.rank}, and the norms."
    )
    return f"""---
library_name: dejavu
base_model: {config.base_id}
tags:
- contextual-sparsity
---
# Contextual sparsity for {config.base_id}

{about} Method `{config.method}`, loss budget {budget}, seed {config.seed}, dejavu {config.dejavu_version}.{changed}

MLP density {config.mlp_density:.3f}, head density {config.head_density:.3f}, averaged over all layers.

| measured | value |
|---|---|
{measured}

| layer | {" | ".join(columns)} |
|---|{"---|" * len(columns)}
{rows}

Calibration text (SHA-256): `{config.calibration_text_hash}`. Accepted forms of the base:

{hashes}
"""


def _row(layer: int, cells: tuple[str, ...]) -> str:
    return f"| {layer} | {' | '.join(cells)} |"


def _cells(entry: LayerConfig) -> tuple[str, ...]:
    def predicted(part: PartConfig | None) -> str:
        if part is None:
            return "dense"
        return f"density {part.density:.3f}, recall {part.recall:.3f}, mass {part.mass:.3f}, rank {part.rank}, lookahead {part.lookahead}"

    gate = entry.gate
    if gate is not None:
        return f"density {gate.density:.3f}, mass {gate.mass:.3f}, threshold {gate.threshold:.4g}", "dense"
    return predicted(entry.mlp), predicted(entry.heads)


def _input_cells(entry: LayerConfig) -> tuple[str, ...]:
    points = [None if entry.inputs is None else entry.inputs.of(point) for point in POINTS]
    return tuple("dense" if point is None else f"density {point.density:.3f}, threshold {point.threshold:.4g}" for point in points)
