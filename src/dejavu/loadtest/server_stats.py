"""What a server tells of itself besides its answers (models, /health, memory at /metrics), and whether a load leaves something behind.

In: an HTTP client with the server's address. Out: model ids, facts, and a `LeakReport`: KV pages and resident memory before and after.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from dejavu.config import require

SETTLE_S, POLL_S = 10.0, 0.05  # how long pages may take to come back after the last answer
SLACK_MB, SLACK_SHARE = 16.0, 0.02  # growth of memory over the second half of a load that is no leak
PAGES = (("pages_free", "dejavu_kv_pages_free"), ("pages_total", "dejavu_kv_pages"))  # at /health, at /metrics
SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{.*\})? ([-+\d.eE]+)(?: \d+)?")  # a line of Prometheus' text format
RESIDENT = "process_resident_memory_bytes"  # a standard metric of Prometheus' clients


async def listed_models(client: httpx.AsyncClient) -> tuple[dict[str, str | None], str | None]:
    """The models that the server lists, each with its mode where dejavu tells it, and who owns them.

    Raises ValueError where it does not answer as OpenAI's API does.
    """
    try:
        response = await client.get("/v1/models", timeout=30)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise ValueError(f"{client.base_url} wants an API key, and not the one that it was sent, if any; give it with --api-key")
        if response.status_code != httpx.codes.OK:
            raise ValueError(f"{client.base_url} answers /v1/models with {response.status_code}: {response.text[:200]}")
        cards = response.json()["data"]
        modes = {str(card["id"]): (card.get("dejavu") or {}).get("mode") for card in cards}
        return modes, next((str(card["owned_by"]) for card in cards if card.get("owned_by")), None)
    except httpx.HTTPError as error:
        raise ValueError(f"no server answers at {client.base_url} ({type(error).__name__}); start one, or mend --url") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{client.base_url} does not list its models at /v1/models as OpenAI's API does") from error


def pick_models(requested: list[str], listed: Mapping[str, str | None], dense: str) -> list[str]:
    """The models to ask: those that are requested; else what is listed, if that is one model, with and without `dense` behind its name.

    Where the model runs dense anyway, once is enough.
    """
    missing = [model for model in requested if model not in listed]
    require(not missing, f"the server has no model {missing[0] if missing else ''!r}; it has {', '.join(listed)}")
    if requested:
        return list(dict.fromkeys(requested))
    bases = {model.removesuffix(dense) for model in listed}
    require(len(bases) == 1, f"the server has {len(bases)} models; choose with --model: {', '.join(listed) or 'none is listed'}")
    name, *others = sorted(listed, key=len)
    return [name] if listed[name] == "dense" else [name, *others]


async def health(client: httpx.AsyncClient) -> dict[str, Any]:
    """What /health tells; nothing where it is not there or tells no object."""
    try:
        found = (await client.get("/health", timeout=30)).json()
    except (httpx.HTTPError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """What /metrics tells, each metric summed over its labels; nothing where it is not there."""
    found: dict[str, float] = {}
    try:
        text = (await client.get("/metrics", timeout=30)).text
    except httpx.HTTPError:
        return found
    for line in text.splitlines():
        if match := SAMPLE.fullmatch(line):
            found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


def resident_bytes(told: Mapping[str, float], process: int | None) -> float | None:
    """Resident memory of the server: as it tells, else of the process by its id, where the system tells; None where nobody does."""
    if RESIDENT in told or process is None:
        return told.get(RESIDENT)
    status = Path(f"/proc/{process}/status")
    sizes = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS:")] if status.is_file() else []
    return 1024.0 * int(sizes[0]) if sizes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakReport:
    """pages: free ones before and after, of pages_total. memory_mb: resident memory before, and after each round.

    growth_mb: of memory from the middle round to the last, where everything that is made once has long been made.
    """

    pages_before: int | None
    pages_after: int | None
    pages_total: int | None
    memory_mb: tuple[float, ...]

    @property
    def pages_lost(self) -> int:
        return 0 if self.pages_before is None or self.pages_after is None else max(0, self.pages_before - self.pages_after)

    @property
    def growth_mb(self) -> float | None:
        return self.memory_mb[-1] - self.memory_mb[len(self.memory_mb) // 2] if len(self.memory_mb) > 2 else None

    @property
    def leaks(self) -> bool:
        grown = self.growth_mb
        return self.pages_lost > 0 or (grown is not None and grown > SLACK_MB + SLACK_SHARE * self.memory_mb[0])

    def to_dict(self) -> dict[str, Any]:
        names = ("pages_before", "pages_after", "pages_total", "pages_lost", "memory_mb", "growth_mb", "leaks")
        return {name: getattr(self, name) for name in names}


@dataclass(slots=True)
class LeakCheck:
    """Looks at a server before a load, after each of its rounds, and at its end. process: the server's id, where it is known."""

    client: httpx.AsyncClient
    process: int | None = None
    settle_s: float = SETTLE_S
    before: tuple[int | None, int | None] = (None, None)  # pages: free, total
    memory_mb: list[float] = field(default_factory=list)

    async def start(self) -> None:
        """Raises ValueError where the server tells neither its free pages nor its memory."""
        self.before = await self._idle(pages=0)
        await self.sample()
        told = self.before[0] is not None or self.memory_mb
        require(
            bool(told), "--check-leaks: the server tells neither its free pages (/health, /metrics) nor its memory (/metrics); leave it out"
        )

    async def sample(self) -> None:
        found = resident_bytes(await metrics(self.client), self.process)
        self.memory_mb += [] if found is None else [found / 1e6]

    async def finish(self) -> LeakReport:
        """After the last answer; waits until pages have come back, for settle_s at most."""
        free, total = self.before
        after, _ = await self._idle(pages=free or 0)
        return LeakReport(pages_before=free, pages_after=after, pages_total=total, memory_mb=tuple(self.memory_mb))

    async def _idle(self, *, pages: int) -> tuple[int | None, int | None]:
        """Free pages and all, once nothing runs and so many are free, or when the time is over."""
        deadline = asyncio.get_running_loop().time() + self.settle_s
        while True:
            told, counted = await health(self.client), await metrics(self.client)
            free, total = (told.get(key, counted.get(name)) for key, name in PAGES)
            busy = told.get("running") or told.get("queued") or (free is not None and free < pages)
            if not busy or asyncio.get_running_loop().time() >= deadline:
                return None if free is None else int(free), None if total is None else int(total)
            await asyncio.sleep(POLL_S)
