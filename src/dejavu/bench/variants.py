"""What takes part in a benchmark: our engines, each a mode, and other programs, each behind the same few calls.

In: a model, predictors, peers. Out: variants to build engines for, and a check of each decoder's logits against the (masked)
forward pass, which comes before any timing: where it fails nothing is timed.

Letters: B batch  T tokens  V vocabulary  L layers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dejavu.bench.models.density import rethresholded
from dejavu.config import require
from dejavu.engine.backends import make_engine
from dejavu.engine.options import EngineOptions
from dejavu.kernels.screen import Screen
from dejavu.model.counts import Counts
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import AllHeads, LayerAdapter
from dejavu.model.selectors.dense import ALL_HEADS, ALL_NEURONS
from dejavu.model.transformer import DENSE, Transformer

Layers = tuple[LayerAdapter, ...]
CHECK_PROMPT, CHECK_STEPS = 8, 8
GREEDY_TOKENS = 256  # over which a peer's choice of the next token is compared with ours
# Mean |difference| of the logits in their standard deviations; a peer below fp32 also rounds activations its own way.
FP32_LIMIT, LIMIT, PEER_LIMIT = 0.02, 0.1, 0.2
VALUE_LIMIT = 0.3  # where values are left out by their size: see _by_value


class Peer(Protocol):
    """Another program that decodes one sequence. mode: its name in --against; version: its own, in words; model: what it runs,
    by name, never a path (of an exported folder: the folder's own name); device: cpu, or a GPU as torch calls it."""

    mode: str
    version: str
    dtype: str
    model: str
    threads: int
    device: str

    def prefill(self, ids: Sequence[int]) -> None:
        """Forget the sequence and read these tokens."""
        ...

    def step(self, token_id: int) -> Tensor | None:
        """Read one more token; logits [V] of the next one, or None where the program keeps them to itself."""
        ...

    def logits(self, ids: Sequence[int]) -> Tensor | None:
        """Logits [T, V] of these tokens by one pass, for checks; None where the program has none. A prefill comes next."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def export_name(name: str) -> str:
    """The name of the folder that a model is exported to, which is what a peer that loads it calls it."""
    return name.replace("/", "--")


def runs_same(peer: Peer, name: str) -> bool:
    """Whether a peer runs the model of that name, so that its logits must be ours."""
    return peer.model in (name, export_name(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the model: mode dense, sparse, sparse+heads or screened; its predictors (None: dense); what selection they plant;
    its screened head (None: the full one)."""

    mode: str
    layers: Layers | None = None
    selection: str | None = None
    screen: Screen | None = None

    def options(self, options: EngineOptions) -> EngineOptions:
        """Those of its engine."""
        return replace(options, screen=self.screen)


DENSE_VARIANT = Variant(mode="dense")


def selects_heads(layers: Layers | None) -> bool:
    """Whether attention heads are selected, by predictors of their own."""
    return any(layer.heads.selects for layer in layers or ())


def method_of(layers: Layers | None) -> str | None:
    """What selects, joined by + where layers differ; None where nothing does."""
    return "+".join(dict.fromkeys(method for layer in layers or () for method in layer.methods)) or None


def variants_of(layers: Layers | None, *, selection: str | None = None, screen: Screen | None = None) -> list[Variant]:
    """The sparse variants that an adapter offers, each with its screened head; with that alone where nothing else is sparse."""
    found = []
    without_heads = tuple(dataclasses.replace(layer, heads=AllHeads()) for layer in layers or ())
    if any(layer.sparse for layer in without_heads):
        found.append(Variant(mode="sparse", layers=without_heads, selection=selection, screen=screen))
    if selects_heads(layers):
        found.append(Variant(mode="sparse+heads", layers=layers, selection=selection, screen=screen))
    if screen is not None and not found:
        found.append(Variant(mode="screened", screen=screen))
    return found


def variants_at(
    model: Transformer,
    layers_for: Callable[[str | None, float | None], Layers | None],
    ids: Sequence[int],
    *,
    densities: Sequence[float] = (),
    head_densities: Sequence[float] = (),
    selections: Sequence[str] = (),
    inputs_alike: bool = False,
    screen: Screen | None = None,
) -> list[Variant]:
    """Dense, and the sparse variants at every requested selection, MLP density and head density; as the predictors are where none is named.

    layers_for(selection, density): predictors, whose thresholds are then set on the ids, see `density.rethresholded`. inputs_alike: where
    inputs are selected and no head density is named, those of attention have the MLP's. screen: of what is not dense.
    """
    found = [DENSE_VARIANT]
    for selection in selections or (None,):
        for density in densities or (None,):
            layers = layers_for(selection, density)
            retargeted = density is not None or bool(head_densities)
            require(
                layers is not None or not retargeted,
                "a density needs predictors (or gates or inputs): give an adapter, or --synthetic for planted ones",
            )
            alike = density if inputs_alike and any(layer.inputs.selects for layer in layers or ()) else None
            for index, head_density in enumerate(head_densities or (alike,)):
                if layers is not None and retargeted:
                    chosen = rethresholded(model, layers, ids, mlp_density=density, head_density=head_density)
                else:
                    chosen = layers
                # The MLP alone does not depend on the head density, which is of attention where inputs are selected: once is enough.
                again = index == 0 or any(layer.inputs.selects for layer in chosen or ())
                found += [
                    variant for variant in variants_of(chosen, selection=selection, screen=screen) if again or variant.mode != "sparse"
                ]
    return found


def _count(model: Transformer) -> tuple[int, int]:
    """Tokens of a check, and how many of them are its prompt."""
    count = min(CHECK_PROMPT + CHECK_STEPS, model.config.max_positions)
    return count, max(1, count - CHECK_STEPS)


@torch.inference_mode()
def _forward(model: Transformer, layers: Layers | None, ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of the steps of a check, by one (masked) forward pass."""
    count, prompt = _count(model)
    ids_BT = torch.tensor([list(ids[:count])], device=model.device)
    sparse_BT = torch.arange(count, device=ids_BT.device)[None] >= prompt
    return model(ids_BT, DENSE if layers is None else MaskedSelection(layers, sparse_BT))[0, prompt:].cpu()


@torch.inference_mode()
def _dense(model: Transformer, ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of all tokens."""
    return model(torch.tensor([list(ids)], device=model.device))[0].cpu()


def _error(found_TV: Tensor, expected_TV: Tensor) -> float:
    """Of the logits that there are: a screened head leaves the others at -inf."""
    there = found_TV != -torch.inf
    return float((found_TV.float() - expected_TV)[there].abs().mean() / expected_TV.std())


def _by_value(layers: Layers | None) -> bool:
    """Whether gates or inputs of some size are left out: a value at its threshold may fall on either side of it, and later ones follow.

    Seen at half of SmolLM2's gates: 0.035 in fp32, 0.105 in fp16. What is computed wrong is off by 1 and more.
    """
    return any(selector.by_value for layer in layers or () for selector in layer.selectors)


def check_mode(model: Transformer, layers: Layers | None, ids: Sequence[int], options: EngineOptions, batch: int = 1) -> None:
    """Decode a few tokens of so many rows, each of another stretch of the ids, and compare with (masked) forward passes: of the first rows
    and the last. Raises ValueError where they are not the same model."""
    count, prompt = _count(model)
    texts = [[ids[(row * count + t) % len(ids)] for t in range(count)] for row in range(batch)]
    engine = make_engine(model, layers, replace(options, num_slots=batch, cache_tokens=batch * (count + options.page_size)))
    for row, text in enumerate(texts):
        engine.prefill(row, text[:prompt])
    steps = [engine.step([text[t] for text in texts], list(range(batch))) for t in range(prompt, count)]
    ran = None if layers is None else _as_run(model, layers, [step.counts for step in steps])
    for row in sorted({0, min(1, batch - 1), batch - 1}):
        found = torch.stack([step.logits_BV[row] for step in steps]).cpu()
        assert options.screen is not None or (found != -torch.inf).all(), "a full head has every logit"
        error = _error(found, _forward(model, ran, texts[row]))
        limit = VALUE_LIMIT if _by_value(layers) else FP32_LIMIT if engine.info.dtype == "fp32" else LIMIT
        of_rows = "" if batch == 1 else f" in row {row} of {batch}"
        require(
            error < limit,
            f"backend {options.backend!r} decodes other logits{of_rows} than the forward pass"
            f" (error {error:.3g}, limit {limit}): not timed",
        )


def _as_run(model: Transformer, layers: Layers, counts: Sequence[Counts]) -> Layers:
    """The layers without the selection of those that an engine ran dense in every step and row, as it may where that is faster."""
    least_L = [torch.cat(parts).amin(0).tolist() for parts in zip(*((each.neurons, each.heads) for each in counts), strict=True)]
    found = []
    for layer, neurons, heads in zip(layers, *least_L, strict=True):
        if neurons == model.config.intermediate_size:
            layer = replace(layer, neurons=ALL_NEURONS)
        found.append(replace(layer, heads=ALL_HEADS) if heads == model.config.num_heads else layer)
    return tuple(found)


def check_peer(peer: Peer, model: Transformer, ids: Sequence[int], name: str) -> str:
    """Compare a peer that runs our model with our dense forward pass: the logits of its steps and of one pass, as far as it tells
    them, and the greedy tokens of these. A note on how many agree; ValueError where the logits differ, or a token does in fp32."""
    count, prompt = _count(model)
    peer.prefill(ids[:prompt])
    rows = [peer.step(token) for token in ids[prompt:count]]
    stepped = [row.float().cpu() for row in rows if row is not None]
    whole = ids[: min(GREEDY_TOKENS, model.config.max_positions, len(ids))]
    found = {"step": torch.stack(stepped) if len(stepped) == len(rows) else None, "pass": peer.logits(whole)}
    note = f"{peer.mode} gives no logits: its own were not compared with ours"
    for found_TV, expected_TV in ((found["step"], _forward(model, None, ids)), (found["pass"], _dense(model, whole))):
        if found_TV is None:
            continue
        require(
            found_TV.shape == expected_TV.shape,
            f"{peer.mode} has logits {list(found_TV.shape)} where ours are {list(expected_TV.shape)}: not timed",
        )
        error, limit = _error(found_TV, expected_TV), FP32_LIMIT if peer.dtype == "fp32" else PEER_LIMIT
        require(error < limit, f"{peer.mode} decodes other logits than {name} dense (error {error:.3g}, limit {limit}): not timed")
        same_T = found_TV.argmax(-1) == expected_TV.argmax(-1)
        # How much less likely ours finds the peer's token than its own: a tie may be broken either way.
        behind_T = expected_TV.amax(-1) - expected_TV.gather(-1, found_TV.argmax(-1, keepdim=True))[:, 0]
        exact = peer.dtype != "fp32" or bool((behind_T <= limit * expected_TV.std()).all())
        require(exact, f"{peer.mode} fp32 picks other tokens than {name} dense: not timed")
        note = f"{peer.mode} {peer.dtype} picks the same next token as {name} dense after {int(same_T.sum())} of {len(same_T)} tokens"
    return note
