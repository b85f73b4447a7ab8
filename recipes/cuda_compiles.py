"""Compile every kernel of the cuda engine's steps without a GPU: registers, spills and shared memory, by shape and architecture.

    python recipes/cuda_compiles.py                          # every architecture, the shapes that kernels differ in
    python recipes/cuda_compiles.py --arch 86 --shape opt-6.7b

In: shapes of `bench --synthetic`. A step of each method is made of tensors without memory, so what it starts has the arguments that it
has on a GPU of MULTIPROCESSORS; nothing runs. Out: a table of Markdown, the largest of each kernel over shapes and steps, and exit
status 1 where a kernel does not compile or wants more shared memory than the architecture gives a program. That it compiles says
nothing of its results.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dejavu.kernels.cuda as kernels
from dejavu.bench.models.random import SHAPES, plain_layers, planted_layers, shape_of
from dejavu.config import ModelConfig
from dejavu.engine.cache import PagedCache
from dejavu.engine.cuda.batch_step import BatchStep
from dejavu.engine.cuda.prompts import Prompts
from dejavu.engine.cuda.token_step import TokenStep
from dejavu.engine.cuda.weights import layer_predictors, step_model
from dejavu.kernels.cuda import common
from dejavu.kernels.cuda.sample import Ring, SampleSettings, advance_rows, sample_rows, sample_scratch
from dejavu.model.families import empty_model
from dejavu.model.selectors import LayerAdapter
from speeds import markdown

# Shared memory that a program can have, in bytes. Source: the CUDA programming guide, technical specifications by compute capability.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SHAPES_COMPILED = ("opt-mini", "opt-6.7b", "opt-30b", "llama-3.1-8b", "minitron-4b")
MULTIPROCESSORS, ROWS, TOKENS, LAYERS = 132, (2, 32), 4096, 3  # BP, the rows of products of several, is 16 up to 16
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}
META, I32 = torch.device("meta"), torch.int32


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """One kernel as a step starts it: what decides the code that is made of it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # places of arguments that are multiples of 16
    num_warps: int
    programmatic: bool
    max_registers: int | None

    @classmethod
    def of(
        cls,
        kernel: Any,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        *,
        num_warps: int,
        programmatic: bool,
        max_registers: int | None,
    ) -> Launch:
        """As triton specialises a call: an integer 1 is a constant, pointers and multiples of 16 are told."""
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        signature, fixed, divisible = [], [], []
        for place, name in enumerate(kernel.arg_names):
            value, is_constant = given.get(name), place in kernel.constexprs
            if is_constant or (isinstance(value, int) and value == 1):
                signature.append((name, "constexpr"))
                fixed.append((name, value))
            elif isinstance(value, Tensor):
                signature.append((name, f"*{NAMES[value.dtype]}"))
                divisible.append(place)
            else:
                assert isinstance(value, int | float), f"{kernel.__name__}: {name} is {value!r}"
                signature.append((name, "fp32" if isinstance(value, float) else "i32"))
                divisible += [place] if isinstance(value, int) and value % 16 == 0 else []
        return cls(kernel, tuple(signature), tuple(fixed), tuple(divisible), num_warps, programmatic, max_registers)

    def compiled(self, arch: int) -> Any:
        programmatic = self.programmatic and arch >= 90  # see common.overlaps
        constants = dict(self.constants) | {"programmatic": programmatic}
        attributes = {(place,): [["tt.divisibility", 16]] for place in self.divisible}
        source = ASTSource(self.kernel, dict(self.signature), constants, attributes)
        options = {"num_warps": self.num_warps} | common.compile_options(programmatic=programmatic, max_registers=self.max_registers)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What one compiled kernel takes. registers: of a thread; spilled and shared: bytes of a thread, of a program."""

    registers: int
    spilled: int
    shared: int


def used(binary: Any) -> Use:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|LOCAL|STACK):(\d+)", told)}
    return Use(registers=found["REG"], spilled=found["LOCAL"] + found["STACK"], shared=binary.metadata.shared)


class Recorder:
    """In the place of `launch` in every module of kernels: keeps what is started."""

    def __init__(self) -> None:
        self.launches: dict[Launch, str] = {}
        self.step = ""

    def launch(
        self,
        kernel: Any,
        grid: Any,
        *arguments: Any,
        num_warps: int,
        programmatic: bool = False,
        max_registers: int | None = None,
        **constants: Any,
    ) -> None:
        found = Launch.of(
            kernel, arguments, constants, num_warps=num_warps, programmatic=programmatic, max_registers=max_registers
        )  # fmt: skip
        self.launches.setdefault(found, self.step)

    def install(self, arch: int) -> None:
        """From now on steps are those of that architecture."""
        self.launches.clear()
        instead = {
            "launch": self.launch,
            "multiprocessors": lambda device: MULTIPROCESSORS,
            "shared_memory": lambda device: SHARED[arch],
        }
        assert not common.INTERPRETED, "kernels are compiled where TRITON_INTERPRET is not set"
        for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            names = vars(importlib.import_module(module.name))
            names |= {name: value for name, value in instead.items() if name in names}


def methods_of(config: ModelConfig) -> Iterator[tuple[str, tuple[LayerAdapter, ...]]]:
    """Every way to select, the ways of looking ahead among them."""
    yield "dense", (LayerAdapter(),) * config.num_layers
    yield "predicted", planted_layers(config, density=0.1, heads=config.num_kv_heads > 1)
    for method in ("gate", "input"):
        yield method, plain_layers(config, method=method)


def record_steps(recorder: Recorder, shape: str, dtype: torch.dtype) -> None:
    """Every kernel that steps of one row, sums in any order and in a fixed one, of several rows, and passes over prompts start."""
    config = dataclasses.replace(shape_of(shape), num_layers=LAYERS)
    model = empty_model(config).to(dtype)
    for method, layers in methods_of(config):
        predictors, counts_ML = layer_predictors(layers, config, META)
        made = step_model(model, layers, predictors, counts_ML)
        cache = PagedCache(
            num_layers=LAYERS, num_groups=config.num_kv_heads, head_dim=config.head_dim, num_slots=ROWS[-1] + 1, num_pages=TOKENS // 16,
            dtype=dtype, device=META,
        )  # fmt: skip
        for deterministic in (False, True):
            for tokens in (256, TOKENS):
                recorder.step = f"{shape}, {method}"
                inputs = torch.zeros(3, 1, dtype=torch.int32, device=META)
                TokenStep(made, cache, tokens=tokens, ahead="beside", deterministic=deterministic, inputs=inputs).run()
                for rows in ROWS:
                    inputs = torch.zeros(3, rows, dtype=torch.int32, device=META)
                    BatchStep(made, cache, tokens=tokens, deterministic=deterministic, inputs=inputs, padding=ROWS[-1]).run()
        recorder.step = f"{shape}, {method}, prompts"
        Prompts(made, cache, padding=ROWS[-1]).layers(torch.zeros(7 * TOKENS, dtype=I32, device=META), TOKENS)
        recorder.step = f"{shape}, sampling"
        record_sampling(config.vocab_size, counts_ML)


def record_sampling(vocab: int, counts_ML: Tensor) -> None:
    """What draws a token of each row, and what makes it the next step's."""
    for rows in (1, *ROWS):
        token_B, step_B, seed_B, top_k_B = (torch.zeros(rows, dtype=kind, device=META) for kind in (I32, I32, torch.int64, I32))
        logprob_B, temperature_B, top_p_B = torch.zeros(3, rows, device=META).unbind(0)
        settings = SampleSettings(temperature_B=temperature_B, top_k_B=top_k_B, top_p_B=top_p_B, seed_B=seed_B, step_B=step_B)
        logits_BV, scratch = torch.zeros(rows, vocab, device=META), sample_scratch(rows, vocab, META)
        sample_rows(logits_BV, settings, scratch, token_B, logprob_B, programmatic=True)
        counts_MBL = counts_ML[:, None].expand(-1, rows, -1).contiguous()
        ring = Ring(
            token_NB=torch.zeros(8, rows, dtype=I32, device=META), logprob_NB=torch.zeros(8, rows, device=META),
            counts_NMBL=counts_MBL.expand(8, -1, -1, -1).contiguous(),
        )  # fmt: skip
        inputs_3B, made = torch.zeros(3, rows, dtype=I32, device=META), torch.zeros(1, dtype=I32, device=META)
        advance_rows(token_B, logprob_B, counts_MBL, inputs_3B, ring, made, padding=rows, programmatic=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=list(SHARED), help="compute capability, e.g. 86 (default: all)")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="(default: the shapes that the kernels differ in)")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16")
    given = parser.parse_args()
    recorder, dtype = Recorder(), {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[given.dtype]
    table, wrong = [], []
    for arch in given.arch or SHARED:
        recorder.install(arch)
        for shape in given.shape or SHAPES_COMPILED:
            record_steps(recorder, shape, dtype)
        print(f"sm_{arch}: {len(recorder.launches)} kernels with different arguments", file=sys.stderr, flush=True)
        most: dict[str, Use] = {}
        for each, step in recorder.launches.items():
            name = each.kernel.__name__.lstrip("_")
            try:
                found = used(each.compiled(arch))
            except Exception as error:  # of triton or of ptxas, of any class
                wrong.append(f"sm_{arch}, {name} ({step}): {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            if found.shared > SHARED[arch]:
                wrong.append(f"sm_{arch}, {name} ({step}): {found.shared / 1024:.0f} KiB of shared memory, {SHARED[arch] >> 10} there are")
            before = most.get(name, found)
            most[name] = Use(**{field: max(getattr(found, field), getattr(before, field)) for field in Use.__slots__})
        for name, use in sorted(most.items()):
            table.append([f"sm_{arch}", name, str(use.registers), str(use.spilled), f"{use.shared / 1024:.1f}"])
    print(markdown(["architecture", "kernel", "registers", "bytes spilled", "KiB of shared memory"], table))
    for each in wrong:
        print(each, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
