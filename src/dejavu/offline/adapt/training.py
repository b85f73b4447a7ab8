"""Distil a model into itself with predictors in the loop, so that a model without zeros of its own becomes contextually sparse.

In: a model (base.py), its text as windows of ids, an AdaptConfig.
Out: a trained Student (finish.py makes an adapter of it). A step minimises

    divergence(teacher, student) per token  +  mean over layers of  price_l * (soft density of l) / target

where the prices hold the densities (density_controller.py) to a target that falls from first_density to config.density over the first third
of the training. The divergence is KL(teacher || student) on text, and one of three (divergence.py) on what the student wrote itself
(on_policy.py). Everything that a step draws depends on the seed and its number alone, so that what is saved is weights, the optimiser's
moments, the prices, what the student has written and two numbers. The moments are a file of their own, twice as large as all else: a run
goes on without it too, behind another warm-up.

Letters: B windows  T tokens  L layers  P trained parameters
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dejavu.config import Config, require, shown
from dejavu.damage import content_of
from dejavu.files import read_metadata, read_object, read_safetensors, write_json, write_safetensors
from dejavu.kernels.memory import free_gpu_bytes, within_gpu_memory
from dejavu.model.adapter import Adapter
from dejavu.model.lora import check_activation
from dejavu.model.transformer import Transformer
from dejavu.offline.adapt.corpus import Mixture
from dejavu.offline.adapt.density_controller import FIRST_PRICE, LARGEST_PRICE, LEAST_PRICE, DensityController
from dejavu.offline.adapt.divergence import KINDS, mean_divergence, pair_of
from dejavu.offline.adapt.on_policy import OwnWindows
from dejavu.offline.adapt.own_text import Prompts
from dejavu.offline.adapt.ranks import average_, same_, world
from dejavu.offline.adapt.sizes import choose_sizes
from dejavu.offline.adapt.student import COMPILED, Student

LORA_SCALE = 2.0
RAMP = 1 / 3  # share of the training over which the target falls
LEAST_RATE = 0.02  # of the peak learning rate, at the end
UNTIMED = 3  # steps of a process that compile and warm up: a limit in minutes does not count them
STATE_FILE, MOMENTS_FILE, RUN_FILE = "state.safetensors", "moments.safetensors", "run.json"
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptConfig(Config):
    """How a model is adapted. Trained until `steps` or `minutes`, whichever is given and comes first.

    density: mean share of neurons selected; first_density: at the beginning. rank: of predictors; lora_rank: of the changes of weights.
    batch: windows of a step over all processes, of which one takes micro_batch at a time; length: tokens of a window. checkpoint_layers:
    whether backward computes layers again instead of keeping what they computed. Both None: by free memory (sizes.py). lookahead_cosine: a
    predictor reads the attention's input where attention keeps at least this cosine of the residual stream. prompt_share: of the windows,
    those whose first part runs dense, as a prompt does. chat_share: of the windows, those that the dense model wrote. own_share: those that
    the student writes while it trains, own_rows answers of own_tokens at a time to each of two kinds of prompts, at temperatures from
    coldest to hottest; divergence: what is minimised on them. short_length: their windows are so long, which divides `length`, and begin
    with a prompt; as many as have its tokens make one of the batch (None: as long as the others, answers going through them). short_share:
    of the other windows, those that are cut into short ones. price: of a step's density over its target, in nats, to begin with. floor,
    ceiling: bounds of a layer's density, in multiples of the target. rounded: the student computes with the weights of its layers as an
    engine of that dtype holds them, int8 or int4 (None: unrounded).
    activation: one with exact zeros that the model gets in the place of its own: neurons are then selected by those zeros, and nothing is
    predicted.
    """

    density: float = 0.15
    first_density: float = 0.5
    rank: int = 64
    lora_rank: int = 32
    lookahead_cosine: float = 0.9
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 1.6e-3
    warmup: int = 40
    batch: int = 64
    micro_batch: int | None = None
    checkpoint_layers: bool | None = None
    length: int = 1024
    prompt_share: float = 0.25
    chat_share: float = 0.0
    own_share: float = 0.0
    own_rows: int = 1024
    own_tokens: int = 256
    coldest: float = 0.7
    hottest: float = 1.0
    divergence: str = "js"
    short_length: int | None = None
    short_share: float = 0.0
    price: float = FIRST_PRICE
    rounded: str | None = None
    floor: float = 1 / 3
    ceiling: float = 4.0
    activation: str | None = None
    dtype: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_activation(self.activation)
        require(0 < self.density < 1, f"density must lie in (0, 1), e.g. 0.15, not {self.density}")
        require(0 < self.first_density < 1, f"first_density must lie in (0, 1), e.g. 0.5, not {self.first_density}")
        for name in ("rank", "lora_rank", "batch", "warmup", "own_rows", "own_tokens"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        require(self.micro_batch is None or self.micro_batch >= 1, f"micro_batch must be at least 1, not {self.micro_batch}")
        divides = self.micro_batch is None or self.batch % self.micro_batch == 0
        require(divides, f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        require(self.length >= 2, f"length must be at least 2, not {self.length}")
        require(self.steps is not None or self.minutes is not None, "give steps or minutes, how long to train")
        require(self.steps is None or self.steps >= 1, f"steps must be at least 1, not {self.steps}")
        require(self.minutes is None or self.minutes > 0, f"minutes must be positive, not {self.minutes}")
        require(self.learning_rate > 0, f"learning_rate must be positive, not {self.learning_rate}")
        for name in ("prompt_share", "chat_share", "own_share", "short_share"):
            require(0 <= getattr(self, name) <= 0.9, f"{name} must lie in [0, 0.9], not {getattr(self, name)}")
        self.windows_of(1)
        short = self.length if self.short_length is None else self.short_length
        require(2 <= short <= self.length and self.length % short == 0, f"short_length {short} does not divide length {self.length}")
        require(self.short_share == 0 or self.short_length is not None, "short_share needs a short_length")
        require(0 < self.coldest <= self.hottest, f"temperatures must be positive and in order, not {self.coldest} to {self.hottest}")
        require(self.divergence in KINDS, f"divergence {self.divergence!r} is not known; choose one of {', '.join(KINDS)}")
        require(LEAST_PRICE <= self.price <= LARGEST_PRICE, f"price must lie in [{LEAST_PRICE:g}, {LARGEST_PRICE:g}], not {self.price}")
        require(self.rounded in (None, "int8", "int4"), f"weights are rounded to int8 or int4, not {self.rounded!r}")
        require(0 <= self.floor < 1, f"floor must lie in [0, 1), not {self.floor}")
        require(self.ceiling > 1, f"ceiling must exceed 1, not {self.ceiling}")
        require(self.dtype in DTYPES, f"dtype {self.dtype!r} is not supported; choose one of {', '.join(DTYPES)}")

    def windows_of(self, processes: int) -> tuple[int, int]:
        """The windows that each of so many processes has of a step: all, and those that the student wrote. Raises ValueError where that
        cannot be."""
        require(self.batch % processes == 0, f"batch {self.batch} cannot be shared by {processes} processes; take a multiple")
        windows = self.batch // processes
        own = round(self.own_share * windows)
        require(
            (own > 0) == (self.own_share > 0) and own < windows,
            f"own_share {self.own_share} of the {windows} windows of a step is {own}; take a share of 1/{windows} to "
            f"{windows - 1}/{windows}, or 0",
        )
        return windows, own


Read = tuple[Tensor, Tensor, Tensor]  # windows [B, T]: ids, where they run dense, where the student wrote


def _of_text(ids_BT: Tensor, dense_BT: Tensor) -> Read:
    return ids_BT, dense_BT, torch.zeros_like(dense_BT)


def _joined(group: Sequence[Read]) -> Read:
    ids, dense, own = (torch.cat(parts) for parts in zip(*(each for each in group if len(each[0])), strict=True))
    return ids, dense, own


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a step did. fraction: of the whole training that is done; seconds_left: None until that can be told; rate: learning rate.

    kl: KL(teacher || student) on text; own: the divergence on what the student wrote, None where it writes nothing; writing: share of this
    process's time, as far as it is timed, that it wrote in. gpu_bytes: the most of a GPU's memory that this process has taken, None on the
    CPU; micro_batch, checkpoint_layers: see Sizes.
    """

    step: int
    fraction: float
    kl: float
    own: float | None
    density_L: list[float]
    target: float
    price: float
    gradient_norm: float
    rate: float
    tokens_per_second: float
    writing: float
    gpu_bytes: int | None
    micro_batch: int
    checkpoint_layers: bool
    seconds_left: float | None

    @property
    def density(self) -> float:
        return math.fsum(self.density_L) / len(self.density_L)


def _checked(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor of a saved state, which must be finite, and of the shape and type of the one that it is for."""
    found = tensors[name]
    require(
        (found.shape, found.dtype) == (like.shape, like.dtype),
        f"{name} is {found.dtype} {list(found.shape)}, not {like.dtype} {list(like.shape)}",
    )
    require(bool(found.isfinite().all()), f"{name} has NaN or infinite values")
    return found


def check_run(folder: Path, settings: dict[str, Any]) -> None:
    """Note what a run folder is for. Raises ValueError naming what differs where it is another run's."""
    path = folder / RUN_FILE
    if not path.exists():
        write_json(path, settings)
        return
    held = read_object(path)
    names = [name for name in sorted({*held, *settings}) if held.get(name) != settings.get(name)]
    differs = "; ".join(f"{name} is {shown(held.get(name))} there and {settings.get(name)!r} here" for name in names)
    require(not names, f"{folder} is of another run: {differs}; give the same options, or another output folder")


class Trainer:
    """One run: the student, its optimiser, its density controller and how far it is."""

    def __init__(
        self,
        model: Transformer,
        config: AdaptConfig,
        windows: Mixture,
        *,
        lookahead_L: tuple[int, ...],
        prompts: Prompts | None = None,
        eos: Sequence[int] = (),
        start: Adapter | None = None,
    ) -> None:
        """model: the teacher, on the device and in the dtype to compute in, see base.py. prompts: what the student answers, where it
        writes. eos: tokens that end its answers. start: weights to begin with."""
        require(model.project_out is None, "adapting a model whose embeddings are narrower than its layers is not supported")
        require(model.config.logit_cap == 0, "adapting a model with capped logits is not supported")
        self.config, self.windows, self.device = config, windows, model.device
        self.rank, self.world = world()
        self.step_windows, self.own_windows = config.windows_of(self.world)
        self.student = Student(
            model, rank=config.rank, lora_rank=config.lora_rank, scale=LORA_SCALE, lookahead_L=lookahead_L, seed=config.seed,
            activation=config.activation, rounded=config.rounded,
        )  # fmt: skip
        if start is not None:
            self.student.start_from(start)
        self.own: OwnWindows | None = None
        if self.own_windows:
            assert prompts is not None, "who writes needs prompts"
            self.own = OwnWindows(
                self.student, prompts, length=config.short_length or config.length, anew=config.short_length is not None,
                rows=config.own_rows, new_tokens=config.own_tokens,
                temperatures=(config.coldest, config.hottest), eos=eos, seed=config.seed, rank=self.rank,
            )  # fmt: skip
            self.student.merged()  # takes its memory before the rest is shared out
        self.student.round_weights()  # likewise
        self.parameters = self.student.trainable()
        for parameter in self.parameters.values():
            same_(parameter.detach())
        self.gradient_P = torch.zeros(sum(p.numel() for p in self.parameters.values()), device=self.device)
        first = 0
        for parameter in self.parameters.values():  # one buffer: one reduction over processes, one norm
            parameter.grad = self.gradient_P[first : first + parameter.numel()].view_as(parameter)
            first += parameter.numel()
        fused = self.device.type != "cpu"
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        )
        self.controller = DensityController(model.config.num_layers, floor=config.floor, ceiling=config.ceiling, price=config.price)
        pair = pair_of(config.divergence if self.own else "forward")
        self.pair = torch.compile(pair, **COMPILED) if fused else pair
        free = free_gpu_bytes(str(self.device))
        moments = 2 * self.gradient_P.numel() * self.gradient_P.element_size()
        self.sizes = choose_sizes(
            model.config, windows=self.step_windows, length=config.length, value_bytes=model.dtype.itemsize,
            free=None if free is None else free - moments, micro_batch=config.micro_batch, checkpoint_layers=config.checkpoint_layers,
        )  # fmt: skip
        self.student.checkpoint_layers = self.sizes.checkpoint_layers
        self.step, self.elapsed = 0, 0.0
        self.warmed_from = 0  # the step that the moments of the optimiser begin with
        self.timed = [0.0, 0.0]  # seconds of this process: of all timed steps, of writing in them
        self.own_steps = 0  # of this process: the first ones compile
        self.last_seconds = 0.0

    @property
    def fraction(self) -> float:
        """How much of the training is done, 0 to 1."""
        config = self.config
        by_steps = 0.0 if config.steps is None else self.step / config.steps
        by_time = 0.0 if config.minutes is None else self.elapsed / (60 * config.minutes)
        return min(1.0, max(by_steps, by_time))

    def target(self) -> float:
        """The mean density asked for at this point."""
        first, last = self.config.first_density, self.config.density
        return last + (first - last) * max(0.0, 1 - self.fraction / RAMP)

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine."""
        cosine = LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * self.fraction))
        return self.config.learning_rate * min(1.0, (self.step - self.warmed_from + 1) / self.config.warmup) * cosine

    def gpu_bytes(self) -> int | None:
        """The most of a GPU's memory that this process has taken so far; None on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def samples(self) -> range:
        """The numbers of the windows of text that this process reads in the step."""
        size = self.step_windows - self.own_windows
        first = (self.step * self.world + self.rank) * size
        return range(first, first + size)

    def prompts(self, samples: range, length: int) -> Tensor:
        """[B, T] bool: the positions that run dense, a first part of random length of some windows."""
        ends = []
        for sample in samples:
            chance, share = np.random.default_rng((self.config.seed, 1, sample)).random(2)
            ends.append(int(share * length) if chance < self.config.prompt_share else 0)
        return torch.arange(length)[None, :] < torch.tensor(ends)[:, None]

    def windows_read(self) -> list[Read]:
        """What the step reads, long windows and short ones [B, T]: ids, where they run dense, and where the student wrote."""
        config, samples = self.config, self.samples()
        short = config.short_length or config.length
        first_short = len(samples) - round(config.short_share * len(samples))
        ids = self.windows.batch(samples)
        pieces = range(samples[0] * (config.length // short), (samples[-1] + 1) * (config.length // short))
        cut = ids[first_short:].reshape(-1, short)
        long, shorter = [_of_text(ids[:first_short], self.prompts(samples[:first_short], config.length))], []
        shorter.append(_of_text(cut, self.prompts(pieces[len(pieces) - len(cut) :], short)))
        if self.own is not None:
            own_ids, own_dense = self.own.take(self.own_windows * config.length // short)
            (long if short == config.length else shorter).append((own_ids, own_dense, ~own_dense))
        return [_joined(group) for group in (long, shorter) if any(len(ids) for ids, _, _ in group)]

    def train_step(self) -> StepReport:
        """One step of the optimiser; raises RuntimeError where the loss is no number any more."""
        started, target, rate = time.perf_counter(), self.target(), self.learning_rate()
        config, device, micro = self.config, self.device, self.sizes.micro_batch
        price_L = (self.controller.prices() / target / self.controller.push_L.numel()).float().to(device)
        self.gradient_P.zero_()
        self.student.round_weights()
        seen = torch.zeros(len(price_L) + 5, device=device)  # densities, sums of both divergences, their tokens, seconds
        written = 0.0 if self.own is None else self.own.seconds
        # At once: a copy waits for all that runs.
        read = [(ids.to(device), dense.to(device), own.to(device, torch.float32)) for ids, dense, own in self.windows_read()]
        written = 0.0 if self.own is None else self.own.seconds - written
        total = sum(ids.numel() for ids, _, _ in read)
        for group in read:
            rows = micro * config.length // group[0].shape[1]
            for ids_BT, dense_BT, own_BT in zip(*(part.split(rows) for part in group), strict=True):
                hidden_ND, soft_L, hard_L = self.student(ids_BT, dense_BT)
                divergence, sums_2 = mean_divergence(
                    hidden_ND, self.student.taught(ids_BT), self.student.head(), own_BT.flatten(), self.pair
                )  # fmt: skip
                share = ids_BT.numel() / total
                ((divergence + (price_L * soft_L).sum()) * share).backward()
                seen[:-5] += hard_L * share
                seen[-5:-3] += sums_2
                seen[-3] += own_BT.numel() - own_BT.sum()
                seen[-2] += own_BT.sum()
        seen[-1] = self.last_seconds
        average_(self.gradient_P)
        *density_L, text_sum, own_sum, text_tokens, own_tokens, last_seconds = average_(seen).tolist()
        norm = self.gradient_P.norm()
        self.gradient_P.mul_((1 / (norm + 1e-6)).clamp_max(1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        gradient_norm = float(norm)
        if not math.isfinite(text_sum + own_sum + gradient_norm):
            raise RuntimeError(f"training diverged at step {self.step}: KL {text_sum / text_tokens}, gradient norm {gradient_norm}")
        self.controller.update(torch.tensor(density_L), target, rate / config.learning_rate)
        self.step += 1
        self.own_steps += 1
        self.elapsed += last_seconds  # of the step before: all processes then agree on the time
        seconds = time.perf_counter() - started
        self.last_seconds = seconds if self.own_steps > UNTIMED else 0.0
        if self.own_steps > UNTIMED:
            self.timed = [self.timed[0] + seconds, self.timed[1] + written]
        return StepReport(
            step=self.step, fraction=self.fraction, kl=text_sum / text_tokens, own=own_sum / own_tokens if own_tokens else None,
            writing=self.timed[1] / max(self.timed[0], 1e-9), density_L=density_L, target=target, price=self.controller.price,
            gradient_norm=gradient_norm, rate=rate, gpu_bytes=self.gpu_bytes(),
            micro_batch=micro, checkpoint_layers=self.sizes.checkpoint_layers, tokens_per_second=config.batch * config.length / seconds,
            seconds_left=self._seconds_left(seconds),
        )  # fmt: skip

    def _seconds_left(self, seconds: float) -> float | None:
        if self.own_steps <= UNTIMED:
            return None
        config = self.config
        by_steps = math.inf if config.steps is None else (config.steps - self.step) * seconds
        by_time = math.inf if config.minutes is None else 60 * config.minutes - self.elapsed
        return max(0.0, min(by_steps, by_time))

    def run(
        self,
        folder: Path,
        *,
        report: Callable[[StepReport], None] | None = None,
        stop: Callable[[], bool] | None = None,
        save_minutes: float = 2.0,
    ) -> bool:
        """Train until the end, saving now and then; True when finished, False where `stop` asked for an end before: then all is saved.
        Raises MemoryError, which says what to lower, where a GPU's memory is not enough."""
        saved = time.perf_counter()
        while self.fraction < 1.0:
            stopping = torch.tensor([float(stop is not None and stop())], device=self.device)
            if float(average_(stopping)) > 0:  # one process that stops stops all
                self.save(folder)
                return False
            with within_gpu_memory(self.sizes.smaller()):
                made = self.train_step()
            if report is not None:
                report(made)
            if time.perf_counter() - saved > 60 * save_minutes:
                self.save(folder)
                saved = time.perf_counter()
        self.save(folder)
        return True

    def save(self, folder: Path) -> None:
        """Everything needed to go on, whole or not at all; of several processes the first writes."""
        if self.rank != 0:
            return
        step = {"step": str(self.step)}
        moments = {
            f"{name}.{key}": value.detach().contiguous()
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        write_safetensors(folder / MOMENTS_FILE, moments, step)
        tensors = {f"parameter.{name}": parameter.detach().contiguous() for name, parameter in self.parameters.items()}
        tensors |= {"steering": self.controller.state()} | ({} if self.own is None else self.own.state())
        told = {"elapsed": repr(self.elapsed + self.last_seconds), "warmed_from": str(self.warmed_from)}
        write_safetensors(folder / STATE_FILE, tensors, step | told)

    def resume(self, folder: Path) -> bool:
        """Take up what an earlier run saved in the folder; False where there is nothing. Without moments of the same step the optimiser
        begins anew with this step, and so does the warm-up."""
        path = folder / STATE_FILE
        if not path.exists():
            return False
        fix = f"remove {folder} to begin anew"
        state, tensors = read_metadata(path), read_safetensors(path)
        with content_of(path, fix):
            self.step, self.elapsed, self.warmed_from = int(state["step"]), float(state["elapsed"]), int(state["warmed_from"])
            possible = 0 <= self.warmed_from <= self.step and 0 <= self.elapsed < math.inf
            require(possible, f"step {self.step} after {self.elapsed} s is not possible")
            self.controller.restore(_checked(tensors, "steering", self.controller.state()))
            if self.own is not None and self.rank == 0:  # what the first wrote is its own
                self.own.restore(tensors)
            elif self.own is not None:
                self.own.round = int(tensors["own.round"])
            for name, parameter in self.parameters.items():
                parameter.detach().copy_(_checked(tensors, f"parameter.{name}", parameter))
        moments = self._moments(folder / MOMENTS_FILE, fix)
        if moments is None:
            self.warmed_from = self.step
        else:
            self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        return True

    def _moments(self, path: Path, fix: str) -> dict[int, dict[str, Tensor]] | None:
        """The moments of the step at hand; None where there are none."""
        if not path.exists() or read_metadata(path).get("step") != str(self.step):
            return None
        tensors = read_safetensors(path)
        found = {}
        with content_of(path, fix):
            for index, (name, parameter) in enumerate(self.parameters.items() if tensors else ()):
                expected = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
                found[index] = {key: _checked(tensors, f"{name}.{key}", like) for key, like in expected.items()}
        return found
