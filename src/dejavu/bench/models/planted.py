"""Models that are made up on the device they run on, with contextual sparsity that predictors really predict.

In: a shape's name, a device and dtype, the natural density, the predictors' rank. Out: a model, and a predictor for the MLP and the
heads of every layer. `density.rethresholded` gives them thresholds, `planted_quality` says what they then miss.

An MLP's first matrix (up; gate where gated) is planted: with x the normed input, whose values have variance 1,

    W = U diag(s) V^T + noise      V orthonormal [D, P], P = 2 x rank; U normal [F, P]; s_p^2 falls as exp(-2 p / rank)

each row of norm about 1, NOISE of its square being noise. The predictor has the first `rank` columns of U diag(s) and V, in int8:
84 % of what moves W x, so it finds most of what fires, not all. The bias of neuron f is -z |w_f| with z the normal quantile of
1 - density: each neuron fires on that share of the tokens, each token has its own neurons. An MLP without biases has them all the same
where its norm has one: the norm gives every token CONSTANT in the first place of x, and there W has -z |w_f| / CONSTANT. Selections,
by the share r_f of the tokens on which neuron f fires, of mean `density` (which decides what several tokens fire together):

    uniform      all the same
    hot-set      1/2 for HOT_SHARE of what fires, the rest the same
    published    a Beta distribution of PUBLISHED: where a tenth is selected, 2, 4 and 8 tokens select the 15, 21 and 29 % of Polar
                 Sparsity (arXiv 2505.14884), as measured for OPT-6.7B

The residual stream starts at variance 1. All MLPs together add MLP_SHARE to it, which a wrong one cannot hide, and what they
would add to every token alike is taken off by down's bias; without one rows of down come in pairs that add it up to nothing. All
attention blocks together add at most ATTENTION_SHARE: little for each layer, as the predictor reads the input of attention
(lookahead 1) and has to foretell what is fired after it. The final norm has weights of both signs, so that a tied head does not
just find the token that was read, at a size that gives logits LOGIT_SPREAD. Which heads a token needs is not planted: their
predictors are random, each token selecting its own, and what a head that was left out adds is lost. Weights are the same for one
seed in every dtype (rounded), and a slice is the first layers of the whole.

Letters: B batch  T tokens  D model  F neurons  P planted rank  R predictor rank  O outputs  V vocabulary
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn

from dejavu.bench.models.density import MAX_TOKENS
from dejavu.bench.models.random import HOT_SHARE, shape_of
from dejavu.config import ModelConfig, require
from dejavu.kernels.activation import activate
from dejavu.kernels.dtypes import TORCH_DTYPES
from dejavu.kernels.memory import available_bytes, free_gpu_bytes
from dejavu.model.adapter import quantized
from dejavu.model.families import empty_model, parameter_shapes
from dejavu.model.masked import MaskedSelection
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import LayerAdapter, PredictedHeads, PredictedNeurons
from dejavu.model.transformer import Block, LayerInputs, Selection, Transformer

PLANTABLE = {"relu": 1, "relu2": 2}  # activations, and the power of what is positive
PLANTED_DTYPES = ("fp32", "fp16", "bf16")
PLANTED_SELECTIONS = ("uniform", "hot-set", "published")
PUBLISHED = 2.5  # the sum of the Beta distribution's parameters
RATES = (1e-4, 0.98)  # a neuron that never fires has no moments, and one that always does no bias
RANK, HEAD_RANK = 256, 32
NOISE = 0.05  # share of the variance of W x that is of full rank
MLP_SHARE, ATTENTION_SHARE = 1.0, 0.25  # of the embedding's variance
SHARPNESS = 2.0  # standard deviation of q.k / sqrt(K): a head attends to some tokens, not to the mean of all
LOGIT_SPREAD = 4.0
CONSTANT = 4.0  # what the norm before an MLP without biases gives every token in one place
MOMENT_SAMPLES = 2**16  # of an activation, whose mean square is measured
CHUNK = 2**26  # values that are held in fp32 at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedModel:
    """A made-up model and its predictors, whose thresholds are yet to be set. dtype: of the weights.

    density: the share of neurons meant to fire. layers_of_full: how many layers the whole shape has; config has those of the slice.
    """

    name: str
    model: Transformer
    config: ModelConfig
    dtype: str
    num_parameters: int
    layers: tuple[LayerAdapter, ...]
    layers_of_full: int
    density: float
    rank: int
    selection: str

    @property
    def is_slice(self) -> bool:
        return self.config.num_layers < self.layers_of_full

    @property
    def label(self) -> str:
        """The name, and what part of the shape it is: "opt-66b[16 of 64 layers]"."""
        return f"{self.name}[{self.config.num_layers} of {self.layers_of_full} layers]" if self.is_slice else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How near sparse logits are to dense ones: mean KL(dense || sparse) per token, and how often the likeliest token is the same."""

    kl: float
    same_argmax: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedQuality:
    """What predictors with thresholds find and miss, over so many tokens.

    natural_density: share of neurons that fire (activation not zero) in the dense model. mlp_density, head_density: selected, in the
    sparse model with all its predictors. recall: of the neurons that fire there, the share selected; chance would find mlp_density.
    mlp: logits with the MLPs' predictors alone; mlp_and_heads: with the heads' too, None where there are none.
    """

    tokens: int
    natural_density: float
    mlp_density: float
    head_density: float
    recall: float
    natural_density_L: tuple[float, ...]
    mlp_density_L: tuple[float, ...]
    recall_L: tuple[float, ...]
    mlp: Agreement
    mlp_and_heads: Agreement | None


def planted_model(
    name: str,
    *,
    device: str | torch.device,
    dtype: str,
    density: float,
    rank: int = RANK,
    num_layers: int | None = None,
    selection: str = "uniform",
    seed: int = 0,
) -> PlantedModel:
    """A model of that shape (see synthetic.SHAPES), or of its first num_layers layers. The same for one seed and kind of device.

    Raises ValueError for an unknown name, a shape without ReLU, and where the memory is not there, before any is taken.
    """
    return plant(
        shape_of(name), name=name, device=device, dtype=dtype, density=density, rank=rank, num_layers=num_layers, selection=selection,
        seed=seed,
    )  # fmt: skip


def plant(
    config: ModelConfig,
    *,
    name: str,
    device: str | torch.device,
    dtype: str,
    density: float,
    rank: int = RANK,
    num_layers: int | None = None,
    selection: str = "uniform",
    seed: int = 0,
) -> PlantedModel:
    """planted_model for any architecture: `config` is that of the whole model."""
    require(dtype in PLANTED_DTYPES, f"dtype {dtype!r} is not available for a planted model; choose one of {', '.join(PLANTED_DTYPES)}")
    require(0 < density < 1, f"density must lie between 0 and 1, not {density:g}")
    require(
        selection in PLANTED_SELECTIONS,
        f"selection {selection!r} cannot be planted; choose one of {', '.join(PLANTED_SELECTIONS)}",
    )
    size, full = config.hidden_size, config.num_layers
    require(1 <= rank <= size, f"rank must lie between 1 and {size} (the hidden size), not {rank}")
    require(num_layers is None or 1 <= num_layers <= full, f"layers must lie between 1 and {full} (those of {name}), not {num_layers}")
    _check_architecture(name, config)
    config = dataclasses.replace(config, num_layers=num_layers or full)
    device = torch.device(device)
    require(device.type != "cuda" or torch.cuda.is_available(), f"device {device} is not available: torch finds no GPU; take cpu")
    check_planted_memory(name, config, device=str(device), dtype=dtype, rank=rank, available=free_bytes(device))

    model, makers = empty_model(config), Makers(device=device, dtype=TORCH_DTYPES[dtype], seed=seed)
    fill_ends(model, makers.ends())
    layers = [
        fill_layer(block, makers.layer(index), index, full, density=density, rank=rank, selection=selection)
        for index, block in enumerate(model.blocks)
    ]
    model.fill_frequencies(device)
    return PlantedModel(
        name=name,
        model=model.eval(),
        config=config,
        dtype=dtype,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=tuple(layers),
        layers_of_full=full,
        density=density,
        rank=rank,
        selection=selection,
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that this process may still take; None where that is not known."""
    if device.type != "cuda":
        return available_bytes(Path("/"))
    return free_gpu_bytes(str(device))


def check_planted_memory(name: str, config: ModelConfig, *, device: str, dtype: str, rank: int, available: int | None) -> None:
    """Raise ValueError where the model (of config.num_layers layers) and its predictors, fp32, would not fit into so many bytes.

    None: not known. The message has what is needed, and the most layers that fit.
    """
    shapes = parameter_shapes(config)
    layer = sum(math.prod(shape) for key, shape in shapes.items() if key.startswith("layers.0."))
    ends = sum(math.prod(shape) for key, shape in shapes.items() if not key.startswith("layers."))
    largest = max(math.prod(shape) for shape in shapes.values())
    size, neurons, groups = config.hidden_size, config.intermediate_size, config.num_kv_heads
    predictors = rank * (size + neurons) + neurons + HEAD_RANK * (size + groups) + groups
    width = TORCH_DTYPES[dtype].itemsize
    # While a layer is made: U, its int8 form on the way, and chunks of a matrix.
    fixed = ends * width + 4 * (5 * rank * neurons + 3 * min(CHUNK, largest))
    each, margin = layer * width + predictors * 4, 1.03
    needed = (fixed + config.num_layers * each) * margin
    if available is None or needed <= available:
        return
    fits = int((available / margin - fixed) // each)
    fewer = f", or run the first layers only: --layers {fits} at most" if fits >= 1 else ""
    raise ValueError(
        f"{name} in {dtype} with {config.num_layers} layers and their predictors needs about {needed / 1e9:.1f} GB on {device} "
        f"and {available / 1e9:.1f} GB are free; take a smaller shape{fewer}"
    )


def not_plantable(config: ModelConfig) -> list[str]:
    """What of an architecture keeps sparsity from being planted in it, in words."""
    return [
        what
        for what, found in (
            (f"activation {config.activation}", config.activation not in PLANTABLE),
            ("no biases of its MLPs or of the norms before them", not config.mlp_bias and config.norm != "layernorm"),
            ("norms after the blocks or none at the end", not (config.pre_norm and config.final_norm and config.norm_affine)),
            ("an embedding of another width", config.embed_width != config.hidden_size),
        )
        if found
    ]


def _check_architecture(name: str, config: ModelConfig) -> None:
    wrong = not_plantable(config)
    require(not wrong, f"{name} has {', '.join(wrong)}: no sparsity can be planted in it; choose an opt-*, *-relu or minitron-* shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class Makers:
    """Who draws what: each layer and the rest have a stream of random numbers of their own, so that one alone can be made."""

    device: torch.device
    dtype: torch.dtype
    seed: int

    def ends(self) -> Maker:
        return Maker(self.device, self.dtype, self.seed, 0)

    def layer(self, index: int) -> Maker:
        return Maker(self.device, self.dtype, self.seed, index + 1)


class Maker:
    """Random parameters of one layer: drawn in fp32 on the device, rounded chunk by chunk."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int, stream: int) -> None:
        self.device, self.dtype = device, dtype
        self.seed = 1000 * seed + stream
        self.generator = torch.Generator(device).manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def parameter(self, values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(self.device, self.dtype), requires_grad=False)

    def constant(self, like: Tensor, value: float) -> nn.Parameter:
        return self.parameter(torch.full(like.shape, value))

    def matrix(self, like: Tensor, spread: float) -> nn.Parameter:
        """Normal values of that standard deviation, of the shape of `like`."""
        return self.parameter(self.filled(self.room(like), spread))

    def room(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, device=self.device, dtype=self.dtype)

    def filled(self, values: Tensor, spread: float) -> Tensor:
        rows, columns = values.shape
        for part in chunks(rows, columns):
            values[part] = self.normal(part.stop - part.start, columns).mul_(spread)
        return values

    def planted(self, like: Tensor, rank: int) -> tuple[nn.Parameter, Tensor, Tensor, Tensor]:
        """W [F, D], its rows' norms [F], and the best factors of that rank: A [R, D] and B [F, R]."""
        rows, columns = like.shape
        planted = min(2 * rank, columns)
        V_DP = torch.linalg.qr(self.normal(columns, planted)).Q
        square_P = torch.exp(torch.arange(planted, device=self.device) * (-2 / rank))
        U_FP = self.normal(rows, planted) * (square_P * ((1 - NOISE) / square_P.sum())).sqrt()
        values, norm_F = torch.empty(rows, columns, device=self.device, dtype=self.dtype), torch.empty(rows, device=self.device)
        for part in chunks(rows, columns):
            noise = self.normal(part.stop - part.start, columns)
            chunk = torch.addmm(noise, U_FP[part], V_DP.T, beta=math.sqrt(NOISE / columns))
            norm_F[part], values[part] = chunk.norm(dim=1), chunk
        return self.parameter(values), norm_F, V_DP[:, :rank].T.contiguous(), U_FP[:, :rank].contiguous()


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """The rows in parts of at most CHUNK values."""
    step = max(1, CHUNK // columns)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def relu_moments(density: float, power: int = 1) -> tuple[float, float, float]:
    """z, and mean and mean square of relu(a - z) to that power, for a normal of which that share exceeds z."""
    normal = NormalDist()
    z = normal.inv_cdf(1 - density)
    moments = [density, normal.pdf(z) - z * density]  # of relu(a - z) to the powers 0, 1, ...: by parts
    for n in range(2, 2 * power + 1):
        moments.append((n - 1) * moments[n - 2] - z * moments[n - 1])
    return z, moments[power], moments[2 * power]


def firing_rates(selection: str, density: float, neurons: int, *, seed: int) -> np.ndarray:
    """The share of the tokens on which each neuron fires, float64 [neurons]; in any order, the second half in that of the first."""
    half = -(-neurons // 2)  # of an MLP without biases rows of down come in pairs, which must fire alike
    random = np.random.default_rng(seed)
    if selection == "uniform":
        rates = np.full(half, density)
    elif selection == "hot-set":
        hot = min(half - 1, round(2 * HOT_SHARE * density * half))
        rates = np.full(half, (density * half - hot / 2) / (half - hot))
        rates[random.permutation(half)[:hot]] = 0.5
    else:
        rates = random.beta(density * PUBLISHED, (1 - density) * PUBLISHED, half)
    return np.tile(rates.clip(*RATES) if selection != "uniform" else rates, 2)[:neurons]


def fill_layer(block: Block, maker: Maker, index: int, full: int, *, density: float, rank: int, selection: str = "uniform") -> LayerAdapter:
    """Weights of layer `index` of `full`, in which that share of the neurons fires; its predictors."""
    _fill_attention(block, maker, full)
    rates_F = firing_rates(selection, density, block.config.intermediate_size, seed=maker.seed)
    mlp = _fill_mlp(block, maker, full, rates_F=rates_F, rank=rank)
    heads = _head_predictor(block.config, maker, lookahead=min(index, 1))
    return LayerAdapter(neurons=PredictedNeurons(mlp), heads=PredictedHeads(heads))


def fill_random_layer(block: Block, maker: Maker, full: int) -> None:
    """Weights of one of `full` layers of any architecture in which nothing is planted; what it adds is as large as `fill_layer`'s."""
    _fill_attention(block, maker, full)
    config = block.config
    spread = config.hidden_size**-0.5
    act = activate(maker.normal(MOMENT_SAMPLES), config.activation, config.activation_threshold)
    square = float(act.square().mean())  # of what down reads: gated by a value of variance 1
    for name, parameter in [each for each in block.named_parameters() if each[1].is_meta]:
        owner, _, kind = name.rpartition(".")
        of_down = math.sqrt(MLP_SHARE / full / config.intermediate_size / square)
        made = maker.matrix(parameter, of_down if owner == "down" else spread) if parameter.dim() == 2 else None
        setattr(
            block.get_submodule(owner),
            kind,
            maker.constant(parameter, float("norm" in owner and kind == "weight")) if made is None else made,
        )


def fill_ends(model: Transformer, maker: Maker) -> None:
    config, final = model.config, model.final_norm
    model.embed.weight = maker.matrix(model.embed.weight, 1.0)
    if model.position is not None:
        model.position.weight = maker.matrix(model.position.weight, 0.1)
    assert final is not None and final.weight is not None
    final.weight = maker.parameter(maker.normal(config.hidden_size).sign() * (LOGIT_SPREAD * config.hidden_size**-0.5))
    if final.bias is not None:
        final.bias = maker.constant(final.bias, 0.0)
    if model.head is not None:
        model.head.weight = maker.matrix(model.head.weight, 1.0)


def _fill_attention(block: Block, maker: Maker, full: int) -> None:
    size = block.config.hidden_size
    for norm in (block.norm1, block.norm2):
        assert norm is not None and norm.weight is not None
        norm.weight = maker.constant(norm.weight, 1.0)
        if norm.bias is not None:
            norm.bias = maker.constant(norm.bias, 0.0)
    qkv = block.qkv
    qkv.weight = maker.parameter(maker.room(qkv.weight))
    for part, spread in ((qkv.q, SHARPNESS**0.5), (qkv.k, SHARPNESS**0.5), (qkv.v, 1.0)):
        maker.filled(part.weight, spread * size**-0.5)
    block.o.weight = maker.matrix(block.o.weight, math.sqrt(ATTENTION_SHARE / full / block.o.weight.shape[0]))
    for part in (qkv, block.o):
        if part.bias is not None:
            part.bias = maker.constant(part.bias, 0.0)


def _fill_mlp(block: Block, maker: Maker, full: int, *, rates_F: np.ndarray, rank: int) -> Predictor:
    """Parameters of the MLP; the predictor of what fires in it."""
    size, neurons = block.config.hidden_size, block.config.intermediate_size
    power = PLANTABLE[block.config.activation]
    rates, which_F = np.unique(rates_F, return_inverse=True)
    found = torch.tensor([relu_moments(float(rate), power) for rate in rates], dtype=torch.float32)
    z_F, mean_F, square_F = found[torch.from_numpy(which_F)].to(maker.device).unbind(1)
    activated, gated, biased = block.activated, block.config.gated, block.config.mlp_bias
    activated.weight, norm_F, A_RD, B_FR = maker.planted(activated.weight, rank)
    bias_F = -z_F * norm_F
    if biased:
        activated.bias = maker.parameter(bias_F)
    else:
        _make_constant(block, activated.weight, bias_F)
        A_RD[:, 0] = 0.0  # of attention's input, which is no constant there
    if gated:
        block.up.weight = maker.matrix(block.up.weight, size**-0.5)
        if block.up.bias is not None:
            block.up.bias = maker.constant(block.up.bias, 0.0)
    # What varies: an activation less its mean; or one times a value of variance 1 and mean 0.
    varies = float((square_F - (0.0 if gated else mean_F * mean_F)).mean())
    block.down.weight = maker.matrix(block.down.weight, math.sqrt(MLP_SHARE / full / neurons / varies))
    mean_F = mean_F * norm_F**power
    if biased:
        always_D = torch.zeros(size, device=maker.device)
        for part in () if gated else chunks(neurons, size):
            always_D -= mean_F[part] @ block.down.weight[part].float()
        block.down.bias = maker.parameter(always_D)
    elif not gated:
        half = neurons // 2
        first, second = block.down.weight[:half], block.down.weight[half : 2 * half]
        for part in chunks(half, size):
            second[part] = -first[part] * (mean_F[:half] / mean_F[half : 2 * half])[part, None].to(first.dtype)
    return quantized(Predictor(A_RD=A_RD, B_OR=B_FR, bias_O=bias_F, threshold=0.0, lookahead=1))


def _make_constant(block: Block, weight_FD: Tensor, bias_F: Tensor) -> None:
    """Give an MLP without biases these: its norm gives CONSTANT in the first place, whatever the token."""
    norm = block.norm2
    assert norm is not None and norm.weight is not None and norm.bias is not None, "see not_plantable"
    norm.weight[0], norm.bias[0] = 0.0, CONSTANT
    weight_FD[:, 0] = bias_F / CONSTANT


def _head_predictor(config: ModelConfig, maker: Maker, *, lookahead: int) -> Predictor:
    A_RD = maker.normal(HEAD_RANK, config.hidden_size) * config.hidden_size**-0.5
    B_OR = maker.normal(config.num_kv_heads, HEAD_RANK) * HEAD_RANK**-0.5
    bias_O = torch.zeros(config.num_kv_heads, device=maker.device)
    return quantized(Predictor(A_RD=A_RD, B_OR=B_OR, bias_O=bias_O, threshold=0.0, lookahead=lookahead))


class _Fired(Selection):
    """Dense, counting what fires."""

    def __init__(self) -> None:
        self.density_L: list[float] = []

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        self.density_L.append(float((act_BTF != 0).float().mean()))
        return act_BTF


class _Recalled(MaskedSelection):
    """Masked, counting what of that which fires is kept; all of it in a layer where nothing fires."""

    def __init__(self, layers: Sequence[LayerAdapter]) -> None:
        super().__init__(tuple(layers))
        self.recall_L: list[float] = []

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        kept_BTF = super().neurons(layer, inputs, act_BTF)
        fired = int((act_BTF != 0).sum())
        self.recall_L.append(int((kept_BTF != 0).sum()) / fired if fired else 1.0)
        return kept_BTF


@torch.inference_mode()
def planted_quality(made: PlantedModel, layers: Sequence[LayerAdapter], ids: Sequence[int]) -> PlantedQuality:
    """What these predictors miss on the first MAX_TOKENS of the ids: take others than their thresholds come from."""
    model, count = made.model, made.config.num_layers
    assert len(layers) == count, f"{len(layers)} predictors for {count} layers"
    ids_BT = torch.tensor([list(ids[: min(MAX_TOKENS, made.config.max_positions)])], device=model.device)
    fired, alone, whole = _Fired(), _Recalled([LayerAdapter(neurons=layer.neurons) for layer in layers]), _Recalled(layers)
    has_heads = any(layer.heads.selects for layer in layers)
    dense = model(ids_BT, fired).log_softmax(-1)
    mlp = _agreement(dense, model(ids_BT, alone))
    mlp_and_heads = _agreement(dense, model(ids_BT, whole)) if has_heads else None
    sparse = whole if has_heads else alone
    mlp_L, heads_L = sparse.counter.mlp_per_layer(), sparse.counter.heads_per_layer()
    return PlantedQuality(
        tokens=ids_BT.shape[1],
        natural_density=sum(fired.density_L) / count,
        mlp_density=sum(mlp_L) / count,
        head_density=sum(heads_L) / count,
        recall=sum(sparse.recall_L) / count,
        natural_density_L=tuple(fired.density_L),
        mlp_density_L=tuple(mlp_L),
        recall_L=tuple(sparse.recall_L),
        mlp=mlp,
        mlp_and_heads=mlp_and_heads,
    )


def _agreement(dense_BTV: Tensor, logits_BTV: Tensor) -> Agreement:
    """Of log probabilities and logits."""
    sparse_BTV = logits_BTV.log_softmax(-1)
    kl = float((dense_BTV.exp() * (dense_BTV - sparse_BTV)).sum(-1).mean())
    return Agreement(kl=max(0.0, kl), same_argmax=float((dense_BTV.argmax(-1) == sparse_BTV.argmax(-1)).float().mean()))
