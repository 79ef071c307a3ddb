"""Settings: JSON there and back, strict errors that name the place and the cure, presets that hang together."""

import dataclasses
import json
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervl_jax import config, presets
from hypervl_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    DclConfig,
    LlmConfig,
    PlanPolicy,
    Rule,
    ScreensConfig,
    TextConfig,
    TrainConfig,
    VitConfig,
    VrcConfig,
    VrcTrainConfig,
)

few = settings(max_examples=60, deadline=None)


def leaves(cls: type, path: tuple[str, ...] = ()):
    """(path, type) of every setting below `cls`."""
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from leaves(typing.cast(type, kind), (*path, name))
        else:
            yield (*path, name), kind


LEAVES = list(leaves(Config))
PRESET = st.sampled_from([presets.preset(name) for name in presets.PRESETS])


def at(tree: dict, path: tuple[str, ...]) -> dict:
    """The settings that the last key of `path` stands in."""
    for key in path[:-1]:
        tree = tree[key]
    return tree


def nudged(kind, old):
    """Another value that a setting of this type accepts."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return next(o for o in args if o != old)
    if typing.get_origin(kind) is tuple:
        if args[0] is Rule:
            return [*old, {"path": "llm", "rate": 0.5}]
        return old[:-1] if args[0] is str else [nudged(args[0], old[0]), *old[1:]]
    number = {int: old - 1 if type(old) is int and old > 1 else 2, float: 0.99 * old if type(old) is float else 0}
    return {bool: not old, str: "other", **number}[kind]


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_values(name):
    cfg = presets.preset(name)
    assert cfg == presets.preset(name)
    assert hash(cfg) == hash(presets.preset(name))
    assert cfg.name == name
    assert len(cfg.data.lengths) == len(cfg.data.tile_buckets)
    assert list(cfg.data.tile_buckets) == sorted(cfg.data.tile_buckets)


@pytest.mark.parametrize("name", ["tiny", "quickstart", "nano"])
def test_the_largest_screen_of_a_preset_fits_its_buckets(name):
    """Any size the composition may draw has a bucket of tiles."""
    from hypervl_jax import plan
    from hypervl_jax.data import pipeline

    cfg = presets.preset(name)
    s = cfg.data.screens
    for height in range(s.min_side, s.max_side + 1):
        width = min(s.max_side, s.max_area // height)
        for size in ((height, width), (width, height)):
            pipeline.bucket_of(plan.make(size, 1.0, cfg.model.policy).n_tiles, cfg.data)


@pytest.mark.parametrize(
    ("name", "hint"), [("tinny", "did you mean 'tiny'"), ("zzz", "choose one of tiny, quickstart")]
)
def test_an_unknown_preset_is_answered_with_the_nearest(name, hint):
    with pytest.raises(ConfigError, match=hint):
        presets.preset(name)


# --- JSON ------------------------------------------------------------------------------------------------------------


@few
@given(PRESET, st.data())
def test_json_gives_the_same_config_back(cfg, data):
    """Also with settings other than the presets'."""
    values = config.to_dict(cfg)
    for path, kind in data.draw(st.lists(st.sampled_from(LEAVES), max_size=6, unique=True)):
        if path[0] != "model" and path[-1] != "accumulate":  # sizes there must agree with each other
            at(values, path)[path[-1]] = nudged(kind, at(values, path)[path[-1]])
    cfg = config.from_dict(Config, values)
    text = json.dumps(config.to_dict(cfg))
    assert config.from_dict(Config, json.loads(text)) == cfg


@few
@given(PRESET, st.sampled_from(LEAVES), st.data())
def test_a_slip_in_any_name_is_an_error_with_its_path(cfg, leaf, data):
    path, _ = leaf
    values = config.to_dict(cfg)
    node, name = at(values, path), path[-1]
    cut = data.draw(st.integers(0, len(name)))
    slip = name[:cut] + "x" + name[cut:]
    node[slip] = node.pop(name)
    with pytest.raises(ConfigError) as e:
        config.from_dict(Config, values)
    assert str(e.value).startswith(".".join(("config", *path[:-1], slip)) + ": no such setting")
    assert f"did you mean '{name}'" in str(e.value) or len(name) < 3


@few
@given(PRESET, st.sampled_from(LEAVES), st.data())
def test_a_value_of_another_type_is_an_error_with_its_path(cfg, leaf, data):
    path, kind = leaf
    wrong = [None, {}, {"a": 1}, [[]]]
    if kind is not str:
        wrong += ["12", "", "on"]
    if kind is not bool:
        wrong += [True]
    if kind is int:
        wrong += [1.0, 1.5]
    values = config.to_dict(cfg)
    at(values, path)[path[-1]] = data.draw(st.sampled_from(wrong))
    with pytest.raises(ConfigError, match=r"config\." + r"\.".join(path) + r"(\[0\])?: "):
        config.from_dict(Config, values)


@pytest.mark.parametrize("path", [("model", "llm", "vocab"), ("model", "base", "width"), ("name",), ("model",)])
def test_a_missing_setting_without_default_is_an_error(path):
    values = config.to_dict(presets.tiny())
    del at(values, path)[path[-1]]
    with pytest.raises(ConfigError, match=rf"config\.{'.'.join(path)}: missing"):
        config.from_dict(Config, values)


def test_settings_with_defaults_may_be_left_out():
    values = config.to_dict(presets.nano())
    got = config.from_dict(Config, {k: values[k] for k in ("name", "model", "data")})
    assert got == Config("nano", presets.nano().model, presets.nano().data)


@pytest.mark.parametrize("found", [None, 3, "tiny", []])
def test_what_is_no_table_of_settings_is_an_error(found):
    with pytest.raises(ConfigError, match="expected settings of Config"):
        config.from_dict(Config, found)


def test_a_whole_number_is_a_float_but_a_float_is_no_whole_number():
    assert config.from_dict(TrainConfig, {"lr": 1}).lr == 1.0
    assert type(config.from_dict(TrainConfig, {"lr": 1}).lr) is float
    with pytest.raises(ConfigError, match="expected int, found 4"):
        config.from_dict(TrainConfig, {"steps": 4.0})


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "1" + 400 * "0", 900 * "[" + 900 * "]"])
def test_what_json_can_say_but_no_setting_can_be_is_an_error(text):
    with pytest.raises(ConfigError, match=r"config\.lr: expected"):
        config.from_dict(TrainConfig, {"lr": json.loads(text)})


# --- sizes that cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PlanPolicy(tile=40, patch=16), "tile 40 must be a multiple of patch x merge = 32"),
        (lambda: PlanPolicy(patch=0), "at least 1"),
        (lambda: PlanPolicy(merge=-2), "at least 1"),
        (lambda: PlanPolicy(max_tiles=0), "at least 1"),
        (lambda: VitConfig(64, 2, 3, 128), "width 64 must be a multiple of heads 3"),
        (lambda: VitConfig(64, 2, 4, 128, tile=30, patch=16), "tile 30 must be a multiple of patch 16"),
        (lambda: LlmConfig(8, 8, 1, 3, 2, 4, 8), "heads 3 must be a multiple of kv_heads 2"),
        (lambda: LlmConfig(8, 8, 1, 2, 2, 5, 8), "head_dim 5 must be even"),
        (lambda: dataclasses.replace(presets.tiny().model, policy=PlanPolicy()), "the plan cuts tiles of 512"),
        (lambda: VrcConfig(side=0), "side 0 must lie in 1 .. "),
        (lambda: VrcConfig(min_ratio=0.0), "min_ratio 0.0 must be above 0"),
        (lambda: TextConfig(coords=0), "coords must be at least 1"),
        (lambda: ScreensConfig(name="../../../escaped/x"), "name '../../../escaped/x' must be of letters"),
        (lambda: ScreensConfig(name=""), "name '' must be"),
        (lambda: ScreensConfig(name="a\n"), "must be of letters"),
        (lambda: ScreensConfig(test_known=10**9), "test_known 1000000000 must lie in 0 .. 10000000"),
        (lambda: ScreensConfig(train=-1), "train -1 must"),
        (lambda: ScreensConfig(max_side=10**5), "max_side 100000 must"),
        (lambda: ScreensConfig(max_area=10**10), "max_area 10000000000 must"),
        (lambda: ScreensConfig(questions=10**6), "questions 1000000 must lie in 0 .. 64"),
        (lambda: ScreensConfig(hand_height=(14, 10**6)), "hand_height must end at"),
        (lambda: DataConfig(batch=0), "batch must be at least 1"),
        (lambda: DataConfig(shrink_min=0.0), "shrink_min 0.0 must be above 0"),
        (lambda: DataConfig(shrink_prob=1.5), "shrink_prob 1.5 must lie in 0 .. 1"),
        (lambda: DataConfig(tile_buckets=(1, 3)), "with one of lengths"),
        (lambda: DataConfig(tile_buckets=(), lengths=()), "must rise from 1"),
        (lambda: DataConfig(tile_buckets=(3, 1, 5)), "must rise from 1"),
        (lambda: DclConfig(temperature=0.0), "temperature 0.0 must be above 0"),
        (lambda: DclConfig(weight=float("nan")), "weight nan must"),
        (lambda: TrainConfig(save_every=0, log_every=0), "log_every, save_every must be at least 1"),
        (lambda: TrainConfig(steps=3), "stage0_steps 400 must lie in 0 .. 3"),
        (lambda: TrainConfig(lr=0.0), "lr 0.0 must be above 0"),
        (lambda: TrainConfig(clip=float("inf")), "clip inf must be above 0 and finite"),
        (lambda: TrainConfig(b2=1.0), "b2 1.0 must"),
        (lambda: TrainConfig(accumulate=0), "accumulate must be at least 1"),
        (lambda: TrainConfig(loss_chunk=-1), "loss_chunk -1 must lie in 0 .. "),
        (lambda: TrainConfig(attention_block=-1), "attention_block -1 must lie in 0 .. "),
        (lambda: Rule("llm", -1.0), "rate -1.0 must lie in 0 .. "),
        (lambda: Rule("llm.("), r"path 'llm.\(' is no regular expression"),
        (lambda: VrcTrainConfig(batch=0), "batch must be at least 1"),
        (lambda: VrcTrainConfig(ratios=(0.5, 0.2, 1.0)), "must rise from above 0 to exactly 1"),
        (lambda: VrcTrainConfig(ratios=()), "must rise from above 0 to exactly 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_parts_of_a_config_must_agree():
    """A point is written on the grid of the screens; a sheet is one tile."""
    nano = presets.nano()
    coarse = dataclasses.replace(nano.model, text=dataclasses.replace(nano.model.text, coords=1000))
    with pytest.raises(ValueError, match=r"'find' is answered on a grid of 100, model\.text\.coords is 1000"):
        dataclasses.replace(nano, model=coarse)
    without = dataclasses.replace(nano.data.screens, tasks=("name", "read"))
    dataclasses.replace(nano, model=coarse, data=dataclasses.replace(nano.data, screens=without))
    with pytest.raises(ValueError, match=r"data\.batch 16 must be a multiple of train\.accumulate 3"):
        dataclasses.replace(nano, train=dataclasses.replace(nano.train, accumulate=3))
    large = dataclasses.replace(nano.data.screens, sheet_side=96)
    with pytest.raises(ValueError, match=r"sheet_side 96 must be at most model\.policy\.tile 64"):
        dataclasses.replace(nano, data=dataclasses.replace(nano.data, screens=large))


def test_a_refusal_inside_json_names_its_place():
    values = config.to_dict(presets.tiny())
    values["model"]["policy"]["patch"] = 0
    with pytest.raises(ConfigError, match=r"config\.model\.policy: .*at least 1"):
        config.from_dict(Config, values)


def test_an_unknown_branch_is_answered_with_the_two_there_are():
    # Under the tests' type checks the annotation answers, in use the function itself: both name the branches.
    with pytest.raises((ValueError, TypeError), match=r"base.*large"):
        presets.tiny().model.vit("huge")  # type: ignore


# --- hash ------------------------------------------------------------------------------------------------------------


def test_every_setting_changes_the_hash():
    base = config.to_dict(presets.tiny())
    seen = {config.config_hash(presets.tiny())}
    for path, kind in LEAVES:
        if path[0] == "model":
            continue
        values = json.loads(json.dumps(base))
        at(values, path)[path[-1]] = nudged(kind, at(values, path)[path[-1]])
        seen.add(config.config_hash(config.from_dict(Config, values)))
    assert len(seen) == 1 + sum(path[0] != "model" for path, _ in LEAVES)
    assert all(len(h) == 12 for h in seen)
