"""Train an OPT-architecture ReLU model from nothing, sparse in every layer and dead in none.

    python recipes/train_opt.py --size mini --text 'corpus/*.xz' --valid valid.txt -o runs/opt-mini

In: text. Out, in the folder: `tokenizer.json`, `tokens.npy`, `tokens.json` (what these two were made from),
`checkpoint/` (to resume from), `log.jsonl`, `model/`, the finished model as dejavu bundles it (int8 per row, with its
tokenizer). Running the command again goes on from the last checkpoint.

Loss = cross entropy + mu * sum over layers of mean(a * (1 - p)) / rms(a)
with a the activations and p = sigmoid(score) of a small predictor, trained along with the model on the input of the
attention block: mu makes activations predictable. Towards the end half of the sequences
run with only the predicted neurons, so that the model is good with and without prediction. Sparsity comes from
density control: the biases of a layer are shifted until its density follows a falling target, and a neuron that nearly never
fires is lifted.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

import tokens as text_tokens
from dejavu.config import SamplingConfig
from dejavu.files import read_json, read_text, write_json
from dejavu.model.bundle import write_bundle
from dejavu.model.layers import SeparateQueryKeyValue
from dejavu.model.masked import MaskedSelection
from dejavu.model.predictor import Predictor, mlp_predictor_input
from dejavu.model.selectors import LayerAdapter, PredictedNeurons
from dejavu.model.tokenizer import load_tokenizer
from dejavu.model.transformer import Block, LayerInputs, Selection, Transformer
from dejavu.offline.collect import group_norms
from dejavu.offline.predictors import contribution_loss
from opt_sizes import SIZES, Recipe

SAMPLING = SamplingConfig(temperature=0.8, top_p=0.9)  # at which opt-mini neither loops nor rambles, see sampling.py
SAVE_EVERY = 500  # steps between checkpoints: what an interruption costs at most


class Companion(nn.Module):
    """The predictors trained along with the model, one per layer; only layer 0 must read its own MLP's input."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        rank = recipe.predictor_rank
        self.A = nn.ParameterList(torch.randn(rank, recipe.hidden) / math.sqrt(recipe.hidden) for _ in range(recipe.layers))
        self.B = nn.ParameterList(torch.zeros(recipe.neurons, rank) for _ in range(recipe.layers))
        self.bias = nn.ParameterList(torch.full((recipe.neurons,), -2.0) for _ in range(recipe.layers))

    @staticmethod
    def lookahead(layer: int) -> int:
        return 1 if layer else 0


def layer_with_losses(
    block: Block,
    x: Tensor,
    position: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor,
    threshold: Tensor,
    look_ahead: bool,
    foresee: bool,
    masked: int,
    heads_kept: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer; the spread of its unforeseen activations, the predictor's loss and density, and how often each neuron fired.

    masked: how many sequences run with the neurons (and heads) selected for them; the others keep the model good as it is. Predictors
    learn from all and all are penalised: a model of which only the masked part is foreseen learns to tell the two parts apart.
    """
    attention_in = block.attention_input(x)
    mixed = block.attend(attention_in, position, None)
    if masked and heads_kept < mixed.shape[2]:
        norms = group_norms(block, mixed[:masked].detach(), mixed.shape[2])
        keep = torch.zeros_like(norms).scatter(-1, norms.topk(heads_kept, -1).indices, 1.0)
        mixed = torch.cat([mixed[:masked] * keep[..., None].to(mixed.dtype), mixed[masked:]])
    x, mlp_in = block.after_attention(x, block.o(mixed.flatten(-2)))
    act = block.activations(mlp_in)
    fired = (act > 0).sum((0, 1), dtype=torch.float32)
    unforeseen = predictor_loss = predicted = torch.zeros((), device=x.device)
    if foresee:
        wide = act.float()
        scale = wide.square().mean().sqrt().detach() + 1e-6
        score = F.linear(F.linear((attention_in if look_ahead else mlp_in).detach(), A), B, bias).float()
        predictor_loss = contribution_loss(score, wide.detach() * block.down.weight.detach().float().norm(dim=1))
        unforeseen = (wide * (1 - score.detach().sigmoid())).mean() / scale
        predicted = (score > threshold).float().mean()
        if masked:
            soft = (score[:masked] - threshold).sigmoid()
            gate = (score[:masked] > threshold).float() + soft - soft.detach()  # hard forward, gradient through the sigmoid
            act = torch.cat([act[:masked] * gate.to(act.dtype), act[masked:]])
    return block.after_mlp(x, block.down(act)), unforeseen, predictor_loss, predicted.detach(), fired


def head_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), target.flatten())


class Windows:
    """Training sequences: every epoch cuts the ids anew at a random offset and shuffles; every second window starts with BOS."""

    def __init__(self, ids: np.ndarray, context: int, seed: int, device: str) -> None:
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.context, self.seed, self.device = context, seed, device
        self.per_epoch = (len(ids) - context - 1) // context - 1
        if self.per_epoch < 1:
            raise ValueError(f"{len(ids)} tokens are too few for windows of {context}; give more text")
        self.epoch, self.starts = -1, np.zeros(0, dtype=np.int64)

    def batch(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """Input and target ids [size, context] of the samples `first` and following."""
        starts = []
        for sample in range(first, first + size):
            epoch, index = divmod(sample, self.per_epoch)
            if epoch != self.epoch:
                rng = np.random.default_rng((self.seed, epoch))
                self.epoch = epoch
                self.starts = rng.permutation(self.per_epoch) * self.context + rng.integers(self.context)
            starts.append(self.starts[index])
        offsets = torch.tensor(starts, device=self.device)[:, None] + torch.arange(self.context + 1, device=self.device)
        window = self.ids[offsets].long()
        window[1::2, 0] = 0
        return window[:, :-1], window[:, 1:]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Fraction of the peak: linear warm-up, then linear to zero."""
    return min((step + 1) / recipe.warmup_steps, (recipe.steps - step) / (recipe.steps - recipe.warmup_steps))


def initialise(model: Transformer, recipe: Recipe) -> None:
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            into_residual = ".o." in name or ".down." in name
            std = 0.02 / math.sqrt(2 * recipe.layers) if into_residual else 0.02
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


class Trainer:
    """The state of one run: model, companion predictors, optimisers and the per-layer controls."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe, self.device = recipe, device
        self.model = Transformer(recipe.model_config())
        for block in self.model.blocks:  # Muon makes every matrix orthogonal: q, k and v are three
            maps = [nn.Linear(part.weight.shape[1], part.weight.shape[0]) for part in (block.q, block.k, block.v)]
            block.qkv = SeparateQueryKeyValue(*maps)  # pyrefly: ignore[bad-assignment]  # it stands in for one
        initialise(self.model, recipe)
        self.model.to(device)
        self.companion = Companion(recipe).to(device)
        inner = [p for n, p in self.model.named_parameters() if p.dim() == 2 and n.startswith("layers.")]
        tables = [p for n, p in self.model.named_parameters() if p.dim() == 2 and not n.startswith("layers.")]
        controlled = [block.up.bias for block in self.model.blocks]
        vectors = [p for n, p in self.model.named_parameters() if p.dim() == 1 and not n.endswith("up.bias")]
        rate = recipe.vector_learning_rate
        fused = device != "cpu"
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([*tables, *vectors], lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
            torch.optim.AdamW(self.companion.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
            torch.optim.AdamW(controlled, lr=rate / 3, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
        ]
        self.peaks = [recipe.learning_rate, rate, 2e-3, rate / 3]
        self.fired_LF = torch.zeros(recipe.layers, recipe.neurons, device=device)
        self.threshold_L = torch.zeros(recipe.layers, device=device)
        self.predicted_L = torch.zeros(recipe.layers, device=device)
        self.position = torch.arange(recipe.context, device=device)
        compiled = device != "cpu"
        self.layer = torch.compile(layer_with_losses, dynamic=False) if compiled else layer_with_losses
        self.head = torch.compile(head_loss, dynamic=False) if compiled else head_loss
        self.step = 0

    def micro_step(self, ids: Tensor, target: Tensor, foresee: bool, mask: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Backward pass of one micro batch; returns cross entropy, unforeseen spread and predictor loss."""
        model, companion = self.model, self.companion
        masked = round(self.recipe.mask_share * len(ids)) if mask else 0
        parts = self.recipe.batch // self.recipe.micro_batch
        with torch.autocast(self.device, torch.bfloat16):
            x = model.embedded(ids, self.position)
            unforeseen_sum = predictor_sum = torch.zeros((), device=self.device)
            for index, block in enumerate(model.blocks):
                predictor = (companion.A[index], companion.B[index], companion.bias[index], self.threshold_L[index])
                phase = (companion.lookahead(index) == 1, foresee, masked, self.recipe.heads_kept or self.recipe.heads)
                x, unforeseen, predictor_loss, predicted, fired = self.layer(block, x, self.position, *predictor, *phase)
                self.predicted_L[index] = predicted
                unforeseen_sum = unforeseen_sum + unforeseen
                predictor_sum = predictor_sum + predictor_loss
                self.fired_LF[index] += fired.detach()
            assert model.final_norm is not None
            loss = self.head(model.final_norm(x), model.embed.weight, target)
        # The predictors learn first; the penalty follows when they know something.
        ramp = min(1.0, max(0.0, (self.step / self.recipe.steps - self.recipe.foresight_start - 0.05) / 0.2))
        total = loss + ramp * self.recipe.foresight_penalty * unforeseen_sum + predictor_sum
        (total / parts).backward()
        return loss.detach() / parts, unforeseen_sum.detach() / parts, predictor_sum.detach() / parts

    def train_step(self, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
        recipe = self.recipe
        foresee = self.step >= recipe.foresight_start * recipe.steps
        mask = self.step >= recipe.mask_start * recipe.steps
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(self.step, recipe)
        parts = []
        for micro in range(recipe.batch // recipe.micro_batch):
            first = self.step * recipe.batch + micro * recipe.micro_batch
            parts.append(torch.stack(self.micro_step(*windows.batch(first, recipe.micro_batch), foresee, mask)))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step % recipe.control_interval == 0:
            self.control()
        loss, unforeseen, predictor = torch.stack(parts).sum(0).unbind()
        return loss, unforeseen, predictor

    def target(self) -> float:
        """The density asked for at this step: from a half, log-linearly, to the recipe's target."""
        recipe = self.recipe
        progress = (self.step / recipe.steps - recipe.anneal_start) / (recipe.anneal_stop - recipe.anneal_start)
        return math.exp(math.log(0.5) + min(1.0, max(0.0, progress)) * math.log(recipe.density_target / 0.5))

    @torch.no_grad()
    def control(self) -> None:
        """Shift each layer's biases towards the density target, in units of a neuron's spread; lift the rarest neurons."""
        recipe = self.recipe
        rate_LF = self.fired_LF / (recipe.control_interval * recipe.batch * recipe.context)
        self.density_L = rate_LF.mean(1)
        self.rare_L = (rate_LF < recipe.rate_floor).float().mean(1)
        fade = learning_rate(self.step, recipe)
        error_L = (self.density_L.clamp_min(1e-6) / self.target()).log().clamp(-1, 1)
        for index, block in enumerate(self.model.blocks):
            assert block.norm2 is not None and block.norm2.weight is not None
            spread_F = (block.up.weight * block.norm2.weight).norm(dim=1)
            lift_F = (rate_LF[index] < recipe.rate_floor).float()
            # Control is as strong as the gradient: stronger, it moves biases that the weights can no longer follow; weaker,
            # rare neurons die when it lets go.
            block.up.bias.add_(recipe.steer_gain * fade * spread_F * (recipe.lift * lift_F - error_L[index]))
        if self.step > recipe.foresight_start * recipe.steps:
            miss_L = (self.predicted_L.clamp_min(1e-6) / recipe.mask_density).log().clamp(-1, 1)
            self.threshold_L += 0.1 * miss_L
        self.fired_LF.zero_()

    def save(self, folder: Path) -> None:
        """Everything needed to go on: weights, optimiser states, controls; without pickle."""
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"companion.{n}": t for n, t in self.companion.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        tensors |= {"fired": self.fired_LF, "threshold": self.threshold_L, "predicted": self.predicted_L}
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / "state.new.safetensors"
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, fresh, metadata={"step": str(self.step)})
        fresh.rename(folder / "state.safetensors")
        write_json(folder / "step.json", {"step": self.step, "recipe": self.recipe.to_dict()})

    def resume(self, folder: Path) -> None:
        saved = read_json(folder / "step.json")
        if saved["recipe"] != self.recipe.to_dict():
            raise ValueError(f"{folder} was made by another recipe; choose another output folder, or the same options")
        tensors = load_file(folder / "state.safetensors", device=self.device)
        self.model.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
        self.companion.load_state_dict({n[10:]: t for n, t in tensors.items() if n.startswith("companion.")})
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{number}."):
                    _, _, index, key = name.split(".", 3)
                    state.setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.fired_LF, self.threshold_L, self.predicted_L = tensors["fired"], tensors["threshold"], tensors["predicted"]
        with safe_open(folder / "state.safetensors", "pt") as state_file:  # step.json is written after it and may be one save behind
            self.step = int(state_file.metadata()["step"])


class DensityThresholds(Selection):
    """Finds, in one dense pass, the threshold of each companion predictor that selects `density` of the neurons, and the mass it keeps."""

    def __init__(self, trainer: Trainer, density: float) -> None:
        self.trainer, self.density = trainer, density
        self.layers: list[LayerAdapter] = []
        self.mass_L: list[float] = []

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        companion = self.trainer.companion
        lookahead = companion.lookahead(layer)
        free = Predictor(A_RD=companion.A[layer], B_OR=companion.B[layer], bias_O=companion.bias[layer], threshold=0.0, lookahead=lookahead)
        scores = free.scores(mlp_predictor_input(inputs, lookahead))
        threshold = scores.flatten().kthvalue(max(1, int(scores.numel() * (1 - self.density)))).values.item()
        self.layers.append(LayerAdapter(neurons=PredictedNeurons(dataclasses.replace(free, threshold=threshold))))
        contribution = act_BTF * self.trainer.model.blocks[layer].down.weight.norm(dim=1)
        self.mass_L.append(float((contribution * (scores > threshold)).sum() / contribution.sum()))
        return act_BTF


@torch.no_grad()
def validate(trainer: Trainer, ids: list[int], num_bytes: int, selection: Selection | None = None, windows: int | None = None) -> float:
    """Bits per byte of a text in windows of the context, each token predicted once, fp32."""
    context = trainer.recipe.context
    sequence = torch.tensor([0, *ids], device=trainer.device)
    count = min(windows or 10**9, (len(sequence) - 1) // context)
    nll = torch.zeros((), dtype=torch.float64, device=trainer.device)
    for first in range(0, count, 16):
        rows = range(first, min(count, first + 16))
        inputs = torch.stack([sequence[r * context : (r + 1) * context] for r in rows])
        target = torch.stack([sequence[r * context + 1 : (r + 1) * context + 1] for r in rows])
        hidden = trainer.model.hidden(inputs, selection or Selection())
        nll += F.cross_entropy(trainer.model.logits(hidden).flatten(0, 1), target.flatten(), reduction="sum")
    return float(nll) / math.log(2) / (num_bytes * count * context / len(ids))


@torch.no_grad()
def foresight(trainer: Trainer, ids: list[int], num_bytes: int) -> dict[str, object]:
    """How well the companion predictors do: bits per byte dense and masked at fixed densities of every layer."""
    windows = 32
    result: dict[str, object] = {"dense": validate(trainer, ids, num_bytes, windows=windows)}
    length = trainer.recipe.context - 1
    starts = [i * length for i in range(min(4, len(ids) // length))]
    sample = torch.tensor([[0, *ids[start : start + length]] for start in starts], device=trainer.device)
    for density in (0.08, 0.1, 0.15, 0.2):
        found = DensityThresholds(trainer, density)
        trainer.model.hidden(sample, found)
        masked = MaskedSelection(tuple(found.layers))
        result[f"masked_{density}"] = validate(trainer, ids, num_bytes, masked, windows)
        result[f"mass_{density}"] = [round(m, 4) for m in found.mass_L]
    return result


def parse() -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(description="Train a sparse ReLU model of the OPT architecture.")
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--text", action="append", required=True, help="path or quoted glob; may repeat")
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="stop with a checkpoint after this time")
    parser.add_argument("--log-interval", type=int, default=50)
    for field in dataclasses.fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float if field.type == "float" else int, default=None)
    options = parser.parse_args()
    changes = {f.name: getattr(options, f.name) for f in dataclasses.fields(Recipe) if getattr(options, f.name) is not None}
    return options, dataclasses.replace(SIZES[options.size], **changes)


def prepare(options: argparse.Namespace, recipe: Recipe) -> tuple[Tokenizer, np.ndarray]:
    """Tokenizer and ids, made once and kept in the output folder with a record of what they were made from.

    A tokenizer.json that is there before the first run is used. Raises ValueError where the folder's ids are of another text.
    """
    paths = sorted(Path(name) for pattern in options.text for name in glob.glob(pattern))
    if not paths:
        raise ValueError(f"no file matches {options.text}")
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer_path, ids_path, record_path = (options.output / name for name in ("tokenizer.json", "tokens.npy", "tokens.json"))
    record = {"vocab_size": recipe.vocab_size, "files": [[path.name, path.stat().st_size] for path in paths]}
    if record_path.exists():
        if read_json(record_path) != record:
            raise ValueError(f"{record_path} names another text or vocabulary size; choose another output folder, or the same options")
    elif ids_path.exists():
        raise ValueError(f"{ids_path} has no {record_path.name} that says what it was made from; delete it to make it again")
    if tokenizer_path.exists() and (size := Tokenizer.from_file(str(tokenizer_path)).get_vocab_size()) > recipe.vocab_size:
        raise ValueError(f"{tokenizer_path} has {size} tokens and the model {recipe.vocab_size}; raise --vocab-size")
    write_json(record_path, record)
    if not tokenizer_path.exists():
        fresh = tokenizer_path.with_suffix(".new.json")
        text_tokens.train_tokenizer(paths, recipe.vocab_size).save(str(fresh))
        fresh.rename(tokenizer_path)
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    if not ids_path.exists():
        fresh = ids_path.with_suffix(".new.npy")
        np.save(fresh, text_tokens.tokenize(tokenizer, paths))
        fresh.rename(ids_path)
    return tokenizer, np.load(ids_path)


def main() -> None:
    options, recipe = parse()
    started = time.time()
    torch.set_float32_matmul_precision("high")
    tokenizer, ids = prepare(options, recipe)
    valid_text = read_text(options.valid)
    valid_ids = tokenizer.encode(valid_text, add_special_tokens=False).ids
    valid_bytes = len(valid_text.encode())
    trainer = Trainer(recipe, options.device)
    checkpoint = options.output / "checkpoint"
    if (checkpoint / "step.json").exists():
        trainer.resume(checkpoint)
    windows = Windows(ids, recipe.context, recipe.seed, options.device)
    log = (options.output / "log.jsonl").open("a")

    def write(**row: object) -> None:
        line = json.dumps({"step": trainer.step, "seconds": round(time.time() - started, 1), **row})
        print(line, flush=True)
        log.write(line + "\n")

    write(tokens=len(ids), valid_tokens=len(valid_ids), parameters=sum(p.numel() for p in trainer.model.parameters()))
    while trainer.step < recipe.steps and time.time() - started < options.max_minutes * 60:
        loss, unforeseen, predictor_loss = trainer.train_step(windows)
        if trainer.step % options.log_interval == 0 or trainer.step == recipe.steps:
            density = [round(d, 4) for d in trainer.density_L.tolist()] if trainer.step >= recipe.control_interval else []
            rare = [round(r, 3) for r in trainer.rare_L.tolist()] if density else []
            write(
                loss=round(float(loss), 4),
                unforeseen=round(float(unforeseen), 4),
                predictor=round(float(predictor_loss), 4),
                target=round(trainer.target(), 4),
                density=density,
                rare=rare,
                predicted=[round(p, 3) for p in trainer.predicted_L.tolist()],
            )
        if trainer.step % (10 * options.log_interval) == 0:
            write(bits_per_byte=validate(trainer, valid_ids, valid_bytes, windows=64))
        if trainer.step % SAVE_EVERY == 0:
            trainer.save(checkpoint)
        if trainer.step % max(1, recipe.steps // 10) == 0 and recipe.foresight_start * recipe.steps < trainer.step < recipe.steps:
            write(foresight=foresight(trainer, valid_ids, valid_bytes))
    trainer.save(checkpoint)
    if trainer.step < recipe.steps:
        write(stopped="run the command again to go on")
        return
    write(bits_per_byte=validate(trainer, valid_ids, valid_bytes))
    write(foresight=foresight(trainer, valid_ids, valid_bytes))
    config = trainer.model.config
    finished = load_tokenizer(options.output, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids)
    write_bundle(trainer.model.float().eval().requires_grad_(False), finished, options.output / "model", sampling=SAMPLING)


if __name__ == "__main__":
    main()
