"""What a server does when things go wrong, in figures: clients that leave, bodies that make no sense, a full queue, a killed process.

    python recipes/serve_faults.py opt-mini --seconds 60

In: a model. Out: one JSON object. Half of the clients read every answer to its end and compare it with what the model says alone (fp32,
greedy, so a difference is a fault); the other half leave in the middle of theirs. Malformed bodies are sent as well, and now and
then more requests at once than the queue takes. Then the process is killed while all read, and started again. The exit status is 1 if
an answer was wrong, cut short or hung, a connection was lost before the process was killed, a status made no sense, pages did not come
back, or one of these things did not happen at all.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import httpx

from dejavu.loadtest.client import Target, byte_lines
from dejavu.loadtest.process import served
from dejavu.loadtest.server_stats import LeakCheck, health

SLOTS, QUEUE = 8, 24
BURST_EVERY_S = 7.0
HUNG_S = 60.0  # a client that hears nothing for so long
TOKENS, LONG = 48, 900  # of an answer, and of one in the middle of which the process is killed
PROMPTS = [f"{start} {middle}" for start in ("The keeper of the", "In the year", "She said that", "A small boat") for middle in
           ("old lighthouse", "the war ended and", "nobody knew", "at night", "a river", "is", "his father", "12 + 7")]  # fmt: skip
BURST = PROMPTS * 2
MALFORMED: tuple[bytes, ...] = (
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": 7}', b'{"prompt": [[]]}', b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "temperature": "hot"}', b'{"prompt": "a", "n": 10000}', b'{"prompt": ["a", 1]}', b'{"prompt": [999999999]}',
    b'{"prompt": "a", "stop": [1]}', b'{"prompt": "a", "logit_bias": {"x": 1}}', b'{"prompt": "a", "stream_options": 3, "stream": true}',
    b'{"model": "none", "prompt": "a"}', b'{"prompt": "' + b"long " * 400_000 + b'"}', b'{"messages": []}',
)  # fmt: skip


class Run:
    """Clients of one server, and what they saw."""

    def __init__(self, client: httpx.AsyncClient, model: str, expected: dict[str, str]) -> None:
        self.client, self.model, self.expected = client, model, expected
        self.seen: Counter[str] = Counter()
        self.longest_silence_s = 0.0
        self.drawn = random.Random(1)

    async def answer(
        self, prompt: str, *, pieces: int | None = None, tokens: int = TOKENS, begun: asyncio.Event | None = None
    ) -> str | None:
        """The text of a streamed answer; of one that is left after so many pieces, and of one that is no answer, None."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": tokens == LONG}
        found, finished, heard = [], False, time.perf_counter()
        try:
            async with asyncio.timeout(HUNG_S) as silence, self.client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    told = response.status_code == httpx.codes.TOO_MANY_REQUESTS and "retry-after" in response.headers
                    self.seen["refused, with Retry-After" if told else f"status {response.status_code}"] += 1
                    return None
                async for line in byte_lines(response.aiter_bytes()):
                    now = time.perf_counter()
                    heard, self.longest_silence_s = now, max(self.longest_silence_s, now - heard)
                    silence.reschedule(asyncio.get_running_loop().time() + HUNG_S)
                    if not line.startswith(b"data: "):
                        continue
                    if line == b"data: [DONE]":
                        if finished:
                            return "".join(found)
                        break
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        self.seen["error in a stream"] += 1
                        return None
                    found += [choice["text"] for choice in event["choices"]]
                    finished |= any(choice["finish_reason"] for choice in event["choices"])
                    if begun is not None and found:
                        begun.set()
                    if pieces is not None and len(found) >= pieces:
                        self.seen["left"] += 1
                        return None
        except TimeoutError:
            self.seen["hung"] += 1
            return None
        except httpx.HTTPError:
            self.seen["connection lost"] += 1
            return None
        self.seen["cut short"] += 1
        return None

    async def reads(self, prompt: str) -> bool:
        """Whether there was a whole answer; if so, it is compared."""
        text = await self.answer(prompt)
        if text is not None:
            self.seen["right" if text == self.expected[prompt] else "wrong"] += 1
        return text is not None

    async def stays(self, until: float) -> None:
        while time.perf_counter() < until:
            if not await self.reads(self.drawn.choice(PROMPTS)):
                await asyncio.sleep(0.2)

    async def leaves(self, until: float) -> None:
        while time.perf_counter() < until:
            if await self.answer(self.drawn.choice(PROMPTS), pieces=self.drawn.randint(1, 20)) is None:
                await asyncio.sleep(0.2)

    async def malformed(self, until: float) -> None:
        for body in itertools.cycle(MALFORMED):
            if time.perf_counter() >= until:
                return
            path = self.drawn.choice(["/v1/completions", "/v1/chat/completions"])
            try:
                response = await self.client.post(path, content=body, headers={"content-type": "application/json"}, timeout=HUNG_S)
                told = response.is_client_error and "message" in response.json().get("error", {})
                self.seen["malformed, told why" if told else f"malformed, status {response.status_code}"] += 1
            except (httpx.HTTPError, json.JSONDecodeError) as error:
                self.seen[f"malformed, {type(error).__name__}"] += 1
            await asyncio.sleep(0.05)

    async def bursts(self, until: float) -> None:
        while time.perf_counter() < until:
            await asyncio.gather(*map(self.reads, BURST))
            await asyncio.sleep(BURST_EVERY_S)


async def expected_texts(client: httpx.AsyncClient, model: str) -> dict[str, str]:
    """What the model says, one prompt at a time."""
    found = {}
    for prompt in PROMPTS:
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        found[prompt] = (await client.post("/v1/completions", json=body)).raise_for_status().json()["choices"][0]["text"]
    return found


async def under_faults(url: str, model: str, process: int, clients: int, seconds: float) -> tuple[dict[str, str], dict[str, Any]]:
    async with Target(url=url).client() as client:
        run = Run(client, model, await expected_texts(client, model))
        check = LeakCheck(client, process=process)
        await check.start()
        until = time.perf_counter() + seconds
        work: list[Coroutine[Any, Any, None]] = [run.malformed(until), run.bursts(until)]
        for number in range(clients):
            work.append(run.stays(until) if number % 2 else run.leaves(until))
        await asyncio.gather(*work)
        report = await check.finish()
        await check.sample()
        told = await health(client)
        kept = {name: told.get(name) for name in ("status", "running", "queued", "last_error")}
        memory = [round(size) for size in check.memory_mb]
        leaks = {"pages_before": report.pages_before, "pages_after": report.pages_after, "memory_mb": memory}
        return run.expected, {"seen": dict(run.seen), "longest_silence_s": round(run.longest_silence_s, 2), "health": kept, **leaks}


async def until_killed(url: str, model: str, kill: Callable[[], None]) -> dict[str, Any]:
    """All slots write long texts when the process dies: what their readers see, and after how long the last of them knows."""
    async with Target(url=url).client() as client:
        run = Run(client, model, {})
        begun = [asyncio.Event() for _ in range(SLOTS)]
        readers = [asyncio.create_task(run.answer(PROMPTS[at], tokens=LONG, begun=begun[at])) for at in range(SLOTS)]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), HUNG_S)
        kill()
        killed = time.perf_counter()
        texts = await asyncio.gather(*readers)
        return {"seen": dict(run.seen), "whole": SLOTS - texts.count(None), "last_knew_s": round(time.perf_counter() - killed, 3)}


async def after_restart(url: str, model: str, expected: dict[str, str]) -> int:
    async with Target(url=url).client() as client:
        found = await expected_texts(client, model)
        return sum(found[prompt] != expected[prompt] for prompt in PROMPTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    arguments = [options.model, "--dtype", "fp32", "--slots", str(SLOTS), "--queue", str(QUEUE)]
    with served(arguments) as server:
        expected, faults = asyncio.run(under_faults(server.url, options.model, server.process.pid, options.clients, options.seconds))
        killed = asyncio.run(until_killed(server.url, options.model, server.process.kill))
        server.process.wait()
    started = time.perf_counter()
    with served(arguments) as server:
        restarted = {
            "ready_s": round(time.perf_counter() - started, 2),
            "different_answers": asyncio.run(after_restart(server.url, options.model, expected)),
        }
    print(json.dumps({"faults": faults, "killed": killed, "restarted": restarted}))
    sys.exit(1 if complaints(faults, killed, restarted) else 0)


def complaints(faults: dict[str, Any], killed: dict[str, Any], restarted: dict[str, Any]) -> list[str]:
    """What is not as it should be, also on stderr."""
    sensible = {"right", "left", "refused, with Retry-After", "malformed, told why"}
    found = [f"{count} x {name}" for name, count in faults["seen"].items() if name not in sensible]
    found += [f"nobody saw: {name}" for name in sensible - set(faults["seen"])]
    if faults["pages_before"] != faults["pages_after"] or faults["health"]["running"] or faults["health"]["queued"]:
        found.append("something is held after the last answer")
    if killed["whole"] or set(killed["seen"]) != {"connection lost"}:
        found.append("not every reader lost its connection when the process was killed")
    if restarted["different_answers"]:
        found.append("the new process answers otherwise")
    for line in found:
        print(line, file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
