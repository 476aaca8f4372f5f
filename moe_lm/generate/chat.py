"""The verb `chat`: a conversation at a terminal, or plain lines in and plain answers out.

Answers go to stdout, everything about them to stderr.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.terminal import check_typed, colours, printable
from moe_lm.config.generation import LoadConfig, SamplingConfig
from moe_lm.generate.conversation import Conversation
from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.generate.text import Delta, Speed

COMMAND = re.compile(r"/([a-zA-Z]+)(?:\s+(.*))?", re.DOTALL)  # a text with a second slash is a path, not a command
ENDS = {"interrupted": ", stopped", "length": ", cut at the limit"}
KEYS = "Enter sends; Alt+Enter: new line; Ctrl-C: stop; Ctrl-D: end; /help: commands"


def chat(run: Path, settings: Settings, load: LoadConfig | None = None, history: bool = True) -> None:
    """Talk until /quit or Ctrl-D.

    Ctrl-C stops an answer, which stays in the conversation as far as it went. Raises UsageError for a run that has no
    chat template.
    """
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        print(f"loading {run}", file=sys.stderr, flush=True)
    session = Session.open(run, load or LoadConfig())
    if not session.tokenizer.has_chat_template:
        raise UsageError(
            f"the tokenizer of {run} has no chat template, so no conversation can be written for the model; continue "
            "texts with moe-lm sample, or add chat_template.jinja to its folder and fine-tune it"
        )
    # The first forward pass imports parts of torch: a Ctrl-C meant for the answer would leave them half imported.
    list(session.complete("", Settings(max_new_tokens=1)))
    talk = Chat(Conversation(session, settings), at_terminal)
    if not at_terminal:
        talk.through(piped_lines())
        return
    from moe_lm.generate.typed import typed_lines

    talk.note(f"{session.checkpoint.name}, {session.model.config.max_position_embeddings:,} tokens of context")
    talk.note(KEYS)
    talk.through(typed_lines([f"/{name}" for name in talk.commands], history))


class Chat:
    """Takes lines, each a question or a command."""

    def __init__(self, conversation: Conversation, at_terminal: bool) -> None:
        self.conversation, self.at_terminal = conversation, at_terminal
        self.commands: dict[str, tuple[str, str, Callable[[str], object]]] = {
            "system": ("TEXT", "set the system prompt; without TEXT there is none", self._system),
            "temp": ("X", "set the temperature; 0 is greedy", self._temp),
            "save": ("FILE", "append the conversation to a JSONL file for moe-lm finetune", self._save),
            "retry": ("", "ask the last question again", self._retry),
            "undo": ("", "forget the last question and its answer", self._undo),
            "new": ("", "forget the conversation, but keep the system prompt", self._new),
            "help": ("", "show this list", self._help),
            "quit": ("", "end the chat, as Ctrl-D does", self._quit),
        }
        self._ended = False

    def through(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                self._take(line.strip())
            except MoeLmError as error:  # the conversation stays
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:  # between two answers
                print()
            if self._ended:
                return

    def note(self, text: str) -> None:
        """Print a remark about the conversation, dim on a terminal."""
        print(f"\x1b[2m{text}\x1b[0m" if colours(sys.stderr) else text, file=sys.stderr, flush=True)

    def _take(self, line: str) -> None:
        command = COMMAND.fullmatch(line)
        if command is None:
            if line:
                self._ask(line)
            return
        name, argument = command[1].lower(), (command[2] or "").strip()
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1, cutoff=0.4)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise UsageError(f"there is no command /{name}; {hint}")
        takes, _, run = self.commands[name]
        if argument and not takes:
            raise UsageError(f"/{name} takes no argument, but {argument!r} was given; leave it out")
        run(argument)

    def _ask(self, question: str) -> bool:
        """Answer a question. Returns False when the answer was stopped or had no words."""
        check_typed("the question", question)
        reply = self.conversation.ask(question)
        if reply.forgotten:
            fitting = len(self.conversation.turns) + 1 - reply.forgotten
            self.note(f"(only the last {fitting} messages fit)")
        text, end, speed = self._show(reply.deltas)
        kept = self.conversation.keep(question, text, whole=end not in ENDS)
        if not kept:
            self.note("(the answer has no words: question and answer are forgotten)")
        elif self.at_terminal:
            self.note(f"{speed}{ENDS.get(end, '')}")
        return kept and end != "interrupted"

    def _show(self, deltas: Iterable[Delta]) -> tuple[str, str, Speed]:
        """Print an answer as it comes. Returns its text, why it ended ("interrupted" by Ctrl-C), and its speed."""
        text, end, speed = "", "interrupted", Speed()
        with suppress(KeyboardInterrupt):
            try:
                for delta in deltas:
                    print(printable(delta.text) if self.at_terminal else delta.text, end="", flush=True)
                    text += delta.text
                    speed.see(delta)
                    end = delta.finish or end
            finally:
                print(flush=True)
        return text, end, speed

    def _system(self, text: str) -> None:
        check_typed("/system", text)
        self.conversation.system = text
        self.note("(system prompt set)" if text else "(no system prompt)")

    def _temp(self, text: str) -> None:
        try:
            temperature = SamplingConfig(temperature=text).temperature  # type: ignore[arg-type]
        except ValueError as error:
            now = self.conversation.settings.sampling.temperature
            raise UsageError(f"/temp {text!r} is not a number of at least 0; it is {now} now") from error
        self.conversation.set_temperature(temperature)
        self.note(f"(temperature {temperature})")

    def _save(self, text: str) -> None:
        if not text:
            raise UsageError("/save needs the name of a file, like /save talks.jsonl")
        trainable = self.conversation.save(Path(text))
        why = "" if trainable else "; every answer in it was cut short, so fine-tuning will leave it out"
        self.note(f"(appended to {text}{why})")

    def _retry(self, _: str) -> None:
        before, answered = list(self.conversation.turns), False
        question = self.conversation.undo()
        try:
            answered = self._ask(question)
        finally:
            if not answered:
                self.conversation.turns = before
                self.note("(the previous answer stays)")

    def _undo(self, _: str) -> None:
        self.note(f"(forgotten: {self.conversation.undo()!r})")

    def _new(self, _: str) -> None:
        self.conversation.clear()
        self.note("(a new conversation)")

    def _help(self, _: str) -> None:
        for name, (argument, meaning, _run) in self.commands.items():
            self.note(f"{f'/{name} {argument}':<14} {meaning}")
        self.note(KEYS)

    def _quit(self, _: str) -> None:
        self._ended = True


def piped_lines() -> Iterator[str]:
    """The lines of stdin. Raises UsageError when they are not UTF-8."""
    while True:
        try:
            line = input()
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise UsageError("the input is not UTF-8 text; convert it first") from error
        yield line
