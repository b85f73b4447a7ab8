"""A conversation: what the model reads of it, what is kept of it, and the command around it, in a pipe and at a terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import Tiny
from dejavu.cli.chat import Session
from dejavu.cli.main import run
from dejavu.cli.output import Output
from dejavu.conversation import MOST_TOKENS, MOST_TOKENS_OF_TEXT, ROOM, Conversation
from dejavu.engine.options import EngineOptions
from dejavu.generation.generation import Generation
from dejavu.generation.pieces import Piece
from dejavu.language_model import LanguageModel
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.template import rendered
from dejavu.model.tokenizer import Tokenizer
from helpers.adapters import make_adapter

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + TEMPLATE
CONTEXT = 160


@pytest.fixture(scope="module")
def work(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a chat template and an adapter (`chatty`), one whose template takes no system message (`strict`),
    one that continues texts (`plain`), and one without a tokenizer (`mute`)."""
    path = tmp_path_factory.mktemp("chat")
    model = tiny("opt", max_positions=CONTEXT, eos_token_ids=())
    lacking = dataclasses.replace(tokenizer, eos_token_ids=())
    export(model, lacking, path / "plain")
    adapter = make_adapter(model.config, load(path / "plain").base_hash)
    export(model, dataclasses.replace(lacking, chat_template=TEMPLATE), path / "chatty", adapter=adapter)
    export(model, dataclasses.replace(lacking, chat_template=NO_SYSTEM), path / "strict")
    shutil.copytree(path / "plain", path / "mute")
    (path / "mute" / "tokenizer.json").unlink()
    return path


@pytest.fixture(scope="module")
def chatty(work: Path) -> LanguageModel:
    return load(work / "chatty")


@pytest.fixture(scope="module")
def plain(work: Path) -> LanguageModel:
    return load(work / "plain")


@pytest.fixture
def prompts(chatty: LanguageModel, plain: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the models are given to read, in order."""
    seen: list[Any] = []
    for lm in (chatty, plain):

        def start(prompt: Any, *, original: Callable[..., Generation] = lm.start, **options: Any) -> Generation:
            seen.append(prompt)
            return original(prompt, **options)

        monkeypatch.setattr(lm, "start", start)
    return seen


def said(conversation: Conversation, question: str, **options: bool) -> str:
    text = "".join(conversation.ask(question, **options))
    assert text == conversation.turns[-1].answer and conversation.turns[-1].question == question
    return text


def test_the_model_reads_all_that_was_said_through_its_template(chatty: LanguageModel, prompts: list[Any]) -> None:
    conversation = Conversation(chatty, system="be kind", max_new_tokens=5)
    first = said(conversation, "the cat?")
    second = said(conversation, "the hat?", dense=True)
    system, one, two = (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "the cat?"},
        {"role": "user", "content": "the hat?"},
    )
    answer = {"role": "assistant", "content": first}
    assert prompts == [[system, one], [system, one, answer, two]]
    assert conversation.messages == [system, one, answer, two, {"role": "assistant", "content": second}]
    assert [turn.dense for turn in conversation.turns] == [False, True]
    shares = [conversation.read_share(turn) for turn in conversation.turns]
    assert shares[0] is not None and shares[0] != 1.0 and shares[1] == 1.0
    conversation.reset()
    assert conversation.messages == [system] and conversation.turns == []


def test_an_answer_is_that_of_the_whole_history_though_most_of_it_is_not_read_again(chatty: LanguageModel) -> None:
    conversation = Conversation(chatty, max_new_tokens=6)
    said(conversation, "the cat sat on the mat and then?")
    history = [*conversation.messages, {"role": "user", "content": "why?"}]
    assert said(conversation, "why?") == chatty.generate(history, max_new_tokens=6)
    assert conversation.turns[1].answer.reused_tokens >= 16 > conversation.turns[0].answer.reused_tokens


def test_what_no_longer_fits_is_not_read_but_kept(chatty: LanguageModel, prompts: list[Any]) -> None:
    conversation = Conversation(chatty, system="be kind")
    assert conversation.max_new_tokens == MOST_TOKENS > CONTEXT
    while not conversation.dropped:
        list(zip(range(2), conversation.ask("cat?"), strict=False))
    assert len(conversation.turns) > 3 and len(conversation.messages) == 1 + 2 * len(conversation.turns)
    last = prompts[-1]
    assert last[0] == {"role": "system", "content": "be kind"} and last[1:-1] == conversation.messages[1:-2][2 * conversation.dropped :]

    def fits(messages: Sequence[dict[str, str]]) -> bool:
        return len(chatty.tokenizer.encode_plain(rendered(chatty.tokenizer, messages))) + CONTEXT // ROOM <= CONTEXT

    assert fits(last) and not fits([last[0], *conversation.messages[2 * conversation.dropped - 1 : -1]])
    before = conversation.messages, conversation.dropped
    with pytest.raises(ValueError, match=f"the context holds {CONTEXT}|fills the context of {CONTEXT}"):
        list(conversation.ask("the cat " * CONTEXT))
    assert (conversation.messages, conversation.dropped) == before


def test_a_full_answer_ends_with_the_context(chatty: LanguageModel) -> None:
    conversation = Conversation(chatty)
    said(conversation, "the cat?")
    answer = conversation.turns[0].answer
    assert answer.finish_reason == "length" and answer.prompt_tokens + answer.new_tokens == CONTEXT


def test_a_model_without_a_template_continues_a_text(plain: LanguageModel, prompts: list[Any]) -> None:
    conversation = Conversation(plain, max_new_tokens=4)
    first = said(conversation, "the cat")
    second = said(conversation, "")
    said(conversation, "the end")
    assert prompts == ["the cat", f"the cat{first}", f"the cat{first}{second}\nthe end"]
    assert Conversation(plain).max_new_tokens == MOST_TOKENS_OF_TEXT
    with pytest.raises(ValueError, match="'be kind'.*has none"):
        Conversation(plain, system="be kind")
    with pytest.raises(ValueError, match="no tokens|at least one"):
        list(Conversation(plain_without_bos(plain)).ask(""))


def plain_without_bos(lm: LanguageModel) -> LanguageModel:
    checkpoint = dataclasses.replace(lm.checkpoint, tokenizer=dataclasses.replace(lm.tokenizer, adds_bos=False))
    return LanguageModel(checkpoint, EngineOptions(backend="torch"))


def test_a_text_that_fills_the_context_leaves_its_last_part_to_go_on_from(plain: LanguageModel, prompts: list[Any]) -> None:
    conversation = Conversation(plain, max_new_tokens=CONTEXT)
    said(conversation, "the cat sat")
    assert conversation.turns[0].answer.finish_reason == "length"
    with pytest.raises(ValueError, match="fills the context"):
        list(conversation.ask(""))
    said(conversation, "the end")
    assert prompts[-1] == "the end" and conversation.dropped == 1


def test_a_seed_gives_each_answer_its_own(chatty: LanguageModel) -> None:
    def talk(seed: int) -> list[str]:
        conversation = Conversation(chatty, max_new_tokens=6, seed=seed, temperature=3.0)
        answers = [said(conversation, "the cat?")]
        conversation.reset()
        return [*answers, said(conversation, "the cat?")]

    first, again = talk(5), talk(5)
    assert first == again and first[0] != first[1] and talk(6)[0] == first[1]


class Interrupted:
    """Pieces of generations, of which one is interrupted: `at` counts from 0 over all of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, interrupt: Callable[[], None]) -> None:
        original, self.seen = Generation.__next__, 0

        def following(generation: Generation) -> Piece:
            self.seen += 1
            if self.seen == at + 1:
                interrupt()
            return original(generation)

        monkeypatch.setattr(Generation, "__next__", following)


def control_c() -> None:
    raise KeyboardInterrupt


def signalled() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_answer_is_kept_and_its_engine_used_again(chatty: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(chatty, max_new_tokens=20)
    whole = said(conversation, "the cat?")
    conversation.reset()
    monkeypatch.setattr("dejavu.generation.engine_cache.make_engine", lambda *args, **options: pytest.fail("a new engine was made"))
    pieces = conversation.ask("the cat?")
    part = next(pieces) + next(pieces)
    pieces.close()
    (turn,) = conversation.turns
    assert turn.answer == part and whole.startswith(part) and len(part) < len(whole)
    assert turn.answer.finish_reason is None and conversation.messages[-1]["content"] == part
    assert said(conversation, "why?")


def test_an_interrupt_keeps_what_was_written_and_a_message_without_an_answer_goes(
    chatty: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(chatty, max_new_tokens=20)
    Interrupted(monkeypatch, 3, control_c)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.ask("the cat?"))
    assert conversation.turns[0].answer.new_tokens == 3
    Interrupted(monkeypatch, 0, control_c)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.ask("the hat?"))
    assert len(conversation.turns) == 1


def test_what_was_said_is_saved_once(chatty: LanguageModel, plain: LanguageModel, tmp_path: Path) -> None:
    conversation = Conversation(chatty, system="be kind", max_new_tokens=4)
    with pytest.raises(ValueError, match="nothing was said"):
        conversation.save(tmp_path / "talk.txt")
    answer = said(conversation, "the cat?")
    assert conversation.save(tmp_path / "talk.txt").read_text() == f"system: be kind\n\nuser: the cat?\n\nassistant: {answer}\n"
    lines = conversation.save(tmp_path / "talk.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == conversation.messages
    with pytest.raises(ValueError, match=r"talk.txt exists and is not overwritten; name a new file"):
        conversation.save(tmp_path / "talk.txt")
    assert (tmp_path / "talk.txt").read_text().startswith("system")
    text = Conversation(plain, max_new_tokens=4)
    answer = said(text, "the cat")
    assert text.save(tmp_path / "text").read_text() == f"the cat{answer}\n"


# The command


@pytest.fixture
def piped(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `dejavu chat` in the folder `work` on lines of stdin: status, stdout, stderr."""
    monkeypatch.chdir(work)

    def call(lines: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        status = run(["chat", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_lines_of_a_pipe_are_messages_and_commands(piped, work: Path) -> None:
    status, out, err = piped("the cat?\n\n/dense\nthe hat?\n/save one.jsonl\n", "chatty", "-n", "6", "--system", "be kind")
    messages = [json.loads(line) for line in (work / "one.jsonl").read_text().splitlines()]
    assert (status, err) == (0, "") and "> " not in out and "\033" not in out
    assert [message["content"] for message in messages if message["role"] != "assistant"] == ["be kind", "the cat?", "the hat?"]
    assert all(message["content"] in out for message in messages if message["role"] == "assistant")
    first, second = (line for line in out.splitlines() if "tok/s" in line and line.startswith("6 tokens"))
    assert "sparse · MLP density 0." in first and first.endswith("% of a dense token · cut at -n 6")
    assert "dense · MLP density 1.00 · reads 100 % of a dense token" in second


def test_one_object_for_programs(piped) -> None:
    status, out, err = piped("the cat?\n/reset\nthe hat?", "chatty", "-n", "4", "--json")
    result = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert [message["role"] for message in result["messages"]] == ["user", "assistant"] and result["messages"][0]["content"] == "the hat?"
    assert len(result["turns"]) == 2 and {"tok_s", "mlp_density", "head_density", "read_share"} <= set(result["turns"][0])
    assert result["turns"][0]["mode"] == "sparse" and 0 < result["turns"][0]["mlp_density"] < 1 and result["model"] == "chatty"


def test_a_mistake_is_said_and_the_next_message_answered(piped, work: Path) -> None:
    (work / "there.txt").write_text("precious")
    lines = "/fly now\nthe cat?\n/save there.txt\n/save\n/reset all\n//the hat?\n/quit\nnever read\n"
    status, out, err = piped(lines, "chatty", "-n", "4")
    assert status == 2 and (work / "there.txt").read_text() == "precious" and out.count("4 tokens") == 2
    unknown, exists, nameless, reset = err.splitlines()
    assert "'/fly'" in unknown and "not sent" in unknown and "//text" in unknown and "there.txt exists" in exists
    assert "name of a new file" in nameless and "'all'" in reset and all(line.startswith("dejavu: ") for line in err.splitlines())


def test_sparse_is_refused_without_an_adapter(piped) -> None:
    status, _, err = piped("/sparse\n", "chatty", "--dense")
    assert status == 2 and err.count("\n") == 1 and "without an adapter" in err and "--adapter" in err


def test_a_model_without_a_template_says_so_once(piped) -> None:
    status, out, err = piped("the cat\n\nthe end\n", "plain", "-n", "3", "--temperature", "0.5", "--top-k", "9", "--top-p", "0.9")
    assert (status, err, out.count("no chat template")) == (0, "", 1) and out.count("3 tokens") == 3 and "dense" in out


def test_messages_of_several_lines(piped) -> None:
    result = json.loads(piped('"""/the cat\nsat?"""\n', "chatty", "-n", "2", "--json")[1])
    assert result["messages"][0]["content"] == "/the cat\nsat?"
    status, _, err = piped('"""the cat', "chatty")
    assert status == 2 and "no end" in err


def test_that_old_messages_are_no_longer_read_is_said_once(piped) -> None:
    status, out, err = piped("the cat sat on the mat?\n" * 7, "chatty", "-n", "8")
    assert (status, err) == (0, "") and out.count("note: what was said no longer fits") == 1 and out.count("8 tokens") == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "unknown model 'nowhere'"),
        (("mute",), "no tokenizer in"),
        (("chatty", "-n", "0"), "1 or more, not 0"),
        (("chatty", "--temperature", "-1"), "-1"),
        (("strict", "--system", "be kind"), "no system message"),
        (("plain", "--system", "be kind"), "'be kind'"),
    ],
)
def test_mistakes_of_the_command_line(piped, arguments: tuple[str, ...], message: str) -> None:
    status, _, err = piped("the cat?\n", *arguments)
    assert status == 2 and err.count("\n") == 1 and message in err


def test_bytes_that_are_no_text_are_refused(piped) -> None:
    status, _, err = piped("the \udcff cat?\nthe hat?\n", "chatty", "-n", "2")
    assert status == 2 and err.count("\n") == 1 and "UTF-8" in err


# At a terminal


@pytest.fixture
def terminal(chatty: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Talk with these lines, exceptions being keys: status and what is shown. Then ^D."""

    def call(lines: Sequence[str | type[BaseException]], *, as_json: bool = False) -> tuple[int, str]:
        typed: Iterator[str | type[BaseException]] = iter(lines)

        def read(prompt: str) -> str:
            assert prompt in ("> ", ". ")
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        status = Session(Conversation(chatty, max_new_tokens=12), Output(as_json), interactive=True).run()
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def test_control_c_at_the_prompt_leaves_when_pressed_twice_in_a_row(terminal) -> None:
    status, shown = terminal([KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt, "the cat?"])
    assert status == 0 and shown.count("/quit leaves") == 2 and "/save FILE" in shown and "tok/s" not in shown


def test_a_mistake_at_a_terminal_is_no_exit_status(terminal) -> None:
    status, shown = terminal(["/fly"])
    assert status == 0 and "'/fly'" in shown


@pytest.mark.parametrize("interrupt", [signalled, control_c])
def test_control_c_stops_an_answer_and_not_the_program(terminal, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[], None]) -> None:
    before = signal.getsignal(signal.SIGINT)
    Interrupted(monkeypatch, 4, interrupt)
    status, shown = terminal(["the cat?", "the hat?"])
    stopped, whole = (line for line in shown.splitlines() if "tokens ·" in line)
    assert status == 0 and stopped.endswith("stopped") and whole.startswith("12 tokens") and signal.getsignal(signal.SIGINT) is before
    assert stopped.startswith(f"{5 if interrupt is signalled else 4} tokens")


def test_control_c_before_anything_is_written(terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    Interrupted(monkeypatch, 0, control_c)
    status, shown = terminal(["the cat?"])
    assert status == 0 and "the message is not kept" in shown and "tokens ·" not in shown


def test_a_second_control_c_does_not_wait_for_the_next_piece(chatty: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signalled()
        signalled()
        pytest.fail("the second one did not interrupt")

    Interrupted(monkeypatch, 2, twice)
    session = Session(Conversation(chatty, max_new_tokens=12), Output(False), interactive=True)
    lines = iter(["the cat?"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
    assert session.run() == 0 and session.turns[0]["new_tokens"] == 2


def test_in_a_pipe_control_c_ends_the_command(piped, monkeypatch: pytest.MonkeyPatch) -> None:
    Interrupted(monkeypatch, 2, control_c)
    assert piped("the cat?\nthe hat?\n", "chatty")[0] == 130
