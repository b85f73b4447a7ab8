"""The README.md of an adapter folder: what it selects and what was measured of it, for a person and for the Hugging Face hub."""

from __future__ import annotations

from dejavu.model.adapter_config import AdapterConfig, LayerConfig, ScreenConfig
from dejavu.model.selectors import SELECTORS

ABOUT = {  # where it is not what the selectors tell
    "activation": "Changes of weights that make `{base}` sparse by zeros of its own: its MLPs get {activation}, and rows of up and down\n"
    "of neurons whose gate is zero are not read.",
    "head": "All layers of `{base}` run dense; its head is screened.",
    "exact": "The MLP of `{base}` from the neurons whose gate is not zero: nothing else is read, nothing is lost.",
}


def card(config: AdapterConfig) -> str:
    """Markdown, with the front matter that the hub reads."""
    budget = "none" if config.budget is None else f"{config.budget:.2%} of perplexity"
    measured = "\n".join(f"| {name} | {value:.5g} |" for name, value in config.quality.items())
    selector = next((kind for kind in SELECTORS.values() if kind.method == config.selects), None)
    columns = () if selector is None else selector.columns
    rows = "\n".join(_row(entry, columns) for entry in config.layers)
    head = "" if config.screened_head is None else _head(config.screened_head)
    layers = "" if selector is None else f"| layer | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n{rows}\n\n"
    texts = "".join(f"{name}, " for name in config.calibration_texts)
    hashes = "\n".join(f"* `{value}`" for value in config.base_hashes)
    lora = config.lora
    activation = None if lora is None else lora.activation
    about = ABOUT.get(config.method if activation is None else "activation", "" if selector is None else selector.about)
    about = about.format(base=config.base_id, activation=activation)
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

{layers}{head}Calibration text ({texts}SHA-256): `{config.calibration_text_hash}`. Accepted forms of the base:

{hashes}
"""


def _head(screen: ScreenConfig) -> str:
    return (
        f"Screened head: of {screen.clusters:,} clusters of the vocabulary those whose tokens have a mean probability of at least "
        f"{screen.threshold:.3g} get exact logits, {screen.tokens:,.0f} tokens in the mean. Of the full head's probability "
        f"{screen.missed:.2%} (standard error {screen.missed_stderr:.2%}) is left out; its "
        f"likeliest token is kept in {screen.agreement:.2%}.\n\n"
    )


def _row(entry: LayerConfig, columns: tuple[str, ...]) -> str:
    cells = {column: cell for key, each in entry.entries.items() for column, cell in SELECTORS[key].cells(each).items()}
    return f"| {entry.layer} | {' | '.join(cells.get(column, 'dense') for column in columns)} |"
