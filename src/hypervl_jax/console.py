"""A conversation in a terminal: what is typed or piped in, what is answered, what is told of it.

Answers go to stdout; everything else goes to stderr, so a pipe carries answers alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from hypervl_jax import image, text
from hypervl_jax.chat import Chat

HELP = """type a question and press Enter
  /image FILE   show a picture with the next question
  /new          forget everything and begin again
  /help         this
  /quit         end (so does Ctrl-D); Ctrl-C stops an answer, not the chat"""


def note(line: str) -> None:
    """One line to stderr."""
    print(line, file=sys.stderr, flush=True)


def answer(chat: Chat, images: list[np.ndarray], question: str, explain: bool = False) -> str:
    """Asks and prints the answer as it comes, then what there is to tell of it. Ctrl-C ends the answer and is passed on
    (`KeyboardInterrupt`)."""
    if explain:
        for program in chat.programs(images, question):
            note(f"program: {program.what}: {program.why}")
    before, said = len(chat.messages), ""
    try:
        for piece in chat.ask(images, question):
            said += piece
            print(piece, end="", flush=True)
    finally:
        chat.stop()
        if said:
            print(flush=True)
    if not said:
        print(flush=True)
    if not chat.ended:
        note(f"the answer was cut off by --max-tokens {chat.max_tokens}")
    if gone := before + 2 - len(chat.messages):
        note(f"the {gone // 2} oldest turns no longer fit into --context {chat.context} and are forgotten")
    if chat.pictures:
        for line in text.places(said, chat.pictures[-1].plan, chat.model.config.text.coords):
            note(line)
    for picture in chat.pictures[len(chat.pictures) - len(images) :] if images else []:
        note(f"{chat.branch}: {picture.plan.summary()}")
    return said


def talk(
    begin: Callable[[], Chat],
    lines: Iterable[str],
    images: list[np.ndarray],
    told: Callable[[Exception], str | None],
    explain: bool = False,
) -> int:
    """A conversation over lines of input, the first question showing `images`; returns how many lines failed.

    `begin` makes a conversation; `explain` lists the programs of each turn before it. What goes wrong in a turn is told
    in one line and the conversation goes on, if `told` knows what to say of it; otherwise it is raised.
    """
    chat, failed, source = begin(), 0, iter(lines)
    while True:
        line = next(source, "/quit").strip()
        command, _, rest = line.partition(" ")
        asked = chat.turns
        try:
            if command in ("/quit", "/exit"):
                return failed
            if command == "/image":
                images = [*images, image.load(Path(_unquoted(rest)))]
                h, w = images[-1].shape[:2]
                note(f"{w} x {h} px, to be shown with the next question")
            elif command == "/new":
                chat, images = begin(), []
            elif command == "/help":
                note(HELP)
            elif command.startswith("/"):
                failed += 1
                note(f"hypervl: {command}: no such command; /help lists them")
            elif line:
                answer(chat, images, line, explain)
        except KeyboardInterrupt:
            note("(stopped; /quit or Ctrl-D ends the chat)")
        except Exception as e:
            said = told(e)
            if said is None:
                raise
            failed += 1
            note(f"hypervl: {said}")
        if chat.turns > asked:  # shown now; where the turn could not begin they wait for the next question
            images = []


def _unquoted(path: str) -> str:
    path = path.strip()
    return path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path


def typed(prompt: str = "> ") -> Iterator[str]:
    """Lines typed at a terminal, until Ctrl-D; what Ctrl-C interrupts is asked for again."""
    while True:
        try:
            if sys.stdout.isatty():
                yield input(prompt)  # knows its width, for editing the line
            else:
                print(prompt, end="", file=sys.stderr, flush=True)
                yield input()
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\n(/quit or Ctrl-D ends the chat)")
