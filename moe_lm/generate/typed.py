"""Input at a terminal: lines that can be edited, may hold line ends, and are remembered."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


def typed_lines(words: Sequence[str], history: bool = True) -> Iterator[str]:
    """The texts that are typed, each ended by Enter, until Ctrl-D. Tab completes `words` at the beginning of a text.

    Alt+Enter, or Escape and then Enter, begins a new line, and lines that are pasted stay together. Ctrl-C discards
    the text, and ends the input when it comes twice. With `history` the arrows also find texts of earlier chats.
    """
    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation=lambda width, number, wrapped: "." * (width - 1) + " ",
        key_bindings=_keys(),
        history=_history() if history else InMemoryHistory(),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        enable_suspend=True,
    )
    once = False
    while True:
        try:
            line = session.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            if once and not session.default_buffer.text:
                return
            once = True
            print("(press Ctrl-C again to end)")
            continue
        once = False
        yield line


def history_file() -> Path:
    """The file of the history, in XDG's state directory. Raises RuntimeError without a home folder."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path("~/.local/state").expanduser()
    return folder / "moe-lm" / "chat_history"


def _history() -> History:
    try:
        return _KeptHistory()
    except RuntimeError:  # a container's user may have no home folder
        return InMemoryHistory()


class _KeptHistory(FileHistory):
    """A history in a file that only its owner can read. Where it cannot be read or written, the chat does without."""

    def __init__(self) -> None:
        self._file = history_file()
        super().__init__(self._file)

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch(mode=0o600)
            super().store_string(string)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
