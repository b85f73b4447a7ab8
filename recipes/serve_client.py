"""The official `openai` client against `dejavu serve`: an answer is the same streamed and whole, alone and among 31 others.

    python recipes/serve_client.py opt-mini
    python recipes/serve_client.py smollm2-sparse --tokens 12

In: a model. Out: one JSON object: of each model and kind of request, how many answers were compared and how many differed. Every request is
made whole and streamed, sparse and dense, as a completion and, where the model has a template, by messages; then 32 clients stream at
once what was asked for alone. Texts, reasons to finish, log-probabilities and counts of tokens are compared, with nothing rounded: the
native engine promises the same bits whatever else runs. The exit status is 1 if something differed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import openai

from dejavu.loadtest.process import served

CLIENTS = 32
PROMPTS = [f"{start} {middle}" for start in ("The keeper of the", "In the year", "She said that", "Zoë and the 🐈") for middle in
           ("old lighthouse", "the war ended and", "nobody knew", "at night", "a river", "is", "his father", "12 + 7")]  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.8, "top_p": 0.9, "seed": 7},
    "two texts": {"temperature": 1, "seed": 3, "n": 2},
    "stop": {"temperature": 0, "stop": ["\n", " the"]},
    "log-probabilities": {"temperature": 0, "logprobs": 3},
}


@dataclass(slots=True)
class Choice:
    """One text as the client was told it."""

    text: str = ""
    end: str | None = None
    tokens: list[tuple[Any, ...]] = field(default_factory=list)


Answer = tuple[dict[int, Choice], tuple[int, int] | None]
"""The choices by index, and the tokens of prompt and answer."""
Ask = Callable[[str, dict[str, Any], bool], Answer]
"""An answer to a prompt by settings, streamed or whole."""


def put_together(parts: Iterable[Any]) -> Answer:
    """Of one answer, or of the chunks of one."""
    found: dict[int, Choice] = {}
    usage = None
    for part in parts:
        for told in part.choices:
            choice = found.setdefault(told.index, Choice())
            choice.text += said(told)
            choice.end = told.finish_reason or choice.end
            choice.tokens += scored(told.logprobs)
        usage = usage if part.usage is None else (part.usage.prompt_tokens, part.usage.completion_tokens)
    return found, usage


def said(choice: Any) -> str:
    if hasattr(choice, "text"):
        return choice.text
    return (choice.delta if hasattr(choice, "delta") else choice.message).content or ""


def scored(logprobs: Any) -> list[tuple[Any, ...]]:
    """Tokens, their log-probabilities and the likeliest ones, as either kind of answer has them."""
    if logprobs is None:
        return []
    if hasattr(logprobs, "content"):
        return [(token.token, token.logprob, [(top.token, top.logprob) for top in token.top_logprobs]) for token in logprobs.content or ()]
    return list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))


def completions(client: openai.OpenAI, model: str, tokens: int) -> Ask:
    def ask(prompt: str, settings: dict[str, Any], stream: bool) -> Answer:
        body: Any = {"model": model, "prompt": prompt, "max_tokens": tokens, **settings, **streamed(stream)}
        answer = client.completions.create(**body)
        return put_together(answer if stream else [answer])

    return ask


def chat(client: openai.OpenAI, model: str, tokens: int) -> Ask:
    def ask(prompt: str, settings: dict[str, Any], stream: bool) -> Answer:
        logprobs = {"logprobs": True, "top_logprobs": settings["logprobs"]} if "logprobs" in settings else {}
        messages = [{"role": "user", "content": prompt}]
        body: Any = {"model": model, "messages": messages, "max_completion_tokens": tokens, **settings, **logprobs, **streamed(stream)}
        answer = client.chat.completions.create(**body)
        return put_together(answer if stream else [answer])

    return ask


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def streamed(stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}


def compared(ask: Ask) -> dict[str, dict[str, int]]:
    """Of each kind of request, the answers that were compared with those alone and whole, and how many differed."""
    kinds: dict[str, dict[str, int]] = {}
    with ThreadPoolExecutor(CLIENTS) as clients:
        for kind, settings in SETTINGS.items():
            alone = [ask(prompt, settings, False) for prompt in PROMPTS]
            one_by_one = [ask(prompt, settings, True) for prompt in PROMPTS]
            together = list(clients.map(lambda prompt, settings=settings: ask(prompt, settings, True), PROMPTS))
            pairs = [*zip(alone, one_by_one, strict=True), *zip(alone, together, strict=True)]
            whole = sum(choice.end is not None for choices, _ in alone for choice in choices.values())
            tokens = sum(usage[1] for _, usage in alone if usage is not None)
            kinds[kind] = {"compared": len(pairs), "different": sum(one != other for one, other in pairs), "texts": whole, "tokens": tokens}
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    options = parser.parse_args()
    found = {}
    with served([options.model, "--backend", "native", "--dtype", options.dtype]) as server, openai_client(server.url) as client:
        for model in client.models.list():
            asks = {"completions": completions}
            if (model.model_extra or {})["dejavu"]["chat"]:
                asks["chat"] = chat
            for endpoint, ask in asks.items():
                found[f"{model.id}, {endpoint}"] = compared(ask(client, model.id, options.tokens))
    print(json.dumps(found))
    kinds = [kind for each in found.values() for kind in each.values()]
    sys.exit(1 if any(kind["different"] or kind["texts"] < len(PROMPTS) for kind in kinds) else 0)


if __name__ == "__main__":
    main()
