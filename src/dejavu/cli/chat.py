"""`dejavu chat`: a conversation in the terminal, or with the lines of a pipe.

In: lines from stdin, each a message or a command. Out: answers as they are written, each with a line on what it took.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dejavu.cli.messages import ChatTemplateKwargs, ControlTokens, template_kwargs
from dejavu.cli.options import (
    AdapterFolder,
    AsJson,
    Backend,
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
from dejavu.cli.output import Output, number, speed
from dejavu.cli.sampling import Temperature, TopK, TopP, sampling_values, sampling_words
from dejavu.engine.options import EngineOptions

if TYPE_CHECKING:
    from dejavu.conversation import Conversation, Turn

PROMPT, MORE = "> ", ". "
BLOCK = '"""'  # begins and ends a message of several lines
HELP = """\
/dense        write the next answers with every weight
/sparse       write the next answers with the adapter
/reset        forget what was said
/save FILE    write what was said to a new file: JSON lines of messages where FILE ends in .jsonl, else a text
/help         this list
/quit         leave, as ^D does
//text        send a text that begins with a slash
\"\"\"           begins a message of several lines, and ends it
^C            stop an answer; what was written is kept"""
TEXT_HELP = "an empty line  go on where the text stopped"


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A message before all others.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("-n", "--max-new-tokens", metavar="N", help="Most tokens of an answer; not set: 1024, without a chat template 128."),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    control_tokens: ControlTokens = False,
    adapter: AdapterFolder = None,
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
) -> int:
    """Talk with a model in the terminal, sparse where it has an adapter; /help lists commands, ^D leaves."""
    from dejavu.config import SamplingConfig, require
    from dejavu.conversation import Conversation

    out = Output(as_json)
    require(max_new_tokens is None or max_new_tokens >= 1, f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    kwargs = template_kwargs(chat_template_kwargs)
    SamplingConfig().overridden(**given)  # an impossible value is said before a model is loaded
    options = EngineOptions(backend=backend, dtype=dtype, cache_dtype=cache_dtype, screened_head=screened_head, threads=threads)
    lm = open_model(
        model, out, options, seed=seed,
        adapter=adapter, dense=dense, download=download, offline=offline, drawing=lambda lm: sampling_words(lm, **given),
    )  # fmt: skip
    conversation = Conversation(
        lm, system=system, max_new_tokens=max_new_tokens, seed=seed, chat_template_kwargs=kwargs,
        sanitize_control_tokens=not control_tokens, **given,
    )  # fmt: skip
    session = Session(conversation, out, interactive=sys.stdin.isatty())
    status = session.run()
    out.finish(
        {
            "messages": conversation.messages,
            "turns": session.turns,
            "backend": lm.backend,
            "dtype": lm.dtype,
            "cache_dtype": lm.cache_dtype,
            "screened_head": lm.screened_head,
            "sampling": sampling_values(lm, seed=seed, **given),
            "model": lm.name,
            "notes": [*lm.notes, *session.notes],
        }
    )
    return status


class Session:
    """A conversation with what reads its messages and shows its answers.

    interactive: at a terminal, where a mistake is said and no more, and ^C stops an answer alone; else exit status and ^C are those of
    any command. turns: figures of every answer, also before a /reset. notes: what was told in addition to the answers.
    """

    def __init__(self, conversation: Conversation, out: Output, *, interactive: bool) -> None:
        self.conversation, self.out, self.interactive = conversation, out, interactive
        self.dense = False
        self.turns: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._mistakes = 0
        self._commands: dict[str, Callable[[], None]] = {
            "/dense": lambda: self._run_dense(True),
            "/sparse": lambda: self._run_dense(False),
            "/reset": self._reset,
            "/help": self._help,
        }

    def run(self) -> int:
        """Until the end of the messages; the exit status."""
        if not self.conversation.has_template:
            self._note(f"{self.conversation.lm.name} has no chat template: it continues the text that the messages and its answers make up")
        if self.interactive:
            with contextlib.suppress(ImportError):  # Windows has none
                readline = importlib.import_module("readline")  # `input` then edits lines and remembers them
                readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
            self.out.show("[dim]/help lists commands, ^D leaves[/dim]")
        leaving = False  # with the next ^C
        while True:
            try:
                line, is_text = self._next()
                leaving = False
                if not is_text and line.strip() == "/quit":
                    break
                self._obey(line, is_text)
            except EOFError:
                self.out.write("\n" if self.interactive else "")
                break
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.out.write("\n")
                if leaving:
                    break
                leaving = True
                self.out.show("[dim]^D or /quit leaves, and so does ^C once more[/dim]")
            except (ValueError, OSError) as error:
                print("dejavu: " + " ".join(str(error).split()), file=sys.stderr)
                self._mistakes += 1
        return 2 if self._mistakes and not self.interactive else 0

    def _next(self) -> tuple[str, bool]:
        """The next line, and whether it is a text whatever it begins with."""
        line = self._read(PROMPT)
        if not line.startswith(BLOCK):
            return line, False
        text = line.removeprefix(BLOCK)
        while not text.endswith(BLOCK):
            try:
                text += "\n" + self._read(MORE)
            except EOFError as error:
                raise ValueError(f"the message that begins with {BLOCK} has no end and was not sent; end it with {BLOCK}") from error
        return text.removesuffix(BLOCK), True

    def _read(self, prompt: str) -> str:
        return input(prompt if self.interactive and not self.out.as_json else "")

    def _obey(self, line: str, is_text: bool) -> None:
        if not is_text and line.startswith("//"):
            line = line[1:]
        elif not is_text and line.startswith("/"):
            self._command(*line.split(maxsplit=1))
            return
        goes_on = not self.conversation.has_template and bool(self.conversation.turns)
        if line.strip() or goes_on:
            self._answer(line if line.strip() else "")

    def _command(self, name: str, rest: str = "") -> None:
        if name == "/save":
            if not rest:
                raise ValueError("/save needs the name of a new file, as in /save talk.txt")
            self.out.say(f"saved to {self.conversation.save(rest.strip())}")
        elif name not in self._commands:
            raise ValueError(f"unknown command {name!r}, which was not sent; /help lists commands, //text sends /text")
        elif rest:
            raise ValueError(f"{name} takes nothing after it, not {rest!r}; leave that out")
        else:
            self._commands[name]()

    def _run_dense(self, dense: bool) -> None:
        lm = self.conversation.lm
        if not dense and lm.adapter is None:
            raise ValueError(f"{lm.name} runs without an adapter, so that every answer is dense; start with --adapter DIR, without --dense")
        self.dense = dense
        drawn = sampling_words(lm, dense=dense, **self.conversation.sampling)
        self.out.show(f"the next answers run {'dense' if dense else 'sparse'}, drawn: {drawn}")

    def _reset(self) -> None:
        self.conversation.reset()
        self.out.show("what was said is forgotten" + ("" if self.conversation.system is None else ", but for the system message"))

    def _help(self) -> None:
        self.out.say(HELP if self.conversation.has_template else f"{HELP}\n{TEXT_HELP}")

    def _answer(self, text: str) -> None:
        turns = self.conversation.turns
        known, dropped = len(turns), self.conversation.dropped
        with _interrupts(caught=self.interactive) as interrupted:
            try:
                with contextlib.closing(self.conversation.ask(text, dense=self.dense)) as pieces:
                    for piece in pieces:
                        self.out.write(piece)
                        if interrupted():
                            break
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
            if len(turns) == known:
                self.out.show("\n[dim]stopped before anything was written; the message is not kept[/dim]")
                return
            figures = figures_of(turns[-1], self.conversation)
            self.turns.append(figures)
            self.out.show("", f"[dim]{status_line(figures, most=self.conversation.max_new_tokens)}[/dim]")
        if self.conversation.dropped and not dropped:
            context = f"the context of {self.conversation.lm.config.max_positions:,} tokens"
            self._note(f"what was said no longer fits {context}: the model does not read the oldest messages; /save has them")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.out.show(f"[yellow]note:[/yellow] {text}")


@contextlib.contextmanager
def _interrupts(*, caught: bool) -> Generator[Callable[[], bool]]:
    """Whether ^C was pressed: once it is only noted, so that nothing is torn apart in the middle of a step; the next one interrupts."""
    pressed: list[int] = []
    if not caught:
        yield lambda: False
        return

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def figures_of(turn: Turn, conversation: Conversation) -> dict[str, Any]:
    """What an answer took, as --json has it."""
    answer = turn.answer
    return {
        "mode": "dense" if turn.dense else "sparse",
        "prompt_tokens": answer.prompt_tokens,
        "reused_tokens": answer.reused_tokens,
        "new_tokens": answer.new_tokens,
        "tok_s": answer.tok_s,
        "prefill_tok_s": answer.prefill_tok_s,
        "mlp_density": answer.mlp_density,
        "head_density": answer.head_density,
        "read_share": conversation.read_share(turn),
        "finish_reason": answer.finish_reason,
        "sampling": turn.sampling.to_dict(),
    }


def status_line(figures: dict[str, Any], *, most: int) -> str:
    """The same for a person; most: tokens that the answer might have had."""
    tokens, ended = figures["new_tokens"], figures["finish_reason"]
    parts = [f"{tokens:,} token{'s' if tokens != 1 else ''}"]
    if figures["tok_s"] is not None:
        parts.append(speed(figures["tok_s"]))
    parts.append(figures["mode"])
    if figures["read_share"] is not None:
        parts += [f"MLP density {number(figures['mlp_density'], '.2f')}", f"reads {100 * figures['read_share']:.0f} % of a dense token"]
    if ended is None:
        parts.append("stopped")
    elif ended == "length":
        parts.append(f"cut at -n {most}" if tokens == most else "the context is full")
    return " · ".join(parts)
