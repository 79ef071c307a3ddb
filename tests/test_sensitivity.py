"""What each matrix costs alone, against the losses of a model rounded by rules; the recipe picked, against every number
of matrices counted out."""

import json
import re

import jax
import numpy as np
import pytest

from hypervl_jax import calibrate, cli, evaluate, gptq, needs, quantize, sensitivity
from hypervl_jax.quantize import Rule
from hypervl_jax.sensitivity import Cost, Exam, Lost, Record, SensitivityError

DOWN = "llm.blocks.layers.1.down.weight"


@pytest.fixture(scope="module")
def screens(tiny_model):
    return sensitivity.held_out(tiny_model, 12)


@pytest.fixture(scope="module")
def exam(tiny_model, screens):
    return Exam(tiny_model, "base", screens)


def test_an_exam_asks_only_of_reading_and_grounding(exam, screens, tiny_config):
    assert {q.task for s in exam.screens for q in s.questions} == {"read", "find"} == exam.plain.keys()
    assert len(exam.screens) <= len(screens) <= tiny_config.data.screens.label
    with pytest.raises(SensitivityError, match="0 screens ask nothing of read or find; take more"):
        Exam(exam.model, "base", [])


def test_the_same_model_loses_nothing(exam, tiny_model):
    for task in exam.lost(tiny_model.params).values():
        assert (task.nats, task.points, task.low, task.high) == (0, 0, 0, 0)


def test_what_a_matrix_costs_is_what_the_model_of_that_rule_loses(exam, tiny_model, monkeypatch):
    """Integers put where they were by rules, and losses question by question."""
    monkeypatch.setattr(sensitivity, "tqdm", lambda units, *a, **k: [u for u in units if u == (1, "down")])
    (found,) = sensitivity.costs(exam, "int4/32", [], progress=False)
    params = quantize.quantize(tiny_model.params, (Rule(re.escape(DOWN), "int4/32"),))
    ones = [1.0] * len(exam.screens)
    before, after = (
        evaluate.answer_losses(tiny_model._replace(params=p), "base", exam.screens, ones, 3)
        for p in (tiny_model.params, quantize.restored(params))
    )
    assert found.path == DOWN
    w = tiny_model.params["llm"]["blocks"]["layers"]["down"]["weight"][1]
    assert found.saved == w.size + 4 * len(w) - (w.size // 2 + 2 * w.size // 32)
    for task, lost in found.lost.items():
        pairs = [
            after[i, k] - before[i, k]
            for i, s in enumerate(exam.screens) for k, q in enumerate(s.questions) if q.task == task
        ]  # fmt: skip
        assert lost.n == len(pairs)
        np.testing.assert_allclose(lost.nats, np.mean(pairs), atol=1e-5)
        assert lost.nats != 0


def test_with_gram_matrices_the_integers_are_those_of_gptq(exam, tiny_model, monkeypatch):
    monkeypatch.setattr(sensitivity, "tqdm", lambda units, *a, **k: [u for u in units if u == (1, "down")])
    grams = list(calibrate.grams(tiny_model, calibrate.from_screens(tiny_model, 2), ("base",), progress=False))
    seen = []
    monkeypatch.setattr(exam, "lost", lambda params: seen.append(params) or {"read": Lost(0, 0, 0, 0, 1)})
    sensitivity.costs(exam, "int4/32", grams, progress=False)
    w = np.asarray(tiny_model.params["llm"]["blocks"]["layers"]["down"]["weight"])
    want = quantize.floats(gptq.round_matrix(w[1], quantize.Kind(4, 32), grams[1]["down"]))
    got = seen[0]["llm"]["blocks"]["layers"]["down"]["weight"]
    np.testing.assert_array_equal(got, np.stack([w[0], want]))


def test_only_matrices_that_the_groups_fit_are_tried(exam, monkeypatch):
    monkeypatch.setattr(exam, "lost", lambda params: {"read": Lost(0, 0, 0, 0, 1)})
    tried = {c.path.split(".", 3)[3] for c in sensitivity.costs(exam, "int4/64", [], progress=False)}
    assert tried == {"0.o.weight", "1.o.weight"}  # 64 inputs; the others have 48 and 96
    with pytest.raises(SensitivityError, match=r"groups as int4/128 has them; choose another --group"):
        sensitivity.costs(exam, "int4/128", [], progress=False)


class Paper(Exam):
    """An exam that a model loses by its matrices in 4 bits, each its price; and two points for 8 bits if `base`."""

    def __init__(self, model, prices, base=0.0):
        self.model, self.prices, self.base, self.sat = model, prices, base, 0

    def lost(self, params):
        self.sat += 1
        layers, total = params["llm"]["blocks"]["layers"], self.base
        for path, price in self.prices.items():
            _, _, _, i, name, _ = path.split(".")
            stack = layers[int(i)][name]["weight"] if isinstance(layers, list) else layers[name]["weight"][int(i)]
            total += price * (len(np.unique(np.asarray(stack)[0])) <= 15)
        return {"read": Lost(0.0, total, total, total, 9), "find": Lost(0.0, total / 2, 0, 0, 9)}


def table(prices):
    return [
        Cost(path, 1000, {"read": Lost(price, 0, 0, 0, 9), "find": Lost(-1, 0, 0, 0, 9)})
        for path, price in prices.items()
    ]


PRICES = {
    f"llm.blocks.layers.{i}.{n}.weight": 0.1 * (1 + 3 * i + k)
    for i in range(2)
    for k, n in enumerate(("o", "down", "up"))
}


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.1, 0.35, 0.61, 1.49, 2.0, 99.0])
def test_as_many_matrices_as_hold_together(keep, tiny_model):
    """Every number of them counted out: the sums of the cheapest prices."""
    paper = Paper(tiny_model, PRICES)
    picked = sensitivity.pick(paper, table(PRICES), "int4", [], keep, progress=False)
    sums = np.cumsum([0, *sorted(PRICES.values())])
    assert picked.narrow == int((sums <= keep).sum()) - 1
    np.testing.assert_allclose(picked.lost["read"].points, sums[picked.narrow])
    params = quantize.quantize(tiny_model.params, picked.recipe)
    narrow = {f"llm.blocks.layers.{i}.{n}.weight" for i, layer in enumerate(calibrate.layers_of(params))
              for n in calibrate.narrow(layer)}  # fmt: skip
    cheapest = set(sorted(PRICES, key=PRICES.__getitem__)[: picked.narrow])
    assert narrow & PRICES.keys() == cheapest
    assert picked.bits == quantize.bits_per_weight(params["llm"]["blocks"])
    assert paper.sat <= 6


def test_a_model_that_8_bits_cost_too_much_has_no_recipe(tiny_model):
    with pytest.raises(
        SensitivityError, match=r"in 8 bits it already loses more than 0\.5 points: read .*\+2\.00 points"
    ):
        sensitivity.pick(Paper(tiny_model, PRICES, 2.0), table(PRICES), "int4", [], 0.5, progress=False)


def test_measurements_are_kept_as_they_are_made(tmp_path):
    path, settings, lost = tmp_path / "r.json", {"group": "32", "screens": 4}, {"read": Lost(0.1, 2.0, -1.0, 5.0, 7)}
    record, times = Record(path, settings), []
    for _ in range(2):
        assert record("a", lambda: times.append(1) or lost) == lost
    with pytest.raises(KeyboardInterrupt):
        record("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert Record(path, settings)("a", lambda: 1 / 0) == lost
    assert len(times) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    with pytest.raises(
        SensitivityError, match=r"r\.json: measured with other group; remove it, or choose another --out"
    ):
        Record(path, settings | {"group": "64"})
    for broken in ("{", "[]", "{}", "3"):
        path.write_text(broken)
        with pytest.raises(SensitivityError, match=r"r\.json: not a file of measurements"):
            Record(path, settings)


def test_other_weights_are_other_settings(tiny_params):
    other = jax.tree.map(np.array, tiny_params)
    assert sensitivity.digest(other) == sensitivity.digest(tiny_params)
    other["llm"]["blocks"]["layers"]["o"]["weight"][1, 0, 0] += 1
    assert sensitivity.digest(other) != sensitivity.digest(tiny_params)


def test_weights_that_give_no_numbers_are_said_to(tiny_model, screens):
    llm = tiny_model.params["llm"] | {"norm": {"weight": tiny_model.params["llm"]["norm"]["weight"] * np.nan}}
    with pytest.raises(SensitivityError, match="no numbers"):
        Exam(tiny_model._replace(params=tiny_model.params | {"llm": llm}), "base", screens)


def test_the_verb_writes_rules_that_export_takes_and_goes_on(tiny_folder, tiny_model, tmp_path, monkeypatch, capsys):
    out, call = tmp_path / "rules.txt", ["recipe", str(tiny_folder), "--group", "row", "--keep", "50", "--screens", "6"]
    monkeypatch.setattr(calibrate, "INPUT", {"down": "down", "up": "gate"})  # fewer of them
    monkeypatch.setattr(needs, "keep_compiled", lambda: None)
    sat, lost = [], Exam.lost
    monkeypatch.setattr(Exam, "lost", lambda self, params: sat.append(1) or lost(self, params))
    cli.main([*call, "--out", str(out)])
    said = capsys.readouterr().out
    assert len(sat) == 5  # 2 matrices of 2 layers alone, all together
    assert "4 of 4 matrices in 4 bits" in said
    assert f"--rules {out}" in said
    recipe = quantize.read([str(out)])
    assert recipe == (Rule(r"llm\.blocks\..*", "int4"), Rule(".*", "int8"))
    assert out.read_text().count("# ") >= 4 + 4
    quantize.quantize(tiny_model.params, recipe)
    first = out.read_text()
    out.unlink()
    cli.main([*call, "--out", str(out)])
    assert (len(sat), out.read_text()) == (5, first)
    assert len(json.loads((tmp_path / "rules.txt.json").read_text())) == 6


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--keep", "-1"], "--keep -1: at least 0 points"),
        (["--keep", "nan"], "--keep nan: at least 0"),
        (["--screens", "0"], "--screens 0: at least 1"),
        (["--calibrate", "-1"], "--calibrate: so many samples"),
        (["--data", "x"], "--data: where they come from"),
        (["--out", "no/such/folder/rules.txt"], "no such folder"),
        (["--out", "."], "is there already"),
    ],
)
def test_arguments_that_cannot_be(more, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in more else ["--out", "rules.txt"]
    with pytest.raises(SystemExit):
        cli.main(["recipe", "nano", *out, *more])
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
