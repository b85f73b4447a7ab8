"""Which neurons and heads fire over the tokens of a text that was just generated: as data, and as a picture.

In: a model, its adapter's layers and a GeneratedText with its trace (an engine that records). Out: `activation_map`, plain
and small enough for a JSON file, and `activation_svgs`, which draw it. A column is a token that a decode step read. What ran is
the engine's own record; one masked forward pass over the same tokens adds how much each head contributed, |mixed_h O_h|,
and, for layers whose MLP ran dense, which neurons were not zero.

The neurons of a layer that ran at all are ordered by the first token that needed them and put into bins, so that the edge of
the picture shows how fast a text visits new neurons, and what is to the right of it how often it comes back to them.

Letters: B batch  T tokens  N columns (tokens read)  F neurons  H query heads  K head_dim  D model  P pixel rows
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dejavu.config import require
from dejavu.engine.interface import LayerSelection
from dejavu.generation.generation import GeneratedText
from dejavu.kernels.quantized import wide
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import LayerAdapter
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import LayerInputs, Transformer

BINS = 64
MARGIN, GAP, LETTER = 92, 10, 6  # px: the layers' names, between layers, a letter of a token's text
WIDTH, COLUMNS = 1056, (10.0, 18.0)  # px: of the report's page; a token's column, at least and at most
MANY, LEAST = 12, 40  # of more layers the strips are as low as their notes allow
SHADES = 32  # of a colour: more are not told apart, and cost bytes
SELECTED_RGB, NATURAL_RGB, HEADS_RGB = (47, 137, 204), (140, 150, 160), (20, 150, 112)  # visible on light and on dark


class _ActivationRecorder(MaskedSelection):
    """A masked pass that remembers, per layer, which neurons were not zero [T, F] and what each head contributed [T, H]."""

    def __init__(self, model: Transformer, layers: tuple[LayerAdapter, ...], sparse_BT: Tensor) -> None:
        super().__init__(layers, sparse_BT)
        self.model = model
        self.active: list[Tensor] = []
        self.contribution: list[Tensor] = []

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        o_HKD = wide(self.block_of(layer, self.model.blocks[layer]).o.matrix).unflatten(0, mixed_BTHK.shape[-2:])
        self.contribution.append(torch.einsum("thk,hkd->thd", mixed_BTHK[0].float(), o_HKD.float()).norm(dim=-1))
        return super().heads(layer, inputs, mixed_BTHK)

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        self.active.append(act_BTF[0] != 0)
        return super().neurons(layer, inputs, act_BTF)


@torch.inference_mode()
def activation_map(
    model: Transformer, tokenizer: Tokenizer, layers: tuple[LayerAdapter, ...], prompt_ids: Sequence[int], text: GeneratedText
) -> dict[str, Any]:
    """What ran, by layer and token. Keys: `tokens` (their text); `layers`, each with

    neurons     rows x tokens bytes, base64: share of a bin's neurons that ran (255: all)
    rows        bins; density: mean over the tokens; union: share of neurons that some token needed
    predicted   whether a predictor selected them (else the MLP ran dense, and its activations that are not zero are shown)
    heads       heads x tokens bytes, base64: contribution relative to the strongest head of the layer and token; 0: skipped
    num_heads, head_density, heads_predicted   likewise

    Raises ValueError for a text of fewer than two tokens: no decode step ran.
    """
    require(text.new_tokens >= 2, f"a picture of what fired needs at least 2 generated tokens, not {text.new_tokens}")
    assert text.trace is not None, "generate with an engine that records"
    steps = [step for step in text.trace[1:] if step is not None]
    read = text.token_ids[: len(steps)]
    ids_BT = torch.tensor([[*prompt_ids, *read]], device=model.device)
    sparse_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None] >= len(prompt_ids)
    recorder = _ActivationRecorder(model, layers, sparse_BT)
    model.hidden(ids_BT, recorder)
    return {
        "tokens": [tokenizer.decode([token]) for token in read],
        "layers": [
            _layer([step[layer] for step in steps], active[len(prompt_ids) :].cpu(), contribution[len(prompt_ids) :].cpu())
            for layer, (active, contribution) in enumerate(zip(recorder.active, recorder.contribution, strict=True))
        ],
    }


def _layer(steps: list[LayerSelection], active_NF: Tensor, contribution_NH: Tensor) -> dict[str, Any]:
    neurons = [step.neurons_A for step in steps]
    ran_NF = active_NF if neurons[0] is None else _masks(neurons, active_NF.shape[1])
    heads = [step.heads_A for step in steps]
    strength_NH = contribution_NH / contribution_NH.amax(1, keepdim=True).clamp_min(1e-30)
    ran_NH = torch.ones_like(strength_NH, dtype=torch.bool) if heads[0] is None else _masks(heads, strength_NH.shape[1])
    # A head that ran is seen, however little it contributed.
    strength_NH = torch.where(ran_NH, strength_NH.clamp_min(0.12), 0.0)
    picture_PN = binned(ran_NF)
    return {
        "neurons": _packed(picture_PN),
        "rows": picture_PN.shape[0],
        "density": float(ran_NF.float().mean()),
        "union": float(ran_NF.any(0).float().mean()),
        "predicted": neurons[0] is not None,
        "heads": _packed(strength_NH.T),
        "num_heads": strength_NH.shape[1],
        "head_density": float(ran_NH.float().mean()),
        "heads_predicted": heads[0] is not None,
    }


def _masks(indices: Sequence[Tensor | None], size: int) -> Tensor:
    mask = torch.zeros(len(indices), size, dtype=torch.bool)
    for row, chosen in zip(mask, indices, strict=True):
        assert chosen is not None, "a layer selects on every token or on none"
        row[chosen] = True
    return mask


def binned(ran_NF: Tensor, bins: int = BINS) -> Tensor:
    """[P, N]: share of each bin's neurons that ran, neurons ordered by first use, then by how often. P is `bins` or, where
    fewer neurons ran on any token, their number; at least 1."""
    ran_NF = ran_NF[:, ran_NF.any(0)]
    neurons = ran_NF.shape[1]
    if neurons == 0:
        return torch.zeros(1, ran_NF.shape[0])
    order_F = np.lexsort((-ran_NF.sum(0).numpy(), ran_NF.int().argmax(0).numpy()))
    parts = np.array_split(order_F, min(bins, neurons))
    return torch.stack([ran_NF[:, torch.from_numpy(part)].float().mean(1) for part in parts])


def _packed(share: Tensor) -> str:
    return base64.b64encode((share * 255).round().to(torch.uint8).contiguous().numpy().tobytes()).decode("ascii")


def _png(packed: str, rows: int, columns: int, rgb: tuple[int, int, int], power: float) -> str:
    """A data URI: one colour, whose opacity is value ** power."""
    from matplotlib.image import imsave  # a second to import, and only a report draws

    share = np.frombuffer(base64.b64decode(packed), dtype=np.uint8).reshape(rows, columns)
    pixels = np.empty((rows, columns, 4), dtype=np.uint8)
    pixels[..., :3] = rgb
    pixels[..., 3] = np.round((share / 255) ** power * SHADES) * (255 / SHADES)
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _shown(token: str) -> str:
    """A token's text as a label: line ends visible, long ones cut."""
    text = token.replace("\n", "¶").strip() or "·"
    return text if len(text) <= 12 else text[:11] + "…"


def columns_width(tokens: int) -> float:
    """px that the columns of so many tokens take: what the page leaves next to the layers' names, where a token is wide enough so."""
    column = min(max((WIDTH - MARGIN) / tokens, COLUMNS[0]), COLUMNS[1])
    return math.floor(column * tokens)


def activation_svgs(data: dict[str, Any], part: str) -> tuple[str, str]:
    """The picture of part "neurons" or "heads", a strip for each layer and a column for each token: the layers' names, which stay
    where they are when the page is too narrow, and the strips, which scroll."""
    tokens, layers = data["tokens"], data["layers"]
    width = columns_width(len(tokens))
    column = width / len(tokens)
    neurons = part == "neurons"
    top = 10 + LETTER * max(len(_shown(token)) for token in tokens)
    names, strips, y = [], [], top
    for index, layer in enumerate(layers):
        rows = layer["rows"] if neurons else layer["num_heads"]
        height = (BINS if len(layers) <= MANY else LEAST) if neurons else max(28, min(5 * rows, 96))
        predicted = layer["predicted" if neurons else "heads_predicted"]
        rgb = (SELECTED_RGB if predicted else NATURAL_RGB) if neurons else HEADS_RGB
        density = layer["density" if neurons else "head_density"]
        notes = [f"{100 * density:.1f}% a token", f"{100 * layer['union']:.0f}% in all"] if neurons else [f"{100 * density:.0f}% a token"]
        notes = notes if predicted else ["all neurons" if neurons else "all heads", *(notes if neurons else ())]
        power = 0.5 if neurons else 1.0  # the square root keeps rare activations visible
        names.append(
            f'<text class="layer" x="{MARGIN - 8}" y="{y + 12}">layer {index}</text>'
            + "".join(f'<text class="note" x="{MARGIN - 8}" y="{y + 25 + 12 * line}">{note}</text>' for line, note in enumerate(notes))
        )
        strips.append(
            f'<rect class="strip" x="0" y="{y}" width="{width}" height="{height}"/>'
            f'<image x="0" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none" '
            f'href="{_png(layer[part], rows, len(tokens), rgb, power)}"/>'
        )
        y += height + GAP
    for index, token in enumerate(tokens):
        x = column * (index + 0.5) + 3
        strips.append(f'<text class="token" transform="translate({x:.1f} {top - 5}) rotate(-90)">{escape(_shown(token))}</text>')
    what = "neurons" if neurons else "attention heads"
    shares = ", ".join(f"{100 * layer['density' if neurons else 'head_density']:.0f}%" for layer in layers)
    labels = (
        f"Layers 0 to {len(layers) - 1}; share of their {what} that ran for a token: {shares}",
        f"Which {what} ran for each of {len(tokens)} generated tokens, one strip for each of {len(layers)} layers",
    )
    sides = zip(("names", "strips"), (MARGIN, width), (names, strips), labels, strict=True)
    left, right = (
        f'<svg class="firing {name}" viewBox="0 0 {wide} {y}" width="{wide}" height="{y}" role="img" aria-label="{label}">'
        f"{''.join(body)}</svg>"
        for name, wide, body, label in sides
    )
    return left, right
