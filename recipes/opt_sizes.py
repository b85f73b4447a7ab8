"""The shapes and schedules that `train_opt.py` knows by name (`--size`). Every field can be overridden on its command line."""

from __future__ import annotations

from dataclasses import dataclass

from dejavu.config import Config, ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(Config):
    """One training run. Rates are per step of `batch` sequences; densities are fractions of a layer's neurons."""

    layers: int
    hidden: int
    heads: int
    neurons: int
    vocab_size: int = 8192
    context: int = 1024
    steps: int
    batch: int = 128
    micro_batch: int = 128
    learning_rate: float = 4e-3
    vector_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    # Density is steered, not penalised: the biases of a layer are shifted until its density follows the target, which
    # falls from a half to `density_target` between these fractions of the run. A penalty kills whole layers (docs/log.md).
    density_target: float = 0.035
    anneal_start: float = 0.03
    anneal_stop: float = 0.35
    steer_gain: float = 0.03
    # A neuron that fires more rarely than this has its bias lifted, so that neurons stay contextual instead of dying.
    rate_floor: float = 1e-5
    lift: float = 4.0
    control_interval: int = 4
    # Low-rank predictors are trained along from `foresight_start` on. The mass they do not foresee is penalised, and from
    # `mask_start` on a `mask_share` of the sequences run with the neurons they select, `mask_density` of a layer.
    predictor_rank: int = 64
    foresight_start: float = 0.4
    foresight_penalty: float = 0.3
    mask_start: float = 0.55
    mask_share: float = 0.9
    mask_density: float = 0.08
    # In the masked sequences only the heads that add most to the residual stream are kept; 0 keeps all.
    heads_kept: int = 0
    seed: int = 0

    def model_config(self) -> ModelConfig:
        return ModelConfig(
            family="opt",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.neurons,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.heads,
            head_dim=self.hidden // self.heads,
            max_positions=self.context,
            activation="relu",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            bos_token_id=0,
            eos_token_ids=(0,),
        )


SIZES: dict[str, Recipe] = {
    # Seconds on a CPU: for tests of the recipe itself.
    "nano": Recipe(
        layers=2,
        hidden=64,
        heads=4,
        neurons=256,
        vocab_size=512,
        context=64,
        steps=20,
        batch=8,
        micro_batch=4,
        warmup_steps=4,
        control_interval=2,
        predictor_rank=8,
    ),
    # The bundled opt-mini.
    "mini": Recipe(layers=6, hidden=384, heads=12, neurons=3072, steps=4200),
    "small": Recipe(layers=12, hidden=768, heads=12, neurons=6144, steps=6000, micro_batch=64, learning_rate=2e-3, predictor_rank=128),
}
