"""An adapter: predictors, thresholds and provenance for one checkpoint; in memory and as a folder.

On disk: `config.json` (AdapterConfig), `adapter.safetensors`, `README.md`, a card rendered from the config, and perhaps
`generation_config.json`, how text is to be drawn. The tensors of predictors are told in selectors/predicted.py, those of changed weights
in lora.py. Names are exact. Selection without predictors has thresholds in `config.json` and no tensors.
In memory their matrices stay int8, so that what calibration measured is what every engine runs.

Letters: D model
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dejavu.config import EXACT_ZERO_ACTIVATIONS, ModelConfig, SamplingConfig, require, shown
from dejavu.files import new_folder, read_object, read_safetensors, write_json, write_safetensors, write_text
from dejavu.kernels.quantized import Matrix, QuantizedMatrix, wide
from dejavu.kernels.screen import Screen
from dejavu.model.adapter_config import SCHEMA_VERSIONS, AdapterConfig, LayerConfig
from dejavu.model.card import card
from dejavu.model.fingerprint import tensor_digest
from dejavu.model.foreign_lora import refuse_peft
from dejavu.model.generation_config import GENERATION_FILE, generation_values, read_generation_config
from dejavu.model.lora import LayerLora, adapted_model, lora_tensors, merged_block, read_lora
from dejavu.model.predictor import Predictor
from dejavu.model.screen_tensors import read_screen, screen_tensors
from dejavu.model.selectors import SELECTORS, LayerAdapter
from dejavu.model.transformer import Transformer

CONFIG_FILE, TENSOR_FILE, CARD_FILE = "config.json", "adapter.safetensors", "README.md"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """layers[i] holds the predictors of layer i (on the CPU after load); config says where they come from.

    lora[i]: how the weights of layer i change, where they do. screen: its screened head, on the CPU, where it has one. sampling: how text
    is drawn with it where nothing is asked; None: as without it. notes: lines for the user on what its files hold. What runs a model takes
    `attached(model)`.
    """

    layers: tuple[LayerAdapter, ...]
    config: AdapterConfig
    lora: tuple[LayerLora, ...] | None = None
    screen: Screen | None = None
    sampling: SamplingConfig | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert (self.lora is None) == (self.config.lora is None), "config and changes of weights differ"
        assert (self.screen is None) == (self.config.screened_head is None), "config and screened head differ"
        assert self.lora is None or len(self.lora) == len(self.layers), "changes of other layers"
        assert [entry.layer for entry in self.config.layers] == list(range(len(self.layers))), "config and layers differ in their layers"
        for entry, layer in zip(self.config.layers, self.layers, strict=True):
            held = layer.stored
            assert entry.entries.keys() == held.keys(), f"layer {entry.layer}: config and selectors differ"
            for key, selector in held.items():
                difference = selector.difference(entry.entries[key])
                assert difference is None, f"layer {entry.layer}: {difference}"

    @property
    def digest(self) -> str:
        """16 hex digits that name what this adapter does: method, layers, and values of every tensor, without where they come from."""
        entries = [entry.to_dict() for entry in self.config.layers]
        changes = None if self.config.lora is None else self.config.lora.to_dict()
        found = hashlib.sha256(json.dumps([self.config.method, entries, changes], sort_keys=True).encode())
        for layer in self.layers:
            for selector in layer.selectors:
                found.update(b"".join(tensor_digest(wide(values).float()) for values in selector.tensors))
        for index, lora in enumerate(self.lora or ()):
            tensors = lora_tensors(index, lora)
            found.update(b"".join(name.encode() + tensor_digest(tensors[name].float()) for name in sorted(tensors)))
        if self.screen is not None:
            found.update(repr(self.screen.threshold).encode())
            found.update(b"".join(tensor_digest(tensor.float()) for tensor in self.screen.tensors))
        return found.hexdigest()[:16]

    @property
    def handed_over(self) -> bool:
        return False

    def tensors(self) -> Iterator[Tensor]:
        """What predictors and changes of weights lie in."""
        matrices: list[Matrix] = []
        for lora in self.lora or ():
            matrices += [factor for factors in lora.factors.values() for factor in factors]
            yield from lora.norms.values()
        for layer in self.layers:
            for selector in layer.selectors:
                matrices += selector.tensors
        if self.screen is not None:
            yield from self.screen.tensors
        for matrix in matrices:
            yield from (matrix,) if isinstance(matrix, Tensor) else matrix.tensors

    def __repr__(self) -> str:
        config, merged = self.config, "" if self.lora is None else ", changes weights"
        merged += "" if config.screened_head is None else f", screened head of {config.screened_head.tokens:,.0f} tokens"
        densities = f"mlp_density={config.mlp_density:.3f}, head_density={config.head_density:.3f}"
        facts = f"{config.method!r} of {config.base_id!r}, {len(self.layers)} layers, {densities}, budget={config.budget}{merged}"
        return f"Adapter({facts}{'' if self.sampling is None else f', {self.sampling.words}'})"

    def with_base(self, base_hash: str) -> Adapter:
        """This adapter accepting one more form of its base."""
        if base_hash in self.config.base_hashes:
            return self
        config = dataclasses.replace(self.config, base_hashes=(*self.config.base_hashes, base_hash))
        return dataclasses.replace(self, config=config)

    def merged(self) -> Adapter:
        """The same selection for the model that the changes of weights make (`adapted_model`), of which no hash is known yet."""
        assert self.config.lora is not None, "an adapter that changes weights"
        method = "predicted" if self.config.lora.activation is None else "exact"
        version = SCHEMA_VERSIONS[method]
        config = dataclasses.replace(self.config, method=method, schema_version=version, lora=None, base_hashes=())
        return dataclasses.replace(self, config=config, lora=None)

    def attached(self, model: Transformer, *, dtype: str | None = None) -> tuple[LayerAdapter, ...]:
        """The layers to run the model with, on its device, changed weights merged into copies of its own.

        dtype: of the engine, see merged_block; None takes the model's.
        """
        layers = tuple(layer.to(model.device) for layer in self.layers)
        if self.lora is None or self.config.lora is None:
            return layers
        model.require_weights()
        settings = {"scale": self.config.lora.scale, "activation": self.config.lora.activation, "dtype": dtype}
        blocks = (merged_block(block, lora, **settings) for block, lora in zip(model.blocks, self.lora, strict=True))
        return tuple(dataclasses.replace(layer, block=block) for layer, block in zip(layers, blocks, strict=True))

    def save(self, folder: str | Path) -> None:
        """Write the adapter folder, whole or not at all. Predictors must be `quantized`: else what was measured is not what is stored."""
        with new_folder(folder) as partial:
            write_adapter(self, partial)

    @staticmethod
    def load(folder: str | Path, *, model: ModelConfig, base_hash: str, accept: bool = False) -> Adapter:
        """Read and check an adapter folder against the model it is to run with.

        Raises ValueError naming both hashes where it belongs to another model (unless `accept`: the caller vouches for the
        base, see `with_base`), the layer whose predictor is missing, a wrong shape, a truncated file, an unknown key.
        """
        folder = Path(folder).expanduser().absolute()
        refuse_peft(folder)
        require((folder / CONFIG_FILE).is_file(), f"adapter not found: {folder} has no {CONFIG_FILE}")
        config = _read_config(folder)
        if base_hash not in config.base_hashes and not accept:
            hashes = ", ".join(config.base_hashes)
            raise ValueError(
                f"adapter {folder} belongs to {config.base_id} with base hash {hashes}, but the model's is {base_hash}; "
                "use its own model, train an adapter for this one, or pass --accept-base"
            )
        entries = {entry.layer: entry for entry in config.layers}
        count = model.num_layers
        missing = [layer for layer in range(count) if layer not in entries]
        require(not missing, f"predictor for layer {missing[0] if missing else 0} not found: {folder / CONFIG_FILE}")
        require(
            config.method != "exact" or model.activation in EXACT_ZERO_ACTIVATIONS,
            f"adapter {folder} has method exact, which needs a gate with exact zeros, and this model has {model.activation}",
        )
        require(len(config.layers) == count, f"{folder / CONFIG_FILE} lists {len(config.layers)} layers, the model has {count}")
        config = dataclasses.replace(config, layers=tuple(entries[layer] for layer in range(count)))
        tensors = read_safetensors(folder / TENSOR_FILE)
        layers = tuple(read_layer(entry, tensors, model, folder / TENSOR_FILE) for entry in config.layers)
        lora = None if config.lora is None else tuple(read_lora(i, config.lora, tensors, model, folder / TENSOR_FILE) for i in range(count))
        screen = None if config.screened_head is None else read_screen(config.screened_head, tensors, model, folder / TENSOR_FILE)
        require(not tensors, f"{folder / TENSOR_FILE} has tensors that its {CONFIG_FILE} does not list: {', '.join(sorted(tensors)[:5])}")
        generation = read_generation_config(folder, of=" of the adapter")
        return Adapter(layers=layers, config=config, lora=lora, screen=screen, sampling=generation.sampling, notes=generation.notes)


def merged_model(model: Transformer, adapter: Adapter | None) -> Transformer:
    """The model with the adapter's changes of weights, merged in fp32. Raises ValueError where there are none."""
    if adapter is None or adapter.lora is None:
        raise ValueError(
            "--merge writes an adapter's changed weights, and there are none; give an adapter of dejavu adapt, or leave it out"
        )
    return adapted_model(model, adapter.attached(model))


def quantized(predictor: Predictor, mean_D: Tensor | None = None) -> Predictor:
    """The predictor as an adapter stores it, on its device: A and B int8 per row, bias fp32.

    mean_D: the mean of its inputs. What rounding does to the score there goes into the bias: where a norm's bias is large, inputs are
    nearly constant, and the rounding of A times a constant would drown what varies.
    """
    A_RD, B_OR = wide(predictor.A_RD).float(), wide(predictor.B_OR).float()
    stored = dataclasses.replace(
        predictor, A_RD=QuantizedMatrix.of(A_RD, "int8"), B_OR=QuantizedMatrix.of(B_OR, "int8"), bias_O=predictor.bias_O.float()
    )
    if mean_D is None:
        return stored
    rounded_D = wide(stored.B_OR) @ (wide(stored.A_RD) @ mean_D)
    return dataclasses.replace(stored, bias_O=stored.bias_O + B_OR @ (A_RD @ mean_D) - rounded_D)


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the files of an adapter into an existing folder: for one that is itself being put together."""
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(adapter.layers):
        for key, selector in layer.stored.items():
            tensors |= selector.file_tensors(f"layers.{index}.{key}")
    for index, lora in enumerate(adapter.lora or ()):
        tensors |= lora_tensors(index, lora)
    if adapter.screen is not None:
        tensors |= screen_tensors(adapter.screen)
    write_safetensors(folder / TENSOR_FILE, tensors)
    write_json(folder / CONFIG_FILE, adapter.config.to_dict())
    if adapter.sampling is not None:
        write_json(folder / GENERATION_FILE, generation_values(adapter.sampling))
    write_text(folder / CARD_FILE, card(adapter.config))


def _read_config(folder: Path) -> AdapterConfig:
    values = read_object(folder / CONFIG_FILE)
    model = "model_type" in values and "base_hashes" not in values
    require(not model, f"{folder} is a model ({shown(values.get('model_type'))}), not an adapter; give the folder of an adapter")
    try:
        return AdapterConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error


def read_layer(entry: LayerConfig, tensors: dict[str, Tensor], model: ModelConfig, path: Path) -> LayerAdapter:
    """The selectors of a layer; takes their tensors, of the file `path`, out of `tensors`."""
    return LayerAdapter.of(SELECTORS[key].read(each, entry.layer, tensors, model, path) for key, each in entry.entries.items())
