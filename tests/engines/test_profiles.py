"""Optimisation profiles: defaults, what the user fixes, and what is refused."""

import pytest

from umv2_export.engines.profiles import ValueInfo, plan_profiles
from umv2_export.errors import InputRejected, InvalidRequest

INPUTS = [
    ValueInfo("input_ids", "int64", ("batch", "sequence")),
    ValueInfo("attention_mask", "int64", ("batch", "total_sequence")),
    ValueInfo("past_key_values.0.key", "float", ("batch", 4, "past_sequence", 16)),
]


def planned(**shapes: str) -> dict[str, dict[str, dict[str, list[int]]]]:
    """Profile -> input -> bound -> shape, of a model trained for 256 positions; shapes: a word each."""
    profiles = plan_profiles(INPUTS, 256, {bound: text.split() for bound, text in shapes.items()})
    return {profile.name: profile.shapes(INPUTS) for profile in profiles}


def test_prefill_takes_up_to_the_trained_length_on_any_past() -> None:
    prefill = planned()["prefill"]
    assert prefill["input_ids"] == {"min": [1, 1], "opt": [1, 128], "max": [8, 256]}
    assert prefill["attention_mask"] == {"min": [1, 1], "opt": [1, 128], "max": [8, 511]}
    assert prefill["past_key_values.0.key"] == {"min": [1, 4, 0, 16], "opt": [1, 4, 0, 16], "max": [8, 4, 255, 16]}


def test_decode_takes_one_token() -> None:
    decode = planned()["decode"]
    assert decode["input_ids"] == {"min": [1, 1], "opt": [1, 1], "max": [8, 1]}
    assert decode["attention_mask"] == {"min": [1, 1], "opt": [1, 129], "max": [8, 256]}
    assert decode["past_key_values.0.key"] == {"min": [1, 4, 0, 16], "opt": [1, 4, 128, 16], "max": [8, 4, 255, 16]}


def test_a_shape_of_one_input_holds_for_all() -> None:
    shapes = planned(max="input_ids:8x32 past_key_values.0.key:8x4x64x16")
    assert shapes["prefill"]["input_ids"]["max"] == [8, 32]
    assert shapes["prefill"]["attention_mask"]["max"] == [8, 96]
    assert shapes["decode"]["past_key_values.0.key"]["max"] == [8, 4, 64, 16]
    assert shapes["decode"]["attention_mask"]["max"] == [8, 65]


def test_the_mask_says_what_is_cached() -> None:
    shapes = planned(opt="input_ids:2x16 attention_mask:2x20")
    assert shapes["prefill"]["past_key_values.0.key"]["opt"] == [2, 4, 4, 16]


def test_the_mask_says_what_is_new() -> None:
    shapes = planned(opt="past_key_values.0.key:2x4x4x16 attention_mask:2x20")
    assert shapes["prefill"]["input_ids"]["opt"] == [2, 16]


def test_bounds_that_are_not_given_move_with_those_that_are() -> None:
    prefill = planned(max="input_ids:1x16")["prefill"]
    assert prefill["input_ids"] == {"min": [1, 1], "opt": [1, 16], "max": [1, 16]}
    prefill = planned(min="input_ids:8x512")["prefill"]
    assert prefill["input_ids"] == {"min": [8, 512], "opt": [8, 512], "max": [8, 512]}


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_models_have_profiles(length: int) -> None:
    for profile in plan_profiles(INPUTS, length, {}):
        for shapes in profile.shapes(INPUTS).values():
            assert all(a <= b <= c for a, b, c in zip(shapes["min"], shapes["opt"], shapes["max"], strict=True))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"max": "tokens:1x16"}, "names 'tokens', which is not an input"),
        ({"max": "input_ids"}, "not a shape of an input"),
        ({"max": "input_ids:1x-16"}, "not a shape of an input"),
        ({"max": "input_ids:1x16x2"}, "has 3 axes, the input has 2: batch x sequence"),
        ({"max": "past_key_values.0.key:1x8x16x16"}, "has 8 where 4 must stand"),
        ({"max": "input_ids:2x16 attention_mask:3x16"}, "has 3 where 2 must stand"),
        ({"max": "input_ids:2x16 input_ids:2x17"}, "has 17 where 16 must stand"),
        ({"max": "attention_mask:1x64"}, "not how many of them are cached"),
        (
            {"max": "input_ids:1x16 past_key_values.0.key:1x4x8x16 attention_mask:1x25"},
            "8 cached and 16 new positions, and attention_mask 25",
        ),
        ({"max": "input_ids:1x16 attention_mask:1x8"}, "past_sequence -8, the graph takes 0 or more"),
        ({"min": "input_ids:0x16"}, "batch 0, the graph takes 1 or more"),
        ({"min": "input_ids:1x0"}, "sequence 0, the graph takes 1 or more"),
        ({"min": "input_ids:1x32", "max": "input_ids:1x16"}, "sequence has min 32, opt 16, max 16"),
        ({"opt": "input_ids:1x32", "max": "input_ids:1x16"}, "sequence has min 1, opt 32, max 16"),
    ],
)
def test_a_shape_that_cannot_be_followed_is_named(shapes: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        planned(**shapes)


def test_an_axis_that_no_bundle_has_is_rejected() -> None:
    with pytest.raises(InputRejected, match="unknown axis 'frames'"):
        plan_profiles([ValueInfo("input_ids", "int64", ("batch", "frames"))], 256, {})
