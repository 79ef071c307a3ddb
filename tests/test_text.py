"""Tokenizer without injection, template, slots, loss mask, independent questions, streaming."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervl_jax import plan as plans
from hypervl_jax import text, tokens
from hypervl_jax.config import PlanPolicy, TextConfig
from hypervl_jax.presets import hypervl_1p7b
from hypervl_jax.text import Prompt, Stream
from hypervl_jax.tokens import MARKERS, SPECIALS, TextError, Tokenizer

CONCEPTS = [
    "strawberry", "banana", "watermelon", "pineapple", "dolphin", "elephant", "bicycle", "airplane", "umbrella",
    "telephone", "camera", "television", "guitar", "violin", "trumpet", "pizza", "hamburger", "cherry", "grapes",
    "lemon", "peach", "tomato", "eggplant", "carrot", "mushroom", "bread", "cheese", "cookie", "turtle", "snake",
    "butterfly", "spider", "octopus", "crab", "penguin", "chicken", "rooster", "rabbit", "panda", "koala", "monkey",
    "tiger", "lion", "horse", "cow", "pig", "frog", "whale", "shark", "cactus", "sunflower", "tulip", "rocket",
    "sailboat", "anchor", "tractor", "locomotive", "volcano", "rainbow", "snowman", "balloon", "trophy", "key",
    "bell",
]  # fmt: skip
QUESTIONS = (
    "What is at (12, 34)?",
    "What number is beside the {}?",
    "Where is the {}?",
    "Is there a {} in this picture?",
    "How many things are there?",
    "yes",
    "no",
    "{}",
    "(12, 34, 56, 78)",
)
POLICY = PlanPolicy(tile=32, patch=8, max_tiles=9, min_side=16)
PLAIN = TextConfig(think=False, layout="plain")
ROWCOL = TextConfig(think=False)
THINK = TextConfig(think=True)

anything = st.text(st.characters(exclude_categories=["Cs"]))  # every string that has a UTF-8 form
hostile = st.lists(anything | st.sampled_from([*SPECIALS, "<row_1_col_2>", "<global-img>", "\n", " "])).map("".join)
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    assert len(CONCEPTS) == 64
    return tokens.train_tokenizer(question.format(c) for c in CONCEPTS for question in QUESTIONS * 2)


def user(*parts: str | None) -> dict:
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": content}


def answer(said: str) -> dict:
    return {"role": "assistant", "content": said}


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_512_rows_hold_the_bytes_the_specials_and_every_concept_as_one_token(tokenizer):
    assert tokenizer.vocab_size <= 512
    words = ["What", "Where", "How", "Is", " number", " picture", " there", " many", "yes", "no", "user", "assistant"]
    for word in (*CONCEPTS, *(" " + c for c in CONCEPTS), *words, "\n", "\n\n"):
        assert len(tokenizer.encode(word)) == 1, word


def test_special_tokens_come_last_in_a_fixed_order(tokenizer):
    first = tokenizer.vocab_size - len(SPECIALS) - len(MARKERS)
    assert [tokenizer.special(name) for name in (*SPECIALS, *MARKERS)] == list(range(first, tokenizer.vocab_size))
    assert MARKERS[:2] == ("<row_1_col_1>", "<row_1_col_2>")
    assert MARKERS[-2:] == ("<row_8_col_8>", "<global-img>")


def test_every_digit_is_a_token_of_its_own(tokenizer):
    digits = [tokenizer.encode(str(d)) for d in range(10)]
    assert tokenizer.encode("9007, 12") == [
        *(i for d in "9007" for i in digits[int(d)]),
        *tokenizer.encode(","),
        *tokenizer.encode(" "),
        *digits[1],
        *digits[2],
    ]


def test_training_is_deterministic_and_needs_few_texts(tokenizer):
    texts = [question.format(c) for c in CONCEPTS for question in QUESTIONS * 2]
    assert tokens.train_tokenizer(texts).encode("Where is the koala?") == tokenizer.encode("Where is the koala?")
    assert tokens.train_tokenizer([]).decode(tokens.train_tokenizer([]).encode("héllo")) == "héllo"
    assert tokens.train_tokenizer(texts, 329).vocab_size == 329  # no room for a single word
    with pytest.raises(TextError, match="need 329"):
        tokens.train_tokenizer(texts, 328)


@settings(deadline=None)
@given(hostile)
def test_decode_inverts_encode_and_no_text_makes_a_special_token(tokenizer, s):
    ids = tokenizer.encode(s)
    assert tokenizer.decode(ids) == s
    assert all(i < tokenizer.special("<|endoftext|>") for i in ids)


@pytest.mark.parametrize("name", [*SPECIALS, MARKERS[0], MARKERS[-1]])
def test_a_special_token_written_by_a_user_is_spelt_out(tokenizer, name):
    assert len(tokenizer.encode(name)) > 1
    assert tokenizer.decode([tokenizer.special(name)]) == name == tokenizer.decode(tokenizer.encode(name))


@pytest.mark.parametrize("bad", ["\ud800", "fine until \udfff"])
def test_what_has_no_utf8_form_is_refused(tokenizer, bad):
    with pytest.raises(TextError, match="lone surrogates"):
        tokenizer.encode(bad)


def test_ids_without_token_read_as_replacement_characters(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size, -1]) == "\ufffd\ufffd"


def test_forbidden_rows_are_control_tokens_and_spare_rows(tokenizer):
    mask = tokenizer.forbidden(600)
    assert mask[tokenizer.vocab_size :].all()
    for name in (*SPECIALS, *MARKERS):
        allowed = name in ("<|im_end|>", "<think>", "</think>")  # one end: what pads a row is none
        assert mask[tokenizer.special(name)] != allowed, name
    assert not mask[: tokenizer.special("<|endoftext|>")].any()
    with pytest.raises(TextError, match=f"has {tokenizer.vocab_size} tokens, the model 100 rows"):
        tokenizer.forbidden(100)


def test_saved_and_loaded_tokenizers_agree_with_each_other_and_with_the_library(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded, library = Tokenizer.load(path), tokenizers.Tokenizer.from_file(str(path))
    for name in (*SPECIALS, *MARKERS):
        assert tokenizer.special(name) == loaded.special(name) == library.token_to_id(name)
    s = "Where is the strawberry? (1, 22) <|im_end|> naïve 你好 🙂\n\n"
    assert tokenizer.encode(s) == loaded.encode(s)
    library.encode_special_tokens = True
    assert loaded.encode(s) == library.encode(s).ids
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_the_template_is_what_the_library_makes_of_the_template_as_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    talk = [{"role": "system", "content": "yes"}, user(None, "Where is the koala?"), answer("(1, 2)")]
    ids = text.render(talk, [plans.make((40, 70), 1.0, POLICY)], tokenizer, THINK).ids
    assert library.encode(tokenizer.decode(ids)).ids == ids.tolist()


@few
@given(cut=st.floats(0, 0.999))
def test_a_truncated_file_is_named(tokenizer, tmp_path, cut):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(TextError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def _damage(spec: dict, how: str):
    model, added = spec["model"], spec["added_tokens"]
    match how:
        case "not an object":
            return [spec]
        case "no model":
            del spec["model"]
        case "word level":
            model["type"] = "WordLevel"
        case "vocab is a list":
            model["vocab"] = list(model["vocab"])
        case "a byte is missing":
            del model["vocab"]["A"]
        case "not byte-level":
            model["vocab"]["▁the"] = 9999
        case "two tokens share an id":
            model["vocab"]["A"] = model["vocab"]["B"]
        case "special takes a word's id":
            added[0]["id"] = 5
        case "id is text":
            added[0]["id"] = "5"
        case "merge of unknown tokens":
            model["merges"].append(["zzzz", "qqqq"])
        case "surrogate":
            added[0]["content"] = "\ud800"
        case "bad pattern":
            spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "("
        case "dropout":  # other ids every time
            model["dropout"] = 1.0
        case "prefix of a subword":  # a panic in the library, which is no Exception
            model["continuing_subword_prefix"] = "##"
        case "suffix of a word":
            model["end_of_word_suffix"] = "</w>"
        case "rare letters change":
            spec["normalizer"] = {"type": "NFKC"}
        case "damaged charsmap":  # a panic
            spec["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
        case "letters stand for themselves":
            spec["pre_tokenizer"] = None
        case "white space is lost":
            spec["pre_tokenizer"]["pretokenizers"][0] = {"type": "WhitespaceSplit"}
        case "rare letters are lost":
            spec["pre_tokenizer"]["pretokenizers"][0] |= {"pattern": {"String": "ß"}, "behavior": "Removed"}
        case "pieces of no length":  # a panic with the first text
            spec["pre_tokenizer"]["pretokenizers"][0] = {"type": "FixedLength", "length": 0}
        case "a space comes before":
            spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
        case "bytes of bytes":
            spec["pre_tokenizer"]["pretokenizers"] += spec["pre_tokenizer"]["pretokenizers"][1:]
    return spec


@pytest.mark.parametrize(
    "how",
    ["not an object", "no model", "word level", "vocab is a list", "a byte is missing", "not byte-level", "id is text",
     "two tokens share an id", "special takes a word's id", "merge of unknown tokens", "surrogate", "bad pattern",
     "dropout", "prefix of a subword", "suffix of a word", "rare letters change", "damaged charsmap",
     "letters stand for themselves", "white space is lost", "rare letters are lost", "pieces of no length",
     "a space comes before", "bytes of bytes"],
)  # fmt: skip
def test_a_damaged_file_is_named(tokenizer, tmp_path, how):
    path = tmp_path / "mine.json"
    tokenizer.save(path)
    Tokenizer.load(path)
    path.write_text(json.dumps(_damage(json.loads(path.read_text("utf-8")), how)))
    with pytest.raises(TextError, match=r"mine\.json: not a usable"):
        Tokenizer.load(path)


def test_what_qwens_file_has_and_ours_has_not_is_accepted(tokenizer):
    """NFC, empty prefixes, a post-processor; pieces of any kind, as long as they lose nothing."""
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = tokenizer._spec["model"] | {"continuing_subword_prefix": "", "end_of_word_suffix": "", "dropout": 0.0}
    theirs = {**tokenizer._spec, "normalizer": {"type": "NFC"}, "post_processor": letters, "model": model}
    for pre in (theirs["pre_tokenizer"], letters, letters | {"use_regex": True}):
        qwen = Tokenizer(theirs | {"pre_tokenizer": pre})
        assert qwen.decode(qwen.encode(" cafe\u0301\n\n")) == " caf\u00e9\n\n"


def test_a_panic_of_the_library_names_the_file(tokenizer, monkeypatch):
    """A pattern may take too long on some texts only; what the library then raises is no Exception."""

    class Panic(BaseException):
        pass

    class Encoder:
        def encode(self, text, add_special_tokens):
            raise KeyboardInterrupt if text == "stop" else Panic("retry-limit-in-match over")

    monkeypatch.setattr(tokenizer, "_encoder", Encoder())
    with pytest.raises(TextError, match=r"tokenizer: fails on 'aaa' \(retry-limit"):
        tokenizer.encode("aaa")
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("stop")


def test_a_missing_or_binary_file_is_named(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("absent.json", "binary.json", "deep.json", "."):
        with pytest.raises(TextError, match="cannot read this"):
            Tokenizer.load(tmp_path / name)


def test_specials_inside_the_vocabulary_still_cannot_be_written(tokenizer, tmp_path):
    """Some tokenizer files list their special tokens in the BPE vocabulary too, where whole words may find them."""
    spec = json.loads(json.dumps(tokenizer._spec))
    spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    spec["pre_tokenizer"]["pretokenizers"] = spec["pre_tokenizer"]["pretokenizers"][1:]  # a text is one word
    inside = Tokenizer(spec)
    for name in SPECIALS:
        assert inside.special(name) not in inside.encode(name)
        assert inside.decode(inside.encode(name)) == name


def test_markers_are_added_after_the_last_id_once(tokenizer, tmp_path):
    spec = {**tokenizer._spec, "added_tokens": tokenizer._spec["added_tokens"][: len(SPECIALS)]}
    bare = Tokenizer(spec, "bare.json")
    with pytest.raises(TextError, match=r"bare\.json: has no token <row_1_col_1>; .*with_markers"):
        bare.special("<row_1_col_1>")
    full = tokens.with_markers(bare)
    assert [full.special(m) for m in MARKERS] == list(range(bare.vocab_size, bare.vocab_size + 65))
    assert tokens.with_markers(full).vocab_size == full.vocab_size
    assert bare.vocab_size == full.vocab_size - 65  # the one we started from is left as it was


def test_the_real_qwen3_tokenizer():
    path = os.environ.get("HYPERVL_QWEN_TOKENIZER")
    if not path or not Path(path).is_file():
        pytest.skip("set HYPERVL_QWEN_TOKENIZER to Qwen3's tokenizer.json to compare with it")
    qwen, library = tokens.with_markers(Tokenizer.load(path)), tokenizers.Tokenizer.from_file(path)
    known = (151643, 151644, 151645, 151652, 151653, 151655, 151667, 151668)
    assert tuple(qwen.special(name) for name in SPECIALS) == known
    assert [qwen.special(m) for m in MARKERS] == list(range(151669, 151734))
    talk = [user("Hi, 1234 + ½? 你好 🙂"), answer("Yes."), user("And?")]
    ids = text.render(talk, [], qwen, THINK).ids
    assert library.encode(qwen.decode(ids)).ids == ids.tolist()
    assert qwen.forbidden(151_936).sum() == 151_936 - 151_734 + 65 + 13
    for name in (*SPECIALS, "<tool_call>", "<|video_pad|>"):
        assert max(qwen.encode(name)) < 151643, name
        assert qwen.decode(qwen.encode(name)) == name


# --- render ----------------------------------------------------------------------------------------------------------


def pads(n: int) -> str:
    return "<|image_pad|>" * n


def test_rowcol_layout_in_full(tokenizer):
    plan = plans.make((40, 70), 1.0, POLICY)  # 2 x 3 tiles of 32 px, cells of 16 px: the last ones are narrow
    p = text.render([user(None, "Where?")], [plan], tokenizer, ROWCOL)
    assert tokenizer.decode(p.ids) == (
        "<|im_start|>user\n<|vision_start|>"
        f"<row_1_col_1>{pads(4)}<row_1_col_2>{pads(4)}<row_1_col_3>{pads(2)}\n"
        f"<row_2_col_1>{pads(2)}<row_2_col_2>{pads(2)}<row_2_col_3>{pads(1)}\n"
        f"<global-img>{pads(4)}<|vision_end|>\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not p.loss.any()
    assert (p.segments == 0).all()
    assert p.positions.tolist() == list(range(len(p.ids)))
    assert [a.dtype for a in p] == [np.int32, np.int32, np.bool_, np.int32, np.int32]


def test_plain_layout_in_full(tokenizer):
    plan = plans.make((40, 70), 1.0, POLICY)
    p = text.render([user(None, "Where?")], [plan], tokenizer, PLAIN, add_generation_prompt=False)
    expected = f"<|im_start|>user\n<|vision_start|>{pads(plan.tokens)}<|vision_end|>\nWhere?<|im_end|>\n"
    assert tokenizer.decode(p.ids) == expected


@pytest.mark.parametrize("mode", ["native_pad", "grid_match", "grid_pad"])
@pytest.mark.parametrize("drop_pad", [True, False])
@pytest.mark.parametrize("cfg", [PLAIN, ROWCOL], ids=["plain", "rowcol"])
def test_slots_name_every_kept_cell_once_in_order_over_several_pictures(tokenizer, mode, drop_pad, cfg):
    policy = replace(POLICY, mode=mode, drop_pad=drop_pad)
    pictures = [plans.make(size, 1.0, policy) for size in ((20, 20), (40, 70), (100, 17))]
    p = text.render([user(None, "a", None), answer("b"), user(None)], pictures, tokenizer, cfg)
    expected, tile = [], 0
    for plan in pictures:
        for i in range(plan.n_tiles):
            expected += [tile * 4 + cell for cell in plan.cells(i)]
            tile += 1
    assert p.slots[p.slots >= 0].tolist() == expected
    assert len(expected) == sum(plan.tokens for plan in pictures)
    assert ((p.ids == tokenizer.special("<|image_pad|>")) == (p.slots >= 0)).all()


def test_thinking_block_and_loss_over_several_turns(tokenizer):
    talk = [{"role": "system", "content": "no"}, user("What?"), answer("yes"), user("Where?"), answer("koala")]
    p = text.render(talk, [], tokenizer, THINK)
    assert tokenizer.decode(p.ids) == (
        "<|im_start|>system\nno<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nkoala<|im_end|>\n"
    )
    assert tokenizer.decode(p.ids[p.loss]) == "yes<|im_end|>koala<|im_end|>"
    asked = text.render(talk[:-1], [], tokenizer, THINK)
    assert tokenizer.decode(asked.ids).endswith("Where?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert asked.ids.tolist() == p.ids[: len(asked.ids)].tolist()  # what is generated from is what was trained on


def test_a_model_that_may_think_first_is_not_told_to_answer_at_once(tokenizer):
    asked = text.render([user("What?")], [], tokenizer, THINK, thinking=True)
    assert tokenizer.decode(asked.ids) == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    asked = text.render([user("What?")], [], tokenizer, ROWCOL)  # a model that was taught without blocks
    assert tokenizer.decode(asked.ids).endswith("<|im_start|>assistant\n")


def test_a_text_that_begins_with_a_newline_is_tokenised_with_its_role(tokenizer):
    """As one piece of text, which is how Qwen's tokenizer meets it; so not after a picture, where questions are told
    apart by what comes after it."""
    ids = text.render([user("\nWhat?")], [], tokenizer, ROWCOL).ids.tolist()
    body = tokenizer.encode("user\n\nWhat?")
    assert ids[1 : 1 + len(body)] == body != [*tokenizer.encode("user\n"), *tokenizer.encode("\nWhat?")]


# Qwen3's chat format as its model card describes it, without tools: a header a message, an empty block for the answer
# that ends a conversation and where thinking is off.
CHATML = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
TALKS = [
    ["What?"],
    ["\n\n  What\n is\tthis? 你好 🙂 naïve\r\n"],
    ["What is (12, 34)?", "koala", "And 9007?"],
    ["Is there a koala?", " yes\n", "\nWhere?", "(1, 2)", "Why?  ", "no"],
]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("instruction", ["", "You are a koala.\n"])
@pytest.mark.parametrize("said", TALKS, ids=len)
def test_ids_are_those_of_transformers_chat_template(said, instruction, thinking, tokenizer, tmp_path):
    """With the trained tokenizer and the format as documented; with Qwen3's own file and the template beside it where
    HYPERVL_QWEN_TOKENIZER names one."""
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    talk = [{"role": "system", "content": instruction}] * bool(instruction)
    talk += [{"role": ("user", "assistant")[n % 2], "content": words} for n, words in enumerate(said)]
    asks = talk[-1]["role"] == "user"
    tokenizer.save(tmp_path / "tokenizer.json")
    pairs = [(tmp_path / "tokenizer.json", CHATML)]
    if path := os.environ.get("HYPERVL_QWEN_TOKENIZER"):
        beside = Path(path).with_name("tokenizer_config.json")
        pairs.append((Path(path), json.loads(beside.read_text())["chat_template"] if beside.is_file() else CHATML))
    for file, template in pairs:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=template)
        options = {"add_generation_prompt": asks, "enable_thinking": thinking, "return_dict": False}
        want = theirs.apply_chat_template(talk, tokenize=True, **options)
        got = text.render(talk, [], Tokenizer.load(file), THINK, thinking=thinking)
        assert got.ids.tolist() == list(want), theirs.apply_chat_template(talk, tokenize=False, **options)


# --- conversations that are too long ---------------------------------------------------------------------------------


@few
@given(data=st.data(), length=st.integers(1, 400))
def test_turns_go_or_stay_whole(tokenizer, data, length):
    """Whatever the room, no image is cut and no message; what goes is as little as need be, the oldest first."""
    sizes = data.draw(
        st.lists(st.lists(st.tuples(st.integers(16, 90), st.integers(16, 90)), max_size=2), min_size=1, max_size=4)
    )
    talk: list = [{"role": "system", "content": "no"}] * data.draw(st.booleans())
    for n, shown in enumerate(sizes):
        talk += [*[answer("a koala")] * bool(n), user(*[None] * len(shown), f"{n}?")]
    plans_of = [[plans.make(size, 1.0, POLICY) for size in shown] for shown in sizes]
    head = talk[:1] if talk[0]["role"] == "system" else []

    def tail(k):
        """The conversation from turn k on, alone."""
        at = [n for n, m in enumerate(talk) if m["role"] == "user"][k]
        shown = [p for some in plans_of[k:] for p in some]
        return [*head, *talk[at:]], shown, text.render([*head, *talk[at:]], shown, tokenizer, ROWCOL)

    every, needs = [p for some in plans_of for p in some], [len(tail(k)[2].ids) for k in range(len(sizes))]
    if needs[-1] > length:
        with pytest.raises(TextError, match=f"the prompt needs {needs[-1]} tokens, .* there is room for {length}"):
            text.fit(talk, every, tokenizer, ROWCOL, length)
        return
    fitted = text.fit(talk, every, tokenizer, ROWCOL, length)
    messages, shown, row = tail(next(k for k, n in enumerate(needs) if n <= length))
    assert fitted.messages == messages
    assert fitted.pictures == len(shown)
    assert fitted.prompt.ids.tolist() == row.ids.tolist()
    assert (fitted.prompt.slots >= 0).sum() == sum(p.tokens for p in shown)


@few
@given(question=hostile, said=hostile, instruction=hostile)
def test_no_conversation_changes_the_special_tokens_of_its_template(tokenizer, question, said, instruction):
    def specials(*words: str) -> list[int]:
        talk = [{"role": "system", "content": words[0]}, user(None, words[1]), answer(words[2]), user(words[1])]
        ids = text.render(talk, [plans.make((40, 70), 1.0, POLICY)], tokenizer, THINK).ids.tolist()
        return [i for i in ids if i >= tokenizer.special("<|endoftext|>")]

    assert specials(instruction, question, said) == specials("a", "b", "c")


@pytest.mark.parametrize(
    ("messages", "pictures", "complaint"),
    [
        ([], 0, "at least one message"),
        ([{"role": "robot", "content": "a"}], 0, "message 0: role 'robot' is not one of system, user, assistant"),
        ([{"content": "a"}], 0, "role None"),
        ([user("a"), {"role": "user"}], 0, "message 1: content must be text or a list"),
        ([{"role": "user", "content": ["a"]}], 0, "message 0: a part is"),
        ([{"role": "user", "content": [{"type": "video"}]}], 0, "message 0: a part is"),
        ([{"role": "user", "content": [{"type": "text"}]}], 0, "message 0: a part is"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], 1, "message 0: a picture belongs in a user message"),
        ([user(None)], 0, "show 1 pictures, 0 were given"),
        ([user("a")], 2, "show 0 pictures, 2 were given"),
    ],
)
def test_conversations_that_do_not_fit_are_refused(tokenizer, messages, pictures, complaint):
    with pytest.raises(TextError, match=complaint):
        text.render(messages, [plans.make((20, 20), 1.0, POLICY)] * pictures, tokenizer, ROWCOL)


def test_a_message_that_is_no_mapping_is_refused():
    with pytest.raises(TextError, match=r"message 1: expected .*found 'hi'"):
        text._parts("hi", 1)  # `render` itself is type-checked here


def test_pictures_of_two_policies_are_refused(tokenizer):
    pictures = [plans.make((20, 20), 1.0, POLICY), plans.make((20, 20), 1.0, replace(POLICY, patch=4))]
    with pytest.raises(TextError, match="share one PlanPolicy"):
        text.render([user(None, None)], pictures, tokenizer, ROWCOL)


@pytest.mark.parametrize(
    ("size", "policy"),
    [((9 * 32, 20), POLICY), ((20, 9 * 32), POLICY), ((20, 9 * 32), replace(POLICY, mode="grid_match")),
     ((9 * 32, 20), replace(POLICY, mode="grid_pad")), ((5000, 1080), hypervl_1p7b().model.policy)],
)  # fmt: skip
def test_every_tile_of_a_long_picture_has_its_marker(tokenizer, size, policy):
    plan = plans.make(size, 1.0, policy)
    row = text.render([user(None)], [plan], tokenizer, ROWCOL)
    markers = {tokenizer.special(m) for m in MARKERS}
    assert len(markers.intersection(row.ids.tolist())) == plan.n_tiles > 8
    assert (row.slots >= 0).sum() == plan.tokens


def test_a_plan_whose_tiles_do_not_hold_its_tokens_is_refused(tokenizer):
    class Liar(plans.VisionPlan):
        tokens = property(lambda self: 5)  # type: ignore[assignment]

    plan = plans.make((20, 20), 1.0, POLICY)
    with pytest.raises(TextError, match="promises 5 visual tokens, its tiles hold 4"):
        text.render([user(None)], [Liar(**vars(plan))], tokenizer, ROWCOL)


# --- several questions about one picture -----------------------------------------------------------------------------


@few
@given(
    size=st.tuples(st.integers(16, 90), st.integers(16, 90)),
    questions=st.lists(st.tuples(hostile, hostile), max_size=4),
    cfg=st.sampled_from([PLAIN, ROWCOL, THINK]),
)
def test_prefix_and_segment_are_exactly_the_single_question_prompt(tokenizer, size, questions, cfg):
    plan = plans.make(size, 1.0, POLICY)
    row = text.render_questions(plan, questions, tokenizer, cfg)
    assert sorted(set(row.segments)) == list(range(len(questions) + 1))
    assert (np.diff(row.segments) >= 0).all()
    for k, (question, said) in enumerate(questions, 1):
        seen = (row.segments == 0) | (row.segments == k)
        single = text.render([user(None, question), answer(said)], [plan], tokenizer, cfg)
        for name in ("ids", "slots", "loss", "positions"):
            assert getattr(row, name)[seen].tolist() == getattr(single, name).tolist(), name
    said = "".join(a + "<|im_end|>" for _, a in questions)
    assert tokenizer.decode(row.ids[row.loss]) == said
    assert [a.dtype for a in row] == [np.int32, np.int32, np.bool_, np.int32, np.int32]


# --- rows of one length ----------------------------------------------------------------------------------------------


def test_pad_fills_up_and_never_cuts(tokenizer):
    plan = plans.make((20, 20), 1.0, POLICY)
    row = text.render_questions(plan, [("What?", "koala")], tokenizer, ROWCOL)
    n = len(row.ids)
    padded = text.pad(row, n + 3, tokenizer.special("<|endoftext|>"))
    fill = (tokenizer.special("<|endoftext|>"), -1, False, 0, -1)
    for before, after, value in zip(row, padded, fill, strict=True):
        assert after.tolist() == [*before.tolist(), value, value, value]
        assert after.dtype == before.dtype
    assert text.pad(row, n, 0).ids.tolist() == row.ids.tolist()
    with pytest.raises(TextError, match=rf"needs {n} tokens, 4 of them visual; the row holds {n - 1}"):
        text.pad(row, n - 1, 0)


def test_stack_makes_a_batch(tokenizer):
    rows = [text.render([user(q)], [], tokenizer, ROWCOL) for q in ("What?", "Where is the koala?")]
    batch = text.stack(rows, 24, 0)
    assert isinstance(batch, Prompt)
    assert [a.shape for a in batch] == [(2, 24)] * 5
    assert [a.dtype for a in batch] == [a.dtype for a in rows[0]]
    for b, row in enumerate(rows):
        assert batch.ids[b].tolist() == text.pad(row, 24, 0).ids.tolist()


# --- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_ends_at_its_end_token(tokenizer):
    end, last = tokenizer.special("<|im_end|>"), tokenizer.special("<|endoftext|>")
    ids = tokenizer.encode(" koala\n")
    for tail in ([], [end], [last], [end, *tokenizer.encode("more")]):
        assert text.strip_answer(tokenizer, [*ids, *tail]) == "koala"
    assert text.strip_answer(tokenizer, np.array([*ids, end], np.int32)) == "koala"
    assert text.strip_answer(tokenizer, [end]) == ""


@settings(deadline=None)
@given(hostile)
def test_a_stream_yields_only_whole_characters_and_loses_nothing(tokenizer, s):
    stream, pieces = Stream(tokenizer), []
    for i in tokenizer.encode(s):
        pieces.append(stream.push(i))
        assert s.startswith("".join(pieces))
    assert "".join(pieces) == s
    assert stream.finish() == ""
    assert not stream.done
    assert stream.push(tokenizer.special("<|im_end|>")) == ""
    assert stream.done
    assert stream.push(tokenizer.encode("x")[0]) == ""


def test_a_stream_waits_for_the_bytes_of_a_character(tokenizer):
    stream = Stream(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("é🙂")] == ["", "é", "", "", "", "🙂"]
    first = tokenizer.encode("🙂")[0]
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"


@settings(deadline=None)
@given(st.lists(st.integers(0, 438)))
def test_streaming_any_ids_equals_decoding_them(tokenizer, ids):
    ends = {tokenizer.special("<|im_end|>"), tokenizer.special("<|endoftext|>")}
    ids = [i for i in ids if i not in ends]
    stream = Stream(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


@settings(deadline=None)
@given(said=st.text("abc🙂"), stops=st.lists(st.text("abc🙂", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_stop_string_that_is_complete_first(tokenizer, said, stops):
    """However the text came in pieces; nothing that is shown is taken back."""
    stream, ids = Stream(tokenizer, stops), tokenizer.encode(said)
    shown = "".join(stream.push(i) for i in ids)
    ends = [(said.index(stop) + len(stop), said.index(stop)) for stop in stops if stop in said]
    assert stream.done == bool(ends)
    assert stream.push(tokenizer.special("<|im_end|>")) == ""
    assert shown + stream.finish() == (said[: min(ends)[1]] if ends else said)


def test_what_may_become_a_stop_string_is_held_back(tokenizer):
    stream = Stream(tokenizer, ["cab", "\n\n"])
    assert [stream.push(tokenizer.encode(c)[0]) for c in "xcaca"] == ["x", "", "", "ca", ""]
    assert stream.finish() == "ca"
    with pytest.raises(TextError, match="a stop string is empty"):
        Stream(tokenizer, [""])


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("37 52", [(37, 52)]),
        (" 0, 99\n", [(0, 99)]),
        ("1 2 30 40", [(1, 2, 30, 40)]),
        ("the anchor is at (37, 52).", [(37, 52)]),
        ("[[1, 2, 30, 40], [5,6,7,8]]", [(1, 2, 30, 40), (5, 6, 7, 8)]),
        ("100 52", []),  # off the grid
        ("3752", []),
        ("1 2 3", []),
        ("in 1999, 12 men", []),
        ("(37)", []),
        ("9" * 400 + " 1", []),
        ("", []),
    ],
)
def test_points_and_boxes_in_an_answer(said, found):
    assert text.coordinates(said, 100) == found


def test_places_are_in_pixels_of_the_original():
    """Whatever the ratio the model saw it at."""
    p = plans.make((60, 40), 0.3, POLICY)
    assert text.places("0 99", p, 100) == ["point x 0, y 60 of 40 x 60 pixels"]
    assert text.places("look: [0, 0, 99, 49]", p, 100) == ["box x 0 to 40, y 0 to 30 of 40 x 60 pixels"]
    assert text.places("no", p, 100) == []
