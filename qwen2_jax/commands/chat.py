"""`qwen2-jax chat`: a conversation in the terminal, or line by line from a pipe."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from qwen2_jax.command import interrupt_by_exception, parse
from qwen2_jax.commands.session import Session, SessionOptions

HELP = """\
/reset  forget the conversation
/exit   leave (as does Ctrl-D)
/help   this
Ctrl-C stops an answer."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Talk to a model: each line is a message, each answer appears as it is made."""

    session: SessionOptions
    system: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: the template's)")] = None
    """The system message."""


def main(argv: Sequence[str]) -> int:
    options: Options = parse(Options, argv, prog="qwen2-jax chat")
    session = Session(options.session)
    _ = session.params
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (gives `input` its line editing and history)

        print("/help lists the commands.", file=sys.stderr)
        interrupt_by_exception()  # Ctrl-C stops an answer; lines from a pipe have nobody who would want only that
    opening = [] if options.system is None else [{"role": "system", "content": options.system}]
    chat = Chat(session, opening, interactive=interactive)
    while True:
        try:
            line = input("> " if interactive else "").strip()
            if line == "/exit":
                return 0
            if line:
                chat.hear(line)
        except EOFError:
            return 0
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8: {error}") from error
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(/exit leaves)", file=sys.stderr)


class Chat:
    """A conversation that grows by a message and its answer at a time."""

    def __init__(self, session: Session, opening: Sequence[dict[str, str]] = (), *, interactive: bool = True):
        """
        Args:
          session: the model.
          opening: messages that every conversation starts with.
          interactive: whether somebody is there who can try again after a mistake; else it is raised.
        """
        self.session = session
        self.interactive = interactive
        self.opening = list(opening)
        self.messages = list(opening)

    def hear(self, line: str) -> None:
        """Acts on a line: a command, or a message, which is answered on standard output."""
        if line == "/reset":
            self.messages = list(self.opening)
        elif line == "/help":
            print(HELP, file=sys.stderr)
        elif line.startswith("/"):
            print(f"there is no command {line.split()[0]}; /help lists them", file=sys.stderr)
        else:
            self._answer(line)

    def _answer(self, message: str) -> None:
        heard = [*self.messages, {"role": "user", "content": message}]
        pieces: list[str] = []
        try:
            prompt = self.session.encode(self.session.tokenizer.apply_chat_template(heard))
            self._check_room(prompt)
            for piece in self.session.stream(prompt):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except ValueError as error:
            if not self.interactive:
                raise
            print(error, file=sys.stderr)  # the conversation so far is kept
            return
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            print(" [stopped]", end="", file=sys.stderr)
        print(flush=True)
        self.messages = [*heard, {"role": "assistant", "content": "".join(pieces)}]

    def _check_room(self, prompt: Sequence[int]) -> None:
        most = self.session.config_for(prompt).max_length
        room = self.session.room(prompt)
        if most is not None and len(prompt) + room > most:
            raise ValueError(
                f"the conversation fills the model's {most} positions ({len(prompt)} tokens, and {room} for the "
                "answer); /reset starts over"
            )
