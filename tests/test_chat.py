"""A conversation: what it remembers, what it does not do twice, and how it takes interruptions and mistakes."""

import numpy as np
import pytest
from PIL import Image

import hypervl_jax
from hypervl_jax import ask, compress, generate, image, text
from hypervl_jax.chat import Chat, ChatError
from hypervl_jax.generate import Sampler
from hypervl_jax.image import ImageError
from hypervl_jax.tokens import TextError

QUESTION = "what is this?"


@pytest.fixture(scope="module")
def pictures(tiny_source):
    return [tiny_source[3].image, tiny_source[5].image]


@pytest.fixture
def chat(tiny_model):
    return Chat(tiny_model, max_tokens=8)


def say(chat, *turn):
    return "".join(chat.ask(*turn))


def test_it_answers_as_the_functions_do(chat, tiny_model, pictures):
    seen = [ask.see(tiny_model, p) for p in pictures]
    want = "".join(ask.answer(tiny_model, seen, QUESTION, 8))
    assert want
    pieces = list(chat.ask(pictures, QUESTION))
    assert len(pieces) > 1
    assert "".join(pieces) == want
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == want


def test_pictures_may_be_files_bytes_pillow_or_arrays(tiny_model, tiny_picture):
    kinds = [tiny_picture, str(tiny_picture), tiny_picture.read_bytes(), image.load(tiny_picture)]
    with Image.open(tiny_picture) as opened:
        kinds.append(opened)
        chat = Chat(tiny_model, max_tokens=4)
        assert len({say(Chat(tiny_model, max_tokens=4), kind, QUESTION) for kind in kinds}) == 1
        say(chat, kinds, QUESTION)
    assert (len(chat.pictures), chat.encoded) == (5, 1)


def test_a_picture_is_encoded_once_and_only_what_is_new_is_read(chat, tiny_model, pictures, monkeypatch):
    """Over four turns, the last two with pictures shown before; each turn's logits are those of reading it all."""
    tiles, encode = [], ask._encode
    monkeypatch.setattr(ask, "_encode", lambda *a: tiles.append(1) or encode(*a))
    turns = [(pictures[0], QUESTION), ((), "and what is left of it?"), (pictures, "which?"), (pictures[1], "and here?")]
    before, old = 0, ()
    for turn in turns:
        running = chat.ask(*turn)
        next(running)
        shown = [p.plan for p in chat.pictures]
        prompt = text.render(chat.messages, shown, tiny_model.tokenizer, tiny_model.config.text)
        whole = ask.read(tiny_model, prompt, chat.pictures, 8)
        key, said = chat._read.marks[: len(whole.marks)], chat._read.marks[len(whole.marks) :]
        assert key == whole.marks
        first = int(np.argmax(np.where(tiny_model.tokenizer.forbidden(512), -np.inf, whole.state.logits[0])))
        assert said[0] == first
        assert chat.fed - before <= len(prompt.ids) - len(old)  # the last prompt is not read again
        before, old = chat.fed, prompt.ids
        "".join(running)
    assert chat.encoded == 2
    assert len(tiles) == sum({p.view: p.plan.n_tiles for p in chat.pictures}.values())
    assert len(chat.pictures) == 4


def test_the_second_turn_reads_exactly_the_new_tokens(chat, tiny_model, pictures):
    """Those after the last one that stands in the cache as the conversation has it: the first prompt at least, and of
    the answer what the tokenizer writes as the model did."""

    def prompt(messages):
        return text.render(messages, [chat.pictures[0].plan], tiny_model.tokenizer, tiny_model.config.text).ids

    say(chat, pictures[0], QUESTION)
    asked, cached = len(prompt(chat.messages[:1])), chat._read.marks
    assert chat.fed == asked
    say(chat, (), QUESTION)
    both = chat._read.marks[: len(prompt(chat.messages[:3]))]
    same = next((n for n, (a, b) in enumerate(zip(cached, both, strict=False)) if a != b), len(cached))
    assert same >= asked
    assert chat.fed - asked == len(both) - same


def test_the_programs_listed_are_those_compiled(tiny_model, pictures):
    """Two turns, the second in a larger cache."""
    counted = {"vrc": compress.predict_proxies, "encoder": ask._encode, "prefill": ask._feed}
    counted["decode"] = generate._sample_step
    sampler = Sampler(0.1234)  # programs that no other test has
    chat, known = Chat(tiny_model, max_tokens=64, sampler=sampler, seed=1), set()
    for run in counted.values():
        run.clear_cache()
    for turn in ((pictures[0], QUESTION), ((), "word " * 150), ((), QUESTION)):
        listed = chat.programs(*turn)
        assert all(program.why for program in listed)
        known |= {program.what for program in listed}
        next(chat.ask(*turn))
        for kind, run in counted.items():
            assert run._cache_size() == len({what for what in known if what.startswith(kind)}), kind
    assert len(known) > 5


def test_an_answer_that_is_left_stands_as_far_as_it_was_said(chat, pictures):
    running = chat.ask(pictures[0], QUESTION)
    first = next(running)
    rest = say(chat, (), "and now?")
    assert list(running) == []
    assert [m["content"] for m in chat.messages[1::2]] == [first, rest]
    assert rest


def test_an_interruption_in_the_middle_of_a_step_loses_the_answers_rest_only(chat, tiny_model, pictures, monkeypatch):
    step, calls = generate._sample_step, []

    def interrupted(*args):
        calls.append(1)
        out = step(*args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return out

    monkeypatch.setattr(generate, "_sample_step", interrupted)
    said = []
    with pytest.raises(KeyboardInterrupt):
        said.extend(chat.ask(pictures[0], QUESTION))
    assert not chat.ended
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(said)}
    fresh = Chat(tiny_model, max_tokens=8)
    fresh.messages, fresh.pictures = list(chat.messages), list(chat.pictures)
    assert say(chat, (), "and now?") == say(fresh, (), "and now?")


@pytest.mark.parametrize("turn", [("no such file.png", "what?"), ((), "word " * 400), ((), "\ud800")])
def test_a_turn_that_cannot_be_leaves_the_conversation_as_it_was(turn, tiny_model, pictures):
    chat, fresh = (Chat(tiny_model, max_tokens=4, context=300) for _ in range(2))
    say(chat, pictures[0], QUESTION)
    say(fresh, pictures[0], QUESTION)
    before = list(chat.messages), list(chat.pictures)
    with pytest.raises((ImageError, TextError)):
        say(chat, *turn)
    assert (chat.messages, chat.pictures) == before
    assert say(chat, (), "and?") == say(fresh, (), "and?")


def test_the_oldest_turns_are_forgotten_with_their_pictures(tiny_model, pictures):
    chat = Chat(tiny_model, max_tokens=4, context=120, system="no")
    say(chat, pictures[0], QUESTION)
    first = chat.pictures[0]
    for _ in range(6):
        say(chat, pictures[1], QUESTION)
    assert first not in chat.pictures
    assert [m["role"] for m in chat.messages[:2]] == ["system", "user"]
    shown = [p.plan for p in chat.pictures]
    assert len(text.render(chat.messages, shown, tiny_model.tokenizer, tiny_model.config.text).ids) <= 120
    assert chat.encoded == 2


def test_a_seed_repeats_a_conversation(tiny_model, pictures):
    def talk(seed):
        chat = Chat(tiny_model, max_tokens=8, sampler=Sampler(5.0), seed=seed)
        return [say(chat, pictures[0], QUESTION), say(chat, (), QUESTION)]

    assert talk(1) == talk(1) != talk(2)
    assert talk(None) != talk(None)


def test_stop_strings_end_an_answer(chat, tiny_model, pictures):
    whole = say(chat, pictures[0], QUESTION)
    stopped = Chat(tiny_model, max_tokens=8, stops=[whole[2:4]])
    assert say(stopped, pictures[0], QUESTION) == whole[: whole.index(whole[2:4])]
    assert stopped.ended


def test_thinking_is_for_models_that_were_taught_to(tiny_model, pictures):
    import dataclasses

    with pytest.raises(ChatError, match="not taught to think"):
        Chat(tiny_model, thinking=True)
    cfg = dataclasses.replace(tiny_model.config, text=dataclasses.replace(tiny_model.config.text, think=True))
    thinker = tiny_model._replace(config=cfg)
    for thinking in (False, True):
        chat = Chat(thinker, max_tokens=4, thinking=thinking)
        list(chat.programs(pictures[0], QUESTION))
        next(chat.ask(pictures[0], QUESTION))
        end = chat.model.tokenizer.special("</think>")
        assert (end in chat._read.marks) is not thinking


def test_thoughts_are_not_shown_to_later_turns(tiny_model, monkeypatch):
    import dataclasses

    tok = tiny_model.tokenizer
    cfg = dataclasses.replace(tiny_model.config, text=dataclasses.replace(tiny_model.config.text, think=True))
    chat = Chat(tiny_model._replace(config=cfg), max_tokens=32, thinking=True)
    ids = [tok.special("<think>"), *tok.encode("\nhm\n"), tok.special("</think>"), *tok.encode("\n\nyes")]
    monkeypatch.setattr(generate, "stream", lambda params, cfg, state, *_: ((i, state) for i in ids))
    assert say(chat, (), QUESTION) == "<think>\nhm\n</think>\n\nyes"
    assert chat.messages[-1]["content"] == "yes"


def test_the_package_has_the_public_names():
    assert hypervl_jax.Chat is Chat
    assert callable(hypervl_jax.load_model)
    with pytest.raises(AttributeError, match="no attribute 'Chatt'"):
        hypervl_jax.Chatt  # noqa: B018
