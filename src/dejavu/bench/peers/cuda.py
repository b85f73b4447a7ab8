"""transformers on the very tensors that our engine reads: no export, no second copy of the weights, on any device.

In: a Transformer. Out: transformers' own model of its family, built without memory and given views of our parameters. Ours
keep `o` and `down` a row per input, so theirs are the transposes, which cost nothing.

    transformers          eager, its own cache
    transformers-compile  a cache of fixed size and torch.compile(mode="reduce-overhead"), as one graph where that works
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dejavu.bench.peers.cpu import PeerCandidate, open_candidate
from dejavu.bench.peers.transformers import TransformersDecoder, quiet
from dejavu.bench.variants import Peer
from dejavu.config import ModelConfig, require
from dejavu.model.families import FAMILIES, config_to_hf, is_transposed
from dejavu.model.transformer import Transformer

VIEW_PEERS = ("transformers", "transformers-compile")


class TransformersViews(TransformersDecoder):
    """A `Peer` that decodes with the model's own tensors, in their dtype, where they are. name: of the model. fullgraph: a step
    that torch.compile cannot take as one graph is an error."""

    def __init__(
        self, model: Transformer, config: ModelConfig, compiled: bool, *, name: str, threads: int | None = None, fullgraph: bool = True
    ) -> None:
        options = {"dynamic": False, "mode": "reduce-overhead", "fullgraph": fullgraph} if compiled else None
        threads = torch.get_num_threads() if threads is None else threads
        super().__init__(network_of_views(model, config), model=name, threads=threads, compile_options=options)


def network_of_views(model: Transformer, config: ModelConfig) -> Any:
    """transformers' causal language model of that config, whose parameters are views of the model's. ValueError where it has
    a parameter that ours lacks, or the other way round."""
    transformers = importlib.import_module("transformers")
    family, weight = FAMILIES[config.family], model.embed.weight
    with quiet(transformers):
        foreign = transformers.AutoConfig.for_model(**config_to_hf(config))
        with torch.device("meta"):
            net = transformers.AutoModelForCausalLM.from_config(foreign, dtype=weight.dtype).eval()
    require(not family.fused and not family.norm_shift, f"tensors of {config.family} are not stored as ours: there are no views of them")
    for ours, parameter in model.named_weights():
        owner, _, last = family.full_name(family.foreign_name(ours, config)).rpartition(".")
        value = parameter.detach().t() if is_transposed(ours) else parameter.detach()
        module = net.get_submodule(owner)
        shape = getattr(module, last).shape
        require(shape == value.shape, f"transformers has {owner}.{last} of shape {list(shape)} where ours is {list(value.shape)}")
        setattr(module, last, nn.Parameter(value, requires_grad=False))
    if config.tied_head:
        net.get_output_embeddings().weight = net.get_input_embeddings().weight
    # What a module works out from the config when it is built (rotary frequencies) has no value on the meta device: built again.
    for name, module in list(net.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            owner, _, last = name.rpartition(".")
            setattr(net.get_submodule(owner), last, type(module)(config=net.config).to(weight.device))
    missing = [name for name, tensor in (*net.named_parameters(), *net.named_buffers()) if tensor.is_meta]
    require(not missing, f"transformers has {', '.join(missing)}, for which our model has no tensor")
    return net


def open_views(names: Sequence[str], model: Transformer, *, name: str) -> tuple[list[Peer], list[str]]:
    """The peers among VIEW_PEERS that can run the model, to be closed by the caller, and a note for each that cannot, why."""
    opened: list[Peer] = []
    notes: list[str] = []
    for label in names:
        assert label in VIEW_PEERS, label
        for candidate in _candidates(label, model, name):
            peer, said = open_candidate(candidate, 1)  # all threads, as ours: a peer on the same device is not tuned
            notes += [] if said is None else [said]
            if peer is not None:
                opened.append(peer)
                break
            torch.compiler.reset()
    return opened, notes


def _candidates(label: str, model: Transformer, name: str) -> list[PeerCandidate]:
    """In the order in which they are tried."""
    if label == "transformers":
        return [PeerCandidate(label=label, make=lambda: TransformersViews(model, model.config, False, name=name))]

    def compiled(fullgraph: bool) -> Callable[[], TransformersViews]:
        return lambda: TransformersViews(model, model.config, True, name=name, fullgraph=fullgraph)

    return [
        PeerCandidate(label=f"{label} (as one graph)", make=compiled(True)),
        PeerCandidate(label=f"{label} (with graph breaks)", make=compiled(False)),
    ]
