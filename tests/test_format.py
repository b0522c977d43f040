"""The file contract: the layout in config.json round-trips, and what a reader does not know it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternarize import format as contract
from ternarize.errors import FormatError, TernarizeError
from ternarize.format import FORMAT_VERSIONS, PACKING, QUANT_METHOD, TRIPWIRE, Layout

LAYOUT = Layout(
    blocks="model.layers",
    group_size=64,
    shift=True,
    kept=("model.layers.0.mlp.down_proj",),
    int8={"model.embed_tokens": 1.0},
    int8_group_size=32,
)
CODED = replace(LAYOUT, scale_bits=4, shift_bits=8, group_sizes={"model.layers.1.mlp.down_proj": 32})

layouts = (
    st.builds(
        Layout,
        blocks=st.text(),
        group_size=st.none() | st.integers(1, 10**6),
        shift=st.booleans(),
        kept=st.lists(st.text(), max_size=4).map(tuple),
        int8=st.dictionaries(st.text(), st.floats(1e-3, 1e3), max_size=3),
        int8_group_size=st.integers(1, 10**6),
        scale_bits=st.just(16),
        shift_bits=st.just(16),
        group_sizes=st.dictionaries(st.text(), st.integers(1, 10**6), max_size=3),
    )
    | st.builds(
        lambda bits: replace(LAYOUT, scale_bits=bits[0], shift_bits=bits[1]),
        st.sampled_from([(4, 4), (4, 8), (8, 4), (8, 8)]),
    )
    | st.builds(
        lambda int6: replace(CODED, int6=int6, int8={}), st.dictionaries(st.text(), st.floats(1e-3, 1e3), max_size=3)
    )
)


@settings(deadline=None)
@given(layouts)
def test_a_layout_survives_config_json(layout: Layout) -> None:
    assert Layout.from_config(json.loads(json.dumps(layout.to_config()))) == layout


def test_the_config_has_exactly_this_form() -> None:
    assert LAYOUT.to_config() == {
        "quant_method": "ternarize",
        "format_version": 1,
        "packing": "base3",
        "blocks": "model.layers",
        "group_size": 64,
        "shift": True,
        "kept": ["model.layers.0.mlp.down_proj"],
        "int8": {"model.embed_tokens": 1.0},
        "int8_group_size": 32,
    }


def test_what_version_1_cannot_say_is_written_as_version_2() -> None:
    assert CODED.to_config() == LAYOUT.to_config() | {
        "format_version": 2,
        "scale_bits": 4,
        "shift_bits": 8,
        "group_sizes": {"model.layers.1.mlp.down_proj": 32},
    }
    assert CODED.group_size_of("model.layers.1.mlp.down_proj") == 32
    assert CODED.group_size_of("model.layers.0.mlp.down_proj") == 64


def test_what_version_2_cannot_say_is_written_as_version_3() -> None:
    six = replace(CODED, int6={"lm_head": 1.0})
    assert six.to_config() == CODED.to_config() | {"format_version": 3, "int6": {"lm_head": 1.0}}
    plain = replace(LAYOUT, int6={"lm_head": 1.0}).to_config()
    assert (plain["scale_bits"], plain["shift_bits"], plain["group_sizes"]) == (16, 16, {})
    assert six.tables == {"model.embed_tokens": (8, 1.0), "lm_head": (6, 1.0)}


def test_a_table_has_one_form() -> None:
    config = CODED.to_config() | {"format_version": 3, "int6": {"model.embed_tokens": 1.0}}
    with pytest.raises(FormatError, match=r"model\.embed_tokens in int8 and in int6"):
        Layout.from_config(config)


def test_a_whole_multiplier_is_read_as_a_float() -> None:
    layout = Layout.from_config(LAYOUT.to_config() | {"int8": {"model.embed_tokens": 8}})
    assert type(layout.int8["model.embed_tokens"]) is float


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("quant_method", "gptq", QUANT_METHOD),
        ("quant_method", None, QUANT_METHOD),
        ("format_version", 4, "1, 2, 3"),
        ("format_version", 0, "1, 2, 3"),
        ("format_version", "1", "1, 2, 3"),
        ("format_version", None, "1, 2, 3"),
        ("packing", "base4", PACKING),
        ("packing", None, PACKING),
    ],
)
def test_what_this_reader_does_not_know_is_refused_with_what_it_knows(key: str, value: Any, known: str) -> None:
    with pytest.raises(FormatError) as caught:
        Layout.from_config(LAYOUT.to_config() | {key: value})
    message = str(caught.value)
    assert f"{key} {value!r}" in message
    assert known in message.replace(f"{key} {value!r}", "")


@pytest.mark.parametrize("key", ["format_version", "packing"])
def test_a_newer_file_says_how_to_upgrade(key: str) -> None:
    with pytest.raises(FormatError, match="pip install --upgrade ternarize"):
        Layout.from_config(LAYOUT.to_config() | {key: "newer"})


@pytest.mark.parametrize("key", CODED.to_config().keys())
def test_a_missing_field_is_refused_by_name(key: str) -> None:
    config = CODED.to_config()
    del config[key]
    with pytest.raises(FormatError, match=rf"config\.json.*\b{key}\b"):
        Layout.from_config(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("blocks", None),
        ("blocks", 3),
        ("blocks", ["model.layers"]),
        *[("group_size", value) for value in ("64", 0, -1, 64.0, True, [64])],
        *[("int8_group_size", value) for value in ("64", 0, -1, 64.0, True, None)],
        *[("shift", value) for value in (None, 0, 1, "true")],
        *[("kept", value) for value in (None, 3, "model.layers.0.mlp", [3], [None])],
        *[("int8", value) for value in (None, 3, ["lm_head"], "lm_head", {"lm_head": None}, {"lm_head": "one"})],
        *[("scale_bits", value) for value in (None, 16, 5, "4", True)],
        *[("shift_bits", value) for value in (None, 16, 0, 8.0)],
        *[("group_sizes", value) for value in (None, 3, {"a": 0}, {"a": "64"}, ["a"])],
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_refused(key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        Layout.from_config(CODED.to_config() | {key: value})


def test_a_format_error_is_one_that_the_user_can_meet() -> None:
    assert issubclass(FormatError, TernarizeError)


def described_fields() -> list[str]:
    """The field names of the docstring's table of "quantization_config"."""
    _, _, rest = (contract.__doc__ or "").partition('config.json, "quantization_config":\n\n')
    table, _, _ = rest.partition("\n\n")
    return re.findall(r"^    (\w+)", table, re.MULTILINE)


def test_the_spec_describes_the_fields_that_are_written_and_no_others() -> None:
    assert described_fields() == list(replace(CODED, int6={"lm_head": 1.0}).to_config())


def test_the_spec_states_the_values_that_are_written() -> None:
    spec = contract.__doc__ or ""
    for key, value in (("quant_method", QUANT_METHOD), ("packing", PACKING)):
        assert re.search(rf"^    {key} +{re.escape(json.dumps(value))}$", spec, re.MULTILINE)
    assert (
        f"format versions {', '.join(map(str, FORMAT_VERSIONS[:-1]))} and {FORMAT_VERSIONS[-1]}."
        in spec.splitlines()[0]
    )
    assert re.search(r"^    format_version +1, or 2 ", spec, re.MULTILINE)


def test_the_tripwires_name_says_what_to_do_and_what_kind_of_file_it_pretends_to_be() -> None:
    assert "pip-install-ternarize" in TRIPWIRE
    assert TRIPWIRE.endswith(".safetensors")
