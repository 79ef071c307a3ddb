"""The command as a user meets it. In process where that shows the same: a new interpreter costs seconds."""

import hashlib
import io
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hypervl_jax import checkpoint, cli, config, needs, presets

FAULTS = """
import resource, sys
from hypervl_jax import needs
if sys.argv[1:]: needs.keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(1 << 27)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
@pytest.mark.parametrize(("set_", "stays"), [(["-"], True), ([], False)])
def test_memory_that_a_command_has_had_stays_with_it(set_, stays):
    """The second 128 MB are those of the first: the kernel clears no page again."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    said = subprocess.run([sys.executable, "-c", FAULTS, *set_], env=bare, capture_output=True, text=True, check=True)
    assert (int(said.stdout) < 100) is stays


def test_what_the_environment_says_of_memory_counts(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setattr(needs.ctypes, "CDLL", lambda name: pytest.fail("malloc was told otherwise"))
    needs.keep_memory()


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail; returns its one line."""

    def run(*argv, code=1):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(a) for a in argv])
        assert stopped.value.code == code
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("hypervl: ")
        assert said.err.count("\n") == 1
        return said.err

    return run


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    [*(v for v in cli.VERBS if v not in cli.GROUPS), *(f"{g} {v}" for g, (vs, _) in cli.GROUPS.items() for v in vs)],
)
def test_help_teaches(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*verb.split(), "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert f"For example: │ │ hypervl {verb} " in said or f"For example: hypervl {verb} " in said
    assert "default" in said


def test_help_is_what_no_arguments_give(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(verb in said for verb in cli.VERBS)
    assert "--debug" in said


def test_version(capsys):
    from hypervl_jax import __version__

    cli.main(["--version"])
    assert capsys.readouterr().out == f"hypervl {__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [["aks"], ["ask"], ["ask", "a.png", "b", "--branch", "medium"], ["chat", "--top-k", "x"], ["eval", "--nope"]],
)
def test_what_cannot_be_parsed_names_the_choices(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--help" in said.err


# --- ask -------------------------------------------------------------------------------------------------------------


def test_ask_answers_on_stdout_and_says_on_stderr_how_it_saw(tiny_folder, tiny_picture, tiny_model, capsys):
    from hypervl_jax import evaluate, image

    cli.main(["ask", str(tiny_picture), "what is this?", "--model", str(tiny_folder), "--no-vrc", "--max-tokens", "8"])
    said = capsys.readouterr()
    pixels = image.load(tiny_picture)
    [(want,)] = evaluate.answer(tiny_model, "base", [evaluate.Job(pixels, 1.0, ("what is this?",))])
    assert said.out.strip() == want
    assert f"base: {pixels.shape[1]} x {pixels.shape[0]} px at ratio 1.00" in said.err


@pytest.mark.parametrize("said", ["50 99", "it is at (50, 99)", "0 0 50 99"])
def test_ask_says_where_in_pixels(said, tiny_folder, tiny_picture, saying, capsys):
    saying(said)
    cli.main(["ask", str(tiny_picture), "where is it?", "--model", str(tiny_folder)])
    with Image.open(tiny_picture) as picture:
        w, h = picture.size
    found = capsys.readouterr()
    assert found.out == said + "\n"
    x, y = f"{0.505 * w:.0f}", f"{0.995 * h:.0f}"
    box = f"box x {0.005 * w:.0f} to {x}, y {0.005 * h:.0f} to {y}" if said[0] == "0" else f"point x {x}, y {y}"
    assert f"{box} of {w} x {h} pixels\n" in found.err


@pytest.fixture
def saying(monkeypatch):
    """Makes the decoder say a text; returns what it was asked with, call by call."""
    from hypervl_jax import generate
    from hypervl_jax.tokens import Tokenizer

    given = []

    def saying(said, ended=True):
        def stream(params, cfg, state, forbidden, sampler, end, new):
            given.append((sampler, new))
            yield from ((i, state) for i in [*tokenizers[-1].encode(said), *[end] * ended])

        tokenizers = []
        load = Tokenizer.load

        def noted(path):
            tokenizers.append(load(path))
            return tokenizers[-1]

        monkeypatch.setattr(Tokenizer, "load", noted)
        monkeypatch.setattr(generate, "stream", stream)
        return given

    return saying


@pytest.mark.parametrize(("weights", "kept"), [("f32", "float32"), ("bf16", "bfloat16"), ("int4", "int4")])
def test_ask_and_chat_read_the_weights_that_were_asked_for(weights, kept, tiny_picture, monkeypatch, fails):
    asked = []

    def load(name, dtype="float32"):
        asked.append(dtype)
        raise needs.UsageError("enough")

    monkeypatch.setattr(needs, "load", load)
    assert "enough" in fails("ask", tiny_picture, "what?", "--weights", weights)
    assert "enough" in fails("chat", "--weights", weights)
    assert asked == [kept, kept]


def test_exported_files_have_the_weights_they_have(tiny_picture, fails):
    assert "--weights is for --runtime jax" in fails(
        "ask", tiny_picture, "what?", "--runtime", "litert", "--weights", "int8"
    )


def test_ask_about_several_pictures(tiny_folder, tiny_picture, tiny_model, tmp_path, capsys):
    """In the order given, options before, between and after them."""
    from hypervl_jax import ask, image

    shutil.copy(tiny_picture, tmp_path / "first.png")
    Image.effect_noise((40, 30), 50).convert("RGB").save(tmp_path / "second.png")
    paths = [str(tmp_path / name) for name in ("first.png", "second.png")]
    seen = [ask.see(tiny_model, image.load(path), "large") for path in paths]
    want = "".join(ask.answer(tiny_model, seen, "what is this?", new=8))
    cli.main(["ask", "--branch", "large", *paths, "what is this?", "--model", str(tiny_folder), "--max-tokens", "8"])
    said = capsys.readouterr()
    assert said.out == want + "\n"
    assert "large: 40 x 30 px" in said.err
    assert said.err.count("visual tokens") == 2


def test_ask_lists_the_programs_it_needs(tiny_folder, tiny_picture, saying, capsys):
    saying("yes")
    cli.main(["ask", str(tiny_picture), "what?", "--model", str(tiny_folder), "--explain-compile", "--top-k", "3"])
    said = capsys.readouterr()
    assert said.out == "yes\n"
    listed = [line for line in said.err.splitlines() if line.startswith("program: ")]
    kinds = ("vrc [1 64 64 3]: ", "encoder base [1 32 32 3]: ", "prefill of 64 tokens, cache of 128: ", "decode step, ")
    assert len(listed) == 4
    assert all(line.startswith("program: " + kind) for line, kind in zip(listed, kinds, strict=True))
    assert "top_k=3" in listed[-1]


def test_stop_strings_may_be_several(tiny_folder, tiny_picture, saying, capsys):
    saying("one two three")
    cli.main(["ask", str(tiny_picture), "what?", "--model", str(tiny_folder), "--stop", "thr", "--stop", " two"])
    assert capsys.readouterr().out == "one\n"


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(
    ("argv", "seeds"), [("", []), ("--temperature 1 --seed 7", [7, 7]), ("--temperature 1 --top-p 0.5", None)]
)
def test_ask_says_what_was_cut_off_and_with_which_seed(argv, seeds, ended, tiny_folder, tiny_picture, saying, capsys):
    given = saying("a thing", ended)
    for _ in range(2):
        cli.main(
            ["ask", str(tiny_picture), "what is this?", "--model", str(tiny_folder), "--max-tokens", "9", *argv.split()]
        )
    said = capsys.readouterr().err.splitlines()
    assert said.count("the answer was cut off by --max-tokens 9") == (0 if ended else 2)
    drawn = [int(line.removeprefix("sampled with --seed ")) for line in said if "seed" in line]
    assert drawn == seeds if seeds is not None else drawn[0] != drawn[1]
    assert [new for _, new in given] == [9, 9]
    assert {(s.temperature > 0, s.top_p < 1) for s, _ in given} == {(bool(argv), "top-p" in argv)}


@pytest.mark.parametrize(("ids", "by"), [((5,) * 9, "--max-tokens 9"), ((5,) * 8, "the exported cache of 64 tokens")])
def test_ask_says_what_cut_off_the_answer_of_exported_files(ids, by, tiny_model, tiny_picture, monkeypatch, capsys):
    from hypervl_jax.export import runtime

    class Files:
        branches, config, cache_length = ("base",), tiny_model.config, 64

        def __init__(self, folder):
            pass

        def stream(self, pixels, *_):
            yield "a thing"
            return runtime.Answer("a thing", ids, plan_of(pixels, tiny_model), 1.0, False, {})

    monkeypatch.setattr(runtime, "Runtime", Files)
    for name in ("ask", "chat", "generate"):  # what needs JAX, which a host of exported files has not
        monkeypatch.setitem(sys.modules, f"hypervl_jax.{name}", None)
    monkeypatch.setattr(needs, "exported", lambda name: name)
    cli.main(["ask", str(tiny_picture), "what is this?", "--runtime", "litert", "--max-tokens", "9"])
    said = capsys.readouterr()
    assert said.out == "a thing\n"
    assert f"the answer was cut off by {by}\n" in said.err


def plan_of(pixels, model):
    from hypervl_jax import plan

    return plan.make(pixels.shape[:2], 1.0, model.config.policy)


def bomb():
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def truncated():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()[:1000]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"hello, world", "not a picture"),
        (bomb(), "pixels"),
        (truncated(), "damaged"),
    ],
)
def test_ask_refuses_what_is_no_picture(content, why, tmp_path, tiny_folder, fails):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    said = fails("ask", path, "what is this?", "--model", tiny_folder)
    assert str(path) in said
    assert why in said


def test_ask_refuses_a_folder(tmp_path, tiny_folder, fails):
    assert f"{tmp_path}: not a file but a folder" in fails("ask", tmp_path, "what is this?", "--model", tiny_folder)


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "0.5", "--runtime", "litert"], "greedily"),
        (["--stop", "a", "--runtime", "litert"], "greedily"),
        (["--top-k", "-1"], "--top-k -1"),
        (["--top-p", "0"], "--top-p 0.0"),
        (["--penalty", "0"], "--penalty 0.0"),
        (["--seed", "-1"], "--seed -1: choose 0 to 4294967295"),
        (["--max-tokens", "0"], "--max-tokens 0: choose 1 to"),
        (["--max-tokens", "1000000"], "choose 1 to"),
        (["--model", ""], "--model is empty"),
        (["--model", "/no/such/folder"], "/no/such/folder: does not exist"),
        (["--model", "/no/such/folder", "--runtime", "litert"], "hypervl export MODEL --out FOLDER"),
        (
            ["--runtime", "litert"],
            f"{needs.DEFAULT}: no exported files; write them: hypervl export {needs.DEFAULT} --out phone, then",
        ),
    ],
)
def test_ask_refuses_arguments_that_cannot_be(extra, why, tiny_picture, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert why in fails("ask", tiny_picture, "what is this?", *extra)


def test_ask_refuses_an_empty_question(tiny_picture, fails):
    assert "the question is empty" in fails("ask", tiny_picture, " ")


def test_ask_needs_a_picture_and_exported_files_take_one(tiny_picture, fails):
    assert f"{tiny_picture}: one argument only; give a picture and a question" in fails("ask", tiny_picture)
    said = fails("ask", tiny_picture, "other.png", "what?", "--runtime", "litert")
    assert "other.png: the exported files answer about one picture" in said


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_reads_questions_from_a_pipe(tiny_folder, tiny_picture, tiny_model, monkeypatch, capsys):
    """An answer a line on stdout, those of a `Chat` in Python."""
    from hypervl_jax.chat import Chat

    want, chat = [], Chat(tiny_model, "large", max_tokens=6, system="no")
    for turn in ((tiny_picture, "what is this?"), ((), "and that?"), (tiny_picture, "and here?")):
        want.append("".join(chat.ask(*turn)))
    lines = f"what is this?\n\nand that?\n/image '{tiny_picture}'\nand here?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    argv = ["chat", str(tiny_picture), "--model", str(tiny_folder), "--branch", "large", "--max-tokens", "6"]
    cli.main([*argv, "--system", "no"])
    said = capsys.readouterr()
    assert said.out == "".join(answer + "\n" for answer in want)
    assert said.err.count("visual tokens") == 2


def test_a_piped_chat_goes_on_after_a_mistake_and_tells_of_it_at_the_end(tiny_folder, monkeypatch, saying, capsys):
    saying("yes")
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("/image no.png\nwhat?\n/nope\n/help\n" + "word " * 99 + "\nand?\n/quit\nx")
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["chat", "--model", str(tiny_folder), "--max-tokens", "4", "--context", "64"])
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert said.out == "yes\nyes\n"
    assert "hypervl: no.png: no such file" in said.err
    assert "hypervl: /nope: no such command; /help lists them" in said.err
    assert "/image FILE" in said.err
    assert "hypervl: the prompt needs" in said.err


def test_chat_refuses_arguments_that_cannot_be(tiny_folder, tiny_picture, fails):
    assert "--context 256: choose more than --max-tokens, 256" in fails("chat", "--context", 256)
    assert "no such file" in fails("chat", "no.png", "--model", tiny_folder)
    assert "not taught to think" in fails("chat", tiny_picture, "--model", tiny_folder, "--thinking")


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_tells_what_a_picture_costs_before_it_is_encoded(
    tiny_folder, tiny_picture, tiny_model, monkeypatch, capsys
):
    from hypervl_jax import ask, image, plan, text

    monkeypatch.setattr(ask, "_encode", None)
    cli.main(["tokens", str(tiny_picture), "--model", str(tiny_folder)])
    said = capsys.readouterr()
    pixels, cfg = image.load(tiny_picture), tiny_model.config
    p = plan.make(pixels.shape[:2], ask.ratio_of(tiny_model, pixels), cfg.policy)
    assert p.ratio < 1
    assert f"{tiny_picture}: {p.summary()}, resized to {p.resized[1]} x {p.resized[0]} px" in said.out
    assert f"{text.visual_tokens(p, cfg.text)} tokens with markers; VRC spares" in said.out
    assert [line.split()[0] for line in said.out.splitlines()[3:]] == ["base", "large", "decoder"]


def test_tokens_needs_no_weights(tiny_picture, monkeypatch, capsys):
    from hypervl_jax import checkpoint

    monkeypatch.setattr(checkpoint, "load_model", None)
    cli.main(["tokens", str(tiny_picture), str(tiny_picture), "--config", "tiny"])
    said = capsys.readouterr().out
    assert said.count(f"{tiny_picture}: ") == said.count("at ratio 1.00") == 2


def test_tokens_refuses_arguments_that_cannot_be(tiny_picture, fails):
    assert "give one or more: hypervl tokens IMAGE..." in fails("tokens")
    assert "give one of them" in fails("tokens", tiny_picture, "--config", "tiny", "--model", "mine")
    assert "did you mean 'tiny'" in fails("tokens", tiny_picture, "--config", "tniy")


def test_compiled_programs_are_kept_between_calls(tmp_path, monkeypatch):
    """Under the user's cache folder, unless the environment names another."""
    import jax

    kept = ("min_compile_time_secs", "min_entry_size_bytes")
    names = ("jax_compilation_cache_dir", *(f"jax_persistent_cache_{name}" for name in kept))
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("HOME", str(tmp_path))
    needs.keep_compiled()  # the tests have a folder of their own
    assert {name: getattr(jax.config, name) for name in names} == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    try:
        needs.keep_compiled()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "hypervl_jax" / "compiled")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# --- models ----------------------------------------------------------------------------------------------------------


def test_without_shipped_weights_it_says_how_to_make_some(tiny_picture, tmp_path, monkeypatch, fails):
    from hypervl_jax import checkpoint

    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    said = fails("ask", tiny_picture, "what is this?")
    assert "make quickstart" in said
    assert "--model quickstart/model" in said


def test_shipped_weights_are_found_by_name(tiny_folder, tmp_path, monkeypatch):
    from hypervl_jax import checkpoint

    shutil.copytree(tiny_folder, tmp_path / "nano")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert needs.load("nano").config == presets.tiny().model


def test_the_folder_of_a_run_is_its_model(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "config.json").write_text("{}")  # that of the run
    assert needs.load(str(tmp_path)).config == presets.tiny().model


def damage(folder, name, how):
    path = folder / name
    path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize(
    "how", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 64], ids=["cut", "empty", "junk"]
)
@pytest.mark.parametrize("verb", ["ask", "eval", "export"])
def test_a_damaged_model_is_named(verb, name, how, tiny_folder, tiny_picture, tmp_path, fails):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    damage(folder, name, how)
    before = snapshot(tmp_path)
    argv = {
        "ask": ["ask", tiny_picture, "what?", "--model", folder],
        "eval": ["eval", "--model", folder, "--data", tmp_path / "data"],
        "export": ["export", folder, "--out", tmp_path / "out"],
    }[verb]
    assert str(folder / name) in fails(*argv)
    assert snapshot(tmp_path) == before


@pytest.fixture
def exported(tiny_config, tiny_tokenizer, tmp_path):
    """A folder whose manifest is in order; what it calls a part is none."""
    from hypervl_jax.export import manifest

    folder = tmp_path / "phone"
    folder.mkdir()
    tiny_tokenizer.save(folder / "tokenizer.json")
    (folder / "vrc.tflite").write_bytes(bytes(1000))

    def file(name):
        data = (folder / name).read_bytes()
        return manifest.File(name, hashlib.sha256(data).hexdigest(), len(data))

    part = manifest.Part("vrc", file("vrc.tflite"), (), ())
    model = tiny_config.model
    what = manifest.Manifest(model, model.policy.tokens_per_tile, file("tokenizer.json"), (part,), "")
    manifest.write(folder, what)
    return folder


def test_a_truncated_tflite_file_is_named(exported, tiny_picture, fails):
    damage(exported, "vrc.tflite", lambda b: b[:500])
    said = fails("ask", tiny_picture, "what?", "--runtime", "litert", "--model", exported)
    assert f"{exported / 'vrc.tflite'}: 500 bytes instead of 1000" in said
    assert "export again" in said


def test_a_broken_manifest_is_named(exported, tiny_picture, fails):
    damage(exported, "manifest.json", lambda b: b[:99])
    said = fails("ask", tiny_picture, "what?", "--runtime", "litert", "--model", exported)
    assert str(exported / "manifest.json") in said


def test_exported_files_are_not_a_model(exported, tiny_picture, fails):
    assert "--runtime litert" in fails("ask", tiny_picture, "what?", "--model", exported)


# --- configs and runs ------------------------------------------------------------------------------------------------


def test_a_misspelt_preset_gets_a_hint(tmp_path, fails):
    assert "did you mean 'quickstart'?" in fails("train", "quikstart", "--out", tmp_path / "out")
    assert "choose one of tiny" in fails("quickstart", "--config", "large", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "no such file"),
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def get_config(): return unknown", "NameError"),
        ("def get_config(): return {}", "must return a Config, not dict"),
        (
            "from hypervl_jax.config import *\ndef get_config(): return PlanPolicy(tile=33)",
            "tile 33 must be a multiple",
        ),
    ],
)
def test_a_config_file_that_is_none(text, why, tmp_path, fails):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    said = fails("train", path, "--out", tmp_path / "out")
    assert str(path) in said
    assert why in said
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_a_folder_or_no_python(tmp_path, fails):
    assert "is a folder" in fails("train", tmp_path, "--out", tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    assert "Python file" in fails("train", tmp_path / "config.json", "--out", tmp_path / "out")


def test_a_preset_wins_over_a_folder_of_its_name(tmp_path, monkeypatch):
    """`hypervl quickstart` makes a folder of that name, and must still find its preset."""
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert needs.load_config("quickstart") == presets.quickstart()


def test_a_config_file_and_its_steps(tmp_path):
    (tmp_path / "mine.py").write_text("from hypervl_jax.presets import quickstart as get_config")
    assert needs.load_config(str(tmp_path / "mine.py")) == presets.quickstart()
    whole = presets.quickstart().train
    few = needs.load_config("quickstart", whole.steps // 10).train
    assert few.steps == whole.steps // 10
    assert few.stage0_steps == pytest.approx(whole.stage0_steps / 10, abs=1)
    many = needs.load_config("quickstart", 10 * whole.steps).train
    assert (many.steps, many.stage0_steps) == (10 * whole.steps, whole.stage0_steps)


def test_micro_batches_that_plan_found_to_fit(tmp_path, monkeypatch, fails):
    from hypervl_jax import quickstart

    seen, tiny = [], presets.tiny()
    monkeypatch.setattr(quickstart, "make_model", lambda cfg, *_, **__: seen.append(cfg))
    assert "accumulate" in fails("train", "tiny", "--out", tmp_path / "out", "--accumulate", 3)
    cli.main(["train", "tiny", "--out", str(tmp_path / "out"), "--accumulate", "2"])
    assert seen == [replace(tiny, train=replace(tiny.train, accumulate=2))]


def test_steps_and_screens_must_be_some(tmp_path, tiny_folder, fails):
    assert "--steps 0: at least 1" in fails("train", "tiny", "--out", tmp_path / "out", "--steps", 0)
    assert "--screens 0: at least 1" in fails("eval", "--model", tiny_folder, "--screens", 0)


def test_a_run_with_other_settings_is_left_alone(tmp_path, fails):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(presets.nano())))
    before = snapshot(tmp_path)
    for argv in (["train", "tiny", "--out", tmp_path], ["quickstart", "--config", "tiny", "--out", tmp_path]):
        said = fails(*argv)
        assert str(tmp_path) in said
        assert "another --out" in said
    assert snapshot(tmp_path) == before


def test_out_may_not_be_a_file(tmp_path, fails):
    path = tmp_path / "out"
    path.write_text("mine")
    assert f"{path}: a file is there" in fails("train", "tiny", "--out", path)
    assert path.read_text() == "mine"


def test_export_leaves_a_folder_that_is_not_its_own(tiny_folder, tmp_path, fails):
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    (tmp_path / "thesis.txt").write_text("mine")
    assert f"{tmp_path}: exists and is not an exported model" in fails("export", tiny_folder, "--out", tmp_path)
    assert f"{tiny_folder}: exists" in fails("export", tiny_folder, "--out", tiny_folder)
    assert snapshot(tmp_path) == {p.relative_to(tmp_path): b"mine" for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--calibrate", "-1"], "--calibrate: so many samples, at least 1"),
        (["--data", "data"], "--data: where they come from"),
        (["--recipe", "w4a16", "--calibrate", "2", "--data", "no/such"], "no/such: "),
        (["--recipe", "int8", "--calibrate", "2"], "none of its matrices is in 4 bits"),
        (["--rules", "no/such.txt"], "no/such.txt: neither a rule, PATTERN=KIND, nor a file of them"),
        (["--rules", "config.py"], "config.py:1: 'import os': a rule is PATTERN=KIND, its kind one of f32, int8"),
        (["--rules", "llm.x=int8"], "llm.x=int8: the pattern matches the whole path of no matrix"),
    ],
)
def test_export_refuses_what_it_cannot_round_by(more, says, tiny_folder, tmp_path, monkeypatch, fails):
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    (tmp_path / "config.py").write_text("import os\n")
    monkeypatch.chdir(tmp_path)
    assert says in fails("export", tiny_folder, "--out", "out", *more)
    assert [p.name for p in tmp_path.iterdir()] == ["config.py"]


def test_a_model_that_does_not_know_its_data_asks_for_samples(tiny_model, tmp_path, fails):
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    checkpoint.save_model(tmp_path / "m", tiny_model.config, tiny_model.params, tiny_model.tokenizer)
    said = fails("export", tmp_path / "m", "--out", tmp_path / "out", "--recipe", "w4a16", "--calibrate", "2")
    assert "does not say what it was trained on: give samples as --data FOLDER" in said


@pytest.mark.parametrize(
    ("argv", "gone", "extra"),
    [
        (["train", "tiny", "--out", "out"], "grain", "train"),
        (["quickstart", "--config", "tiny", "--out", "out"], "tensorflow_datasets", "train"),
        (["eval"], "tensorflow_datasets", "train"),
    ],
)
def test_a_missing_extra_is_told_before_work(argv, gone, extra, tmp_path, monkeypatch, fails):
    find = needs.importlib.util.find_spec
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None if name == gone else find(name))
    said = fails(*argv)
    assert f"{gone} is not installed" in said
    assert f"[{extra}]" in said
    assert not list(tmp_path.iterdir())


def test_export_without_its_converter_says_where_there_is_one(tmp_path, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "litert_converter.mlir._mlir_libs.converter_api_ext", None)
    said = fails("export", "model", "--out", tmp_path / "out")
    assert "Linux x86-64 and macOS arm64 only" in said
    assert "Everything but export works here" in said


def test_train_makes_a_model_and_says_what_next(tmp_path, monkeypatch, capsys):
    from hypervl_jax import quickstart

    seen = []
    monkeypatch.setattr(quickstart, "make_model", lambda *a, watch, on: seen.append(a))
    cli.main(["train", "tiny", "--out", str(tmp_path), "--steps", "4"])
    cli.main(["train", "tiny", "--out", str(tmp_path), "--start", "before/model"])
    assert seen == [(presets.tiny(), tmp_path, None), (presets.tiny(), tmp_path, Path("before/model"))]
    said = capsys.readouterr().out
    assert all(f"hypervl {verb}" in said for verb in ("ask", "eval", "export"))


def test_quickstart_runs_the_recipe(tmp_path, monkeypatch, capsys):
    from hypervl_jax import quickstart

    seen = []
    monkeypatch.setattr(quickstart, "run", lambda *a: seen.append(a))
    cli.main(["quickstart", "--config", "tiny", "--out", str(tmp_path)])
    assert seen == [(presets.tiny(), tmp_path)]
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def test_eval_prints_json(tiny_folder, tmp_path, capsys):
    cli.main(["eval", "--model", str(tiny_folder), "--screens", "4", "--data", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= {"branch", "vrc", "accuracy", "controls"}
    assert {"name_known", "name_unseen"} <= set(found["accuracy"])
    assert all(0 <= a["low"] <= a["mean"] <= a["high"] <= 1 for a in found["accuracy"].values())


# --- what goes wrong elsewhere ---------------------------------------------------------------------------------------


def test_an_error_nobody_expected_is_one_line_with_the_way_to_more(tiny_picture, monkeypatch, fails):
    from hypervl_jax import image

    def burst(_):
        raise RuntimeError("INTERNAL: RET_CHECK failure\nmany\nlines")

    monkeypatch.setattr(image, "load", burst)
    said = fails("ask", tiny_picture, "what?")
    assert "RuntimeError: INTERNAL: RET_CHECK failure" in said
    assert "--debug" in said
    with pytest.raises(RuntimeError, match="RET_CHECK"):
        cli.main(["ask", str(tiny_picture), "what?", "--debug"])


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch, fails):
    from hypervl_jax import quickstart

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "model"))

    monkeypatch.setattr(quickstart, "make_model", full)
    said = fails("train", "tiny", "--out", tmp_path)
    assert said == f"hypervl: {tmp_path / 'model'}: No space left on device\n"


def test_interrupted_says_that_work_is_kept(tmp_path, monkeypatch, capsys):
    from hypervl_jax import quickstart

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "make_model", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "tiny", "--out", str(tmp_path)])
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_in_an_interpreter_of_its_own(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "hypervl_jax.cli", "ask", str(tmp_path / "no.png"), "what?"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith(f"hypervl: {tmp_path / 'no.png'}: no such file")


def test_starting_does_not_wait_for_jax():
    code = "import sys, hypervl_jax.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- convert ---------------------------------------------------------------------------------------------------------


def test_a_model_is_taken_apart_and_put_together_again(tiny_folder, tiny_model, tmp_path, capsys):
    from hypervl_jax import checkpoint, tensors

    parts = {part: tmp_path / part for part in ("base", "large", "llm")}
    for part, folder in parts.items():
        cli.main(["convert", str(tiny_folder), "--part", part, "--out", str(folder), "--dtype", "bf16"])
    assert f"wrote {parts['llm']}: llm of {tiny_folder}" in capsys.readouterr().out
    sources = ["--vision-base", parts["base"], "--vision-large", parts["large"], "--llm", parts["llm"]]
    cli.main(["convert", *map(str, sources), "--out", str(tmp_path / "whole")])
    said = capsys.readouterr().out
    assert "fresh: base.projector, large.projector, vrc, drawn from seed 0: to be trained" in said
    assert f"wrote {tmp_path / 'whole'}: tiles of 32 px, 4 tokens each" in said
    got = tensors.flatten(checkpoint.load_model(tmp_path / "whole", dtype=None).params)
    old = {
        k: v for k, v in tensors.flatten(tiny_model.params).items() if k in got and k.startswith(("llm.", "base.vit."))
    }
    assert len(old) > 20
    assert all((got[k] == v.astype(got[k].dtype)).all() and got[k].dtype == "bfloat16" for k, v in old.items())


def test_what_convert_cannot_do_is_said_before_anything_is_read(tiny_folder, tmp_path, fails):
    three = ["--vision-base", "a", "--vision-large", "b", "--llm", "c"]
    out = ["--out", tmp_path / "new"]
    assert "give --vision-base, --vision-large and --llm, or MODEL and --part" in fails("convert", *out)
    assert "give --vision-base" in fails("convert", *three[:4], *out)
    assert "give --vision-base" in fails("convert", *three, "--part", "llm", *out)
    assert "a whole model; say with --part" in fails("convert", tiny_folder, *out)
    assert "a whole model; say with --part" in fails("convert", tiny_folder, "--part", "llm", *three, *out)
    assert "--tile 0: choose 1 to" in fails("convert", *three, "--tile", 0, *out)
    assert "--seed -1: choose 0 to" in fails("convert", *three, "--seed", -1, *out)
    assert f"{tiny_folder}: is there already" in fails("convert", *three, "--out", tiny_folder)
    assert "a/config.json: cannot be read" in fails("convert", *three, *out)
    assert not (tmp_path / "new").exists()


def test_a_published_part_is_no_model(tiny_model, tiny_picture, tmp_path, fails):
    from hypervl_jax import convert

    convert.save_llm(tmp_path / "part", tiny_model)
    said = fails("ask", tiny_picture, "what?", "--model", tmp_path / "part")
    assert "config.json: 'qwen3' is a part of a model; put one together with hypervl convert" in said
