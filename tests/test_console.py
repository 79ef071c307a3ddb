"""A conversation in a terminal: interruptions and mistakes end an answer, not the chat."""

import pytest

from hypervl_jax import console, generate, image
from hypervl_jax.chat import Chat


@pytest.fixture
def begin(tiny_model):
    begun = []

    def begin():
        begun.append(Chat(tiny_model, max_tokens=6))
        return begun[-1]

    begin.begun = begun
    return begin


@pytest.fixture
def picture(tiny_picture):
    return image.load(tiny_picture)


def told(e):
    return str(e) if isinstance(e, ValueError) else None


@pytest.mark.parametrize("at", [1, 3])
def test_ctrl_c_stops_an_answer_and_not_the_chat(at, begin, picture, monkeypatch, capsys):
    """Before the first piece and in the middle; the picture was shown, and the next question is answered."""
    step, calls = generate._sample_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(generate, "_sample_step", interrupted)
    assert console.talk(begin, ["what is this?", "and that?"], [picture], told) == 0
    said = capsys.readouterr()
    assert "(stopped; /quit or Ctrl-D ends the chat)" in said.err
    (chat,) = begin.begun
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert len(chat.pictures) == 1
    answers = [m["content"] for m in chat.messages[1::2]]
    assert answers[1]
    assert said.out == "".join(a + "\n" for a in answers if a)


def test_a_picture_waits_for_a_question_that_can_be_asked(begin, tiny_picture, tiny_model, capsys):
    def short():
        chat = Chat(tiny_model, max_tokens=4, context=128)
        begin.begun.append(chat)
        return chat

    lines = [f"/image {tiny_picture}", "word " * 200, "what is this?"]
    assert console.talk(short, lines, [], told) == 1
    assert len(begin.begun[0].pictures) == 1
    assert "to be shown with the next question" in capsys.readouterr().err


def test_new_forgets_everything(begin, picture, capsys):
    lines = ["what is this?", "/new", "and that?", "/quit", "never asked"]
    assert console.talk(begin, lines, [picture], told) == 0
    first, second = begin.begun
    assert (len(first.messages), len(second.messages)) == (2, 2)
    assert (len(first.pictures), len(second.pictures)) == (1, 0)


def test_what_nobody_expected_is_raised(begin, monkeypatch):
    def burst(*_):
        raise RuntimeError("burst")

    monkeypatch.setattr(generate, "_sample_step", burst)
    with pytest.raises(RuntimeError, match="burst"):
        console.talk(begin, ["what?"], [], told)


def test_forgotten_turns_are_told(tiny_model, capsys):
    def short():
        return Chat(tiny_model, max_tokens=4, context=48)

    assert console.talk(short, ["what is this thing?"] * 4, [], told) == 0
    assert "no longer fit into --context 48 and are forgotten" in capsys.readouterr().err


def test_typed_lines_survive_ctrl_c_and_end_with_ctrl_d(monkeypatch, capsys):
    answers = iter(["one", KeyboardInterrupt, "two", EOFError])

    def typed(prompt=""):
        said = next(answers)
        if isinstance(said, str):
            return said
        raise said

    monkeypatch.setattr("builtins.input", typed)
    assert list(console.typed()) == ["one", "two"]
    said = capsys.readouterr()
    assert said.out == ""  # of a pipe, which carries answers alone
    assert "Ctrl-D ends the chat" in said.err
