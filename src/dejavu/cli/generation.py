"""`dejavu generate`: text from a prompt, streamed."""

from __future__ import annotations

from typing import Annotated

import typer

from dejavu.cli.messages import ChatTemplateKwargs, ControlTokens, template_kwargs
from dejavu.cli.options import (
    AcceptBase,
    AdapterFolder,
    AsJson,
    Backend,
    BaseTexts,
    CacheDtype,
    Dense,
    Download,
    Dtype,
    Model,
    Offline,
    ScreenedHead,
    Seed,
    Threads,
    open_model,
)
from dejavu.cli.output import Output, number, percent, speed
from dejavu.cli.sampling import Temperature, TopK, TopP, sampling_values, sampling_words
from dejavu.config import MAX_NEW_TOKENS
from dejavu.engine.options import EngineOptions


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", metavar="TEXT", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", metavar="N", help="Tokens to write.")] = MAX_NEW_TOKENS,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may repeat.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, also where the model has a chat template.")] = False,
    chat_template_kwargs: ChatTemplateKwargs = None,
    control_tokens: ControlTokens = False,
    adapter: AdapterFolder = None,
    accept_base: AcceptBase = False,
    text: BaseTexts = None,
    dense: Dense = False,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    cache_dtype: CacheDtype = "auto",
    screened_head: ScreenedHead = None,
    threads: Threads = None,
    seed: Seed = 0,
    download: Download = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, or answer it where the model has a chat template; sparse where the model has an adapter."""
    from dejavu.bench.bytes_read import text_read_share
    from dejavu.config import SamplingConfig, require
    from dejavu.generation.text import StopStrings

    out = Output(as_json)
    require(max_new_tokens >= 0, f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    require(accept_base or not text, "--text is the calibration text for --accept-base; add that, or leave --text out")
    overrides = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    SamplingConfig().overridden(**overrides)  # an impossible value is said before a model is loaded
    StopStrings(stop or ())
    kwargs = template_kwargs(chat_template_kwargs)
    options = EngineOptions(backend=backend, dtype=dtype, cache_dtype=cache_dtype, screened_head=screened_head, threads=threads)
    lm = open_model(
        model, out, options, seed=seed,
        adapter=adapter, dense=dense, accept_base=accept_base, texts=text, download=download, offline=offline,
        drawing=lambda lm: sampling_words(lm, **overrides),
    )  # fmt: skip
    lm.hand_over(dense=lm.adapter is None)
    chat = not raw and lm.tokenizer.has_template
    require(chat or not kwargs, f"--chat-template-kwargs are for a chat template, which {lm.name} has none of or --raw leaves out")
    running = lm.start(
        [{"role": "user", "content": prompt}] if chat else prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
        chat_template_kwargs=kwargs,
        sanitize_control_tokens=not control_tokens,
    )
    out.write(f"\n{prompt}" + ("\n\n" if chat else ""))
    try:
        for piece in running:
            out.write(piece.text)
    finally:
        out.write("\n\n")
    result = running.result()
    notes = list(lm.notes)
    if result.finish_reason == "length" and result.new_tokens < max_new_tokens:
        written = f"{result.new_tokens} of {max_new_tokens} tokens were written"
        notes.append(f"the context of {lm.config.max_positions} tokens is full: {written}")
        out.warn(notes[-1])
    what = f"{result.new_tokens} tokens at [bold]{speed(result.tok_s)}[/bold]"
    prompted = "message (chat template)" if chat else "prompt"
    prefill = f"{prompted} of {result.prompt_tokens} at {speed(result.prefill_tok_s)}"
    densities = f"MLP density {number(result.mlp_density)}, head density {number(result.head_density)}"
    share = text_read_share(lm.config, result, None if lm.adapter is None else lm.adapter.layers)
    reads = f"reads {percent(share)} of a dense token"
    out.show(f"{what} · {prefill} · {densities} · {reads} · ended by {result.finish_reason}")
    out.finish(
        {
            "text": str(result),
            "chat": chat,
            "tok_s": result.tok_s,
            "prefill_tok_s": result.prefill_tok_s,
            "mlp_density": result.mlp_density,
            "head_density": result.head_density,
            "read_share": share,
            "backend": lm.backend,
            "dtype": lm.dtype,
            "cache_dtype": lm.cache_dtype,
            "screened_head": lm.screened_head,
            "sampling": sampling_values(lm, seed=seed, **overrides),
            "model": lm.name,
            "prompt_tokens": result.prompt_tokens,
            "new_tokens": result.new_tokens,
            "finish_reason": result.finish_reason,
            "notes": notes,
        }
    )
