"""Recipes: every shipped file loads and round-trips, every key and value that is not understood is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ternarize.errors import TernarizeError
from ternarize.recipe import DEFAULT, RECIPE_FOLDER, Calibration, Distillation, Recipe, Tuning, shipped

FILES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))  # each is a test case by being there

recipes = st.builds(
    Recipe,
    grid=st.sampled_from(["dlt", "symmetric", "absmean"]),
    group_size=st.none() | st.integers(1, 4096),
    feedback=st.booleans(),
    order=st.sampled_from(["curvature", "natural"]),
    curvature=st.booleans(),
    refit=st.booleans(),
    correction=st.floats(0, 1),
    damping=st.floats(0, 1, exclude_min=True),
    embeddings=st.sampled_from(["int8", "int6", "keep"]),
    head=st.sampled_from(["int8", "int6", "keep"]),
    int8_group_size=st.integers(1, 4096),
    skip=st.lists(st.text(), max_size=3).map(tuple),
    calibration=st.builds(
        Calibration,
        text=st.lists(st.text(), min_size=1, max_size=3).map(tuple),
        samples=st.integers(1, 10**6),
        length=st.integers(2, 10**6),
        held_out=st.floats(0, 0.5),
        random=st.floats(0, 0.5),
        seed=st.integers(0, 2**31),
    ),
    sweeps=st.integers(0, 20),
    budget=st.none() | st.floats(1.61, 4),
    scale_bits=st.sampled_from([8, 4]),
    shift_bits=st.sampled_from([8, 4]),
    tune=st.builds(
        Tuning,
        epochs=st.floats(0, 9),
        window=st.integers(1, 4),
        soften=st.floats(0, 1),
        ending=st.integers(0, 99) | st.just("all"),
    ),
    distill=st.builds(Distillation, epochs=st.floats(0, 9), codes=st.sampled_from(["latent", "low-rank", "frozen"])),
)


PARTS: dict[str, Any] = {"calibration": Calibration, "tune": Tuning, "distill": Distillation}


def keys() -> list[str]:
    """Every setting, dotted."""
    plain = [f.name for f in dataclasses.fields(Recipe) if f.name not in PARTS]
    return plain + [f"{part}.{f.name}" for part, kind in PARTS.items() for f in dataclasses.fields(kind)]


def nested(key: str, value: Any) -> dict[str, Any]:
    """`calibration.samples`, 3 -> {"calibration": {"samples": 3}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_file_loads_by_path_and_by_name_and_round_trips(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe == Recipe.load(str(path)) == Recipe.load(path.stem)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(again) == recipe


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_file_states_its_version_and_begins_with_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text)["version"] == 1
    assert re.match(r"# \w+", text)


def test_the_shipped_recipes_are_the_files_of_the_folder() -> None:
    assert shipped() == [path.stem for path in FILES]
    assert DEFAULT in shipped()
    assert all((RECIPE_FOLDER / f"{name}.yaml").is_file() for name in shipped())


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert Recipe.load(path) == Recipe()


def test_off_needs_no_quotes_though_yaml_takes_the_word_for_no(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("tune: {epochs: 1, off: 0.5}\n")
    assert Recipe.load(path).tune.off == 0.5
    path.write_text("off: 0.5\n")
    with pytest.raises(TernarizeError, match=r"unknown key 'False'"):
        Recipe.load(path)


def test_a_yml_file_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("group_size: null\nskip: '*.down_proj'\ncalibration: {samples: 3}\n")
    recipe = Recipe.load(path)
    assert recipe.group_size is None
    assert recipe.skip == ("*.down_proj",)
    assert recipe.calibration == Calibration(samples=3)


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "missing.yaml"
    with pytest.raises(TernarizeError, match=re.escape(f"recipe {path}: No such file") + ".*Check the path"):
        Recipe.load(path)


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "folder.yaml"
    path.mkdir()
    with pytest.raises(TernarizeError, match=re.escape(f"recipe {path}: ") + ".*Check the path"):
        Recipe.load(path)


def test_an_unknown_name_is_refused_with_those_that_ship_and_the_nearest() -> None:
    with pytest.raises(TernarizeError) as caught:
        Recipe.load("fats")
    message = str(caught.value)
    assert "'fats'" in message
    assert "did you mean 'fast'?" in message
    assert all(name in message for name in shipped())
    assert "YAML file" in message


@pytest.mark.parametrize(
    "content",
    [b"group_size: [64", b"a: b: c", b"\tgroup_size: 64", b"group_size: \xff\xfe", b"{[1]: 2}", b"seed: 2001-99-99"],
    ids=repr,
)
def test_what_is_not_yaml_is_refused_with_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(TernarizeError, match=re.escape(f"recipe {path} is not valid YAML")):
        Recipe.load(path)


@pytest.mark.parametrize("content", ["- group_size", "fast", "3", "true"])
def test_a_file_without_keys_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(TernarizeError, match=re.escape(f"recipe {path}: expected keys and values, found")):
        Recipe.load(path)


# -- round trips ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(recipes)
def test_a_recipe_survives_yaml_and_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_recipe_is_frozen_and_can_be_a_key() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().group_size = 128  # type: ignore[misc]
    assert {Recipe(): 1}[Recipe()] == 1


@pytest.mark.parametrize("kind", [Recipe, *PARTS.values()])
def test_every_setting_is_described(kind: type) -> None:
    described = "".join(part.__doc__ or "" for part in kind.__mro__ if dataclasses.is_dataclass(part))
    for field in dataclasses.fields(kind):
        assert re.search(rf"^ +{field.name}: \S", described, re.MULTILINE), field.name


def test_a_recipe_needs_statistics_if_any_step_does() -> None:
    off = {"feedback": False, "curvature": False, "refit": False, "sweeps": 0, "correction": 0.0}
    assert not Recipe(**off).needs_statistics  # type: ignore[arg-type]
    steps: list[dict[str, Any]] = [{"feedback": True}, {"curvature": True}, {"refit": True}, {"correction": 0.5}]
    for change in [*steps, {"sweeps": 1}, {"tune": Tuning(epochs=1)}, {"budget": 1.75}]:
        assert Recipe(**(off | change)).needs_statistics  # type: ignore[arg-type]


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", keys())
def test_a_misspelt_key_is_refused_with_the_nearest(key: str) -> None:
    *parents, last = key.split(".")
    wrong = ".".join([*parents, last[:-1] + "q"])
    with pytest.raises(TernarizeError) as caught:
        Recipe.from_dict(nested(wrong, 1), where="recipe mine.yaml")
    message = str(caught.value)
    assert message.startswith(f"recipe mine.yaml: unknown key {wrong!r}")
    assert f"did you mean {last!r}?" in message
    assert "Known keys: " in message


def test_a_key_that_resembles_none_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TernarizeError) as caught:
        Recipe.from_dict({7: "x"})
    assert "unknown key '7'" in str(caught.value)
    assert "did you mean" not in str(caught.value)
    assert all(field.name in str(caught.value) for field in dataclasses.fields(Recipe))


WHOLE: list[Any] = ["64", 64.0, True, [64]]
NUMBER: list[Any] = ["0.5", True, None, [0.5], math.nan, math.inf]
FLAG: list[Any] = [1, 0, "yes", None, []]
WORD: list[Any] = ["nonsense", 1, True, None, ["dlt"]]
BAD: dict[str, list[Any]] = {
    "version": [0, 2, None, *WHOLE],
    "grid": WORD,
    "group_size": [0, -1, *WHOLE],
    "feedback": FLAG,
    "order": WORD,
    "curvature": FLAG,
    "refit": FLAG,
    "correction": [-0.1, 1.5, *NUMBER],
    "damping": [0, 0.0, -0.01, 1.5, *NUMBER],
    "embeddings": WORD,
    "head": WORD,
    "int8_group_size": [0, -64, None, *WHOLE],
    "skip": [3, None, True, [3], ["a", None], {"a": 1}],
    "calibration": [3, None, True, "self", ["self"]],
    "calibration.text": [[], 3, None, [3], [["self"]]],
    "calibration.samples": [0, -1, None, *WHOLE],
    "calibration.length": [1, 0, None, *WHOLE],
    "calibration.held_out": [-0.1, 0.6, *NUMBER],
    "calibration.random": [-0.1, 0.6, *NUMBER],
    "calibration.seed": [None, *WHOLE],
    "budget": [1.6, 0, 4.5, "2", True, [2]],
    "scale_bits": [3, 0, "4", None, 32],
    "shift_bits": [3, 16, "4", None],
    "sweeps": [-1, 21, None, *WHOLE],
    "tune.window": [0, 5, None, *WHOLE],
    "tune.soften": [-0.1, 1.1, *NUMBER],
    "tune.ending": [-1, None, "every", ["all"], *WHOLE],
    "tune.ending_epochs": [0, -1, None, *NUMBER],
    "tune.ending_rate": [0, -1, None, *NUMBER],
    "distill.samples": [0, None, *WHOLE],
    "distill.batch": [0, None, *WHOLE],
    "distill.depths": [0, None, *WHOLE],
    "distill.top": [-1, None, *WHOLE],
    "distill.checkpointing": FLAG,
    "distill.check": [0, None, *WHOLE],
    "distill.patience": [0, None, *WHOLE],
    "distill.seed": [None, *WHOLE],
    **{
        f"{part}.{key}": values
        for part in ("tune", "distill")
        for key, values in {
            "epochs": [-1, *NUMBER],
            "codes": WORD,
            "rank": [0, None, *WHOLE],
            "levels": FLAG,
            "thresholds": FLAG,
            "rate": [0, -1, *NUMBER],
            "level_rate": [0, -1, *NUMBER],
            "off": [-0.1, *NUMBER],
            "cell": [-0.1, 0.5, *NUMBER],
        }.items()
    },
}


def test_bad_values_are_listed_for_every_setting() -> None:
    assert BAD.keys() == {*keys(), "calibration"}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values], ids=str)
def test_a_bad_value_is_refused_with_its_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(TernarizeError) as caught:
        Recipe.from_dict(nested(key, value))
    message = str(caught.value)
    assert re.search(rf"\b{re.escape(key)}\b", message), message
    assert repr(value) in message, message


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("grid", "dtl", "one of dlt, symmetric, absmean (did you mean 'dlt'?)"),
        ("group_size", 0, "at least 1, or null for a whole row"),
        ("group_size", "64", "a whole number"),
        ("correction", 2, "between 0 (off) and 1"),
        ("damping", 0, "above 0, at most 1; 0.01 is usual"),
        ("feedback", "yes", "true or false"),
        ("skip", 3, "a list of strings"),
        ("calibration.length", 1, "at least 2 tokens"),
        ("shift_bits", 16, "16 where scale_bits is, and only there"),
        ("tune.window", 5, "between 1 and 4 blocks"),
        ("budget", 1.5, "above 1.6 (the trits alone), at most 4, or null"),
        ("version", 2, "this ternarize reads version 1; upgrade"),
    ],
)
def test_a_refusal_says_the_rule(key: str, value: Any, rule: str) -> None:
    with pytest.raises(TernarizeError, match=re.escape(rule)):
        Recipe.from_dict(nested(key, value))


def test_values_at_the_edge_of_their_range_are_allowed() -> None:
    edge = {"group_size": 1, "int8_group_size": 1, "correction": 1, "damping": 1, "calibration": {"length": 2}}
    recipe = Recipe.from_dict(edge)
    assert type(recipe.correction) is float  # a whole number is a number
    assert recipe.calibration.length == 2


def test_a_single_string_is_a_list_of_one() -> None:
    recipe = Recipe.from_dict({"skip": "lm_head", "calibration": {"text": "pydoc"}})
    assert recipe.skip == ("lm_head",)
    assert recipe.calibration.text == ("pydoc",)


# -- settings ------------------------------------------------------------------------------------------------------


def test_settings_replace_what_they_name_and_nothing_else() -> None:
    changed = Recipe().with_settings(
        ["group_size=128", "calibration.samples=8", "skip=[a, 're:b.*']", "damping=0.05", "refit=false"]
    )
    assert changed == Recipe(
        group_size=128, skip=("a", "re:b.*"), damping=0.05, refit=False, calibration=Calibration(samples=8)
    )


def test_no_settings_change_nothing() -> None:
    assert Recipe(group_size=7).with_settings([]) == Recipe(group_size=7)


@pytest.mark.parametrize("text", ["null", ""])
def test_a_setting_can_be_null(text: str) -> None:
    assert Recipe().with_settings([f"group_size={text}"]).group_size is None


def test_the_last_of_two_settings_counts() -> None:
    assert Recipe().with_settings(["group_size=16", "group_size=32"]).group_size == 32


def test_the_value_of_a_setting_may_hold_an_equals_sign() -> None:
    assert Recipe().with_settings(["skip=re:a=b"]).skip == ("re:a=b",)


@settings(deadline=None, max_examples=30)
@given(recipes)
def test_any_recipe_can_be_reached_by_settings(recipe: Recipe) -> None:
    values = recipe.to_dict()
    values |= {f"calibration.{key}": value for key, value in values.pop("calibration").items()}
    assert Recipe().with_settings([f"{key}={yaml.safe_dump(value)}" for key, value in values.items()]) == recipe


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("group_size", ["'group_size'", "no '='", "group_size=128"]),
        ("group_sise=128", ["unknown key 'group_sise'", "did you mean 'group_size'?"]),
        ("calibration.sampels=8", ["unknown key 'calibration.sampels'", "did you mean 'samples'?"]),
        ("calibrations.samples=8", ["'calibrations' has no keys inside", "did you mean 'calibration'?"]),
        ("group_size.x=8", ["'group_size' has no keys inside", "calibration.samples=128"]),
        ("calibration.samples.x=8", ["'samples' has no keys inside"]),
        ("skip=[a", ["'skip=[a'", "'[a' is not a YAML value"]),
        ("skip=2001-99-99", ["'skip=2001-99-99'", "is not a YAML value"]),
        ("group_size=many", ["group_size is 'many'", "a whole number"]),
        ("calibration.samples=0", ["calibration.samples is 0", "at least 1"]),
        ("refit=1", ["refit is 1", "true or false"]),
        ("=3", ["unknown key ''"]),
    ],
)
def test_a_setting_that_is_not_understood_is_refused(setting: str, parts: list[str]) -> None:
    with pytest.raises(TernarizeError) as caught:
        Recipe().with_settings([setting])
    for part in parts:
        assert part in str(caught.value)


def test_a_whole_number_may_be_spelled_with_a_point() -> None:
    assert type(Recipe().with_settings(["scale_bits=4.0"]).scale_bits) is int


@pytest.mark.parametrize("key", ["calibration.seed", "distill.seed"])
@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_no_generator_takes_is_refused(key: str, seed: int) -> None:
    with pytest.raises(TernarizeError, match=f"{key} is {seed}, but must be between 0 and"):
        Recipe().with_settings([f"{key}={seed}"])


def test_one_source_of_text_need_be_no_list() -> None:
    assert Recipe().with_text("pydoc").calibration.text == ("pydoc",)
