"""Settings: kinds and ranges, names and messages, and the way through JSON and back."""

# pyright: basic

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undiffuse.config import (
    MAX_RESOLUTION,
    RECIPES,
    BadImage,
    BetaSchedule,
    DataConfig,
    Device,
    GuidanceConfig,
    LogConfig,
    LrScheduler,
    ModelConfig,
    Precision,
    PredictionType,
    RunConfig,
    RuntimeConfig,
    SampleConfig,
    Tracker,
    TrainConfig,
    changed,
    flatten,
    override,
    suggestion,
)
from undiffuse.errors import ConfigError

SECTIONS = (DataConfig, ModelConfig, TrainConfig, GuidanceConfig, RuntimeConfig, LogConfig)


def refused(values: Mapping[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        override(RunConfig(), values)
    return str(caught.value)


# --- kinds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("max_train_steps", "12", 12),
        ("max_train_steps", 12.0, 12),
        ("seed", str(2**63 - 1), 2**63 - 1),  # beyond the whole numbers that a float holds
        ("learning_rate", "2e-4", 2e-4),
        ("learning_rate", 1, 1.0),
        ("p_mean", "-0.5", -0.5),
        ("random_flip", True, True),
        ("random_flip", "true", True),
        ("class_conditional", "false", False),
        ("data", "my pictures", "my pictures"),
        ("preset", None, None),
        ("preset", "light", "light"),
        ("channels", "3", 3),
        ("channels", None, None),
        ("val_fraction", "0.25", 0.25),
        ("snr_gamma", None, None),
        ("resolution", "64", (64, 64)),
        ("resolution", 64, (64, 64)),
        ("resolution", "48x40", (48, 40)),
        ("resolution", "48X40", (48, 40)),
        ("resolution", [48, 40], (48, 40)),
        ("resolution", (48, 40), (48, 40)),
        ("resolution", None, None),
        ("resolution", "4", (4, 4)),
        ("resolution", str(MAX_RESOLUTION), (MAX_RESOLUTION, MAX_RESOLUTION)),
        ("device", "cpu", Device.CPU),
        ("mixed_precision", "bf16", Precision.BF16),
        ("lr_scheduler", LrScheduler.LINEAR, LrScheduler.LINEAR),
        ("prediction_type", "v_prediction", PredictionType.V_PREDICTION),
        ("beta_schedule", "squaredcos_cap_v2", BetaSchedule.COSINE),
        ("beta_schedule", "cosine", BetaSchedule.COSINE),
        ("on_bad_image", "error", BadImage.ERROR),
        ("report_to", "tensorboard", Tracker.TENSORBOARD),
    ],
)
def test_what_is_typed_becomes_the_option_s_kind(name: str, typed: object, value: object) -> None:
    config = override(RunConfig(), {name: typed})
    section = next(s for s in SECTIONS if name in {f.name for f in fields(s)})
    part = next(getattr(config, f.name) for f in fields(config) if f.default_factory is section)
    got = getattr(part, name)
    assert got == value
    assert type(got) is type(value)


def test_class_labels_are_one_word_or_many() -> None:
    assert changed(SampleConfig(), {"class_label": "cat"}).class_label == ("cat",)
    assert changed(SampleConfig(), {"class_label": ["cat", 3]}).class_label == ("cat", "3")
    with pytest.raises(ConfigError, match=r"^class_label must be .*; got None$"):
        changed(SampleConfig(), {"class_label": None})


ABSURD: list[tuple[str, object, str]] = [
    ("max_train_steps", "0", "at least 1"),
    ("max_train_steps", -3, "at least 1"),
    ("max_train_steps", "1e3", "a whole number"),
    ("max_train_steps", 2.5, "a whole number"),
    ("max_train_steps", float("nan"), "a whole number"),
    ("max_train_steps", float("inf"), "a whole number"),
    ("max_train_steps", True, "a whole number"),
    ("max_train_steps", None, "a whole number"),
    ("max_train_steps", "", "a whole number"),
    ("max_train_steps", [1], "a whole number"),
    ("max_train_steps", "1" + 400 * "0", "usual size"),
    ("max_train_steps", 2**63, "usual size"),
    ("train_batch_size", 0, "at least 1"),
    ("gradient_accumulation_steps", 0, "at least 1"),
    ("seed", "-1", "at least 0"),
    ("seed", str(2**63), "below"),
    ("seed", 2**64, "below"),
    ("learning_rate", "nan", "above 0"),
    ("learning_rate", "inf", "finite"),
    ("learning_rate", "1e400", "finite"),
    ("learning_rate", 10**400, "a number"),
    ("learning_rate", 0, "above 0"),
    ("learning_rate", "-1", "above 0"),
    ("learning_rate", "abc", "a number"),
    ("learning_rate", None, "a number"),
    ("learning_rate", False, "a number"),
    ("learning_rate", {"a": 1}, "a number"),
    ("lr_warmup_steps", -1, "at least 0"),
    ("adam_beta1", 1, "below 1"),
    ("adam_beta2", -0.1, "at least 0"),
    ("adam_epsilon", 0, "above 0"),
    ("adam_weight_decay", -1e-9, "at least 0"),
    ("max_grad_norm", 0, "above 0"),
    ("label_dropout", 1.01, "at most 1"),
    ("augment", 12, "at most 1"),
    ("ema_length", 0.3, "at most 0.25"),
    ("ema_length", 0.0, "at least 0.005"),
    ("dropout", 1.0, "below 1"),
    ("num_train_timesteps", 1, "at least 2"),
    ("p_mean", "-inf", "finite"),
    ("p_std", 0, "above 0"),
    ("snr_gamma", 0.0, "above 0"),
    ("val_fraction", 0, "above 0"),
    ("val_fraction", 1, "below 1"),
    ("channels", 0, "at least 1"),
    ("checkpointing_steps", 0, "at least 1"),
    ("checkpoints_total_limit", 1, "at least 2"),
    ("sample_every", 0, "at least 1"),
    ("num_samples", 0, "at least 1"),
    ("random_flip", "yes", "true or false"),
    ("random_flip", 1, "true or false"),
    ("random_flip", None, "true or false"),
    ("data", "", "a text"),
    ("data", 3, "a text"),
    ("preset", "", "a text"),
    ("resolution", "0", "from 4 to 8192"),
    ("resolution", "3", "from 4 to 8192"),
    ("resolution", "9999999x2", "from 4 to 8192"),
    ("resolution", "-64", "from 4 to 8192"),
    ("resolution", "abc", "N or HxW"),
    ("resolution", "", "N or HxW"),
    ("resolution", "64x", "N or HxW"),
    ("resolution", "1x2x3", "N or HxW"),
    ("resolution", "6.5", "N or HxW"),
    ("resolution", True, "N or HxW"),
    ("resolution", [], "N or HxW"),
    ("resolution", 64.5, "N or HxW"),
    ("resolution", float("nan"), "N or HxW"),
    ("device", "gpu", "auto, cpu, cuda, mps"),
    ("device", None, "auto, cpu, cuda, mps"),
    ("mixed_precision", "fp16", "auto, no, bf16"),
    ("prediction_type", "v", "karras, epsilon"),
    ("beta_schedule", ["linear"], "karras, linear"),
    ("on_bad_image", "ignore", "skip, error"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), ABSURD)
def test_absurd_values_are_refused_by_name_value_and_remedy(
    name: str, value: object, wanted: str
) -> None:
    message = refused({name: value})
    assert message.startswith(f"{name} must be ")
    assert wanted in message
    shown = message.rpartition("; got ")[2]
    assert shown in (str(value), repr(value)) or float(shown) == float(str(value))
    assert "\n" not in message


@pytest.mark.parametrize("section", [*SECTIONS, SampleConfig])
def test_limits_hold_for_every_number_without_parsing_too(section: Any) -> None:
    """The Python road makes the dataclasses directly; each bound is tried just outside."""
    tried = 0
    for one in fields(section):
        outside = {
            "at_least": lambda bound: bound - 1,
            "at_most": lambda bound: bound + 1,
            "above": lambda bound: bound,
            "below": lambda bound: bound,
        }
        for kind, beyond in outside.items():
            if kind in one.metadata:
                value = beyond(one.metadata[kind])
                with pytest.raises(ConfigError, match=rf"^{one.name} must be .*; got {value}$"):
                    section(**{one.name: value})
                tried += 1
        if isinstance(one.default, float):
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(ConfigError, match=f"^{one.name} must be "):
                    section(**{one.name: value})
                tried += 1
    assert tried > 0 or section in (RuntimeConfig,)


def test_the_limits_themselves_are_legal() -> None:
    TrainConfig(
        max_train_steps=1,
        train_batch_size=1,
        lr_warmup_steps=0,
        adam_beta1=0.0,
        label_dropout=1.0,
        ema_length=0.25,
        seed=2**63 - 1,
    )
    LogConfig(checkpointing_steps=1, checkpoints_total_limit=2, sample_every=1, num_samples=1)
    SampleConfig(eta=1.0, guidance_scale=-1.0)


def test_more_parts_than_pictures_are_refused() -> None:
    message = refused({"train_batch_size": 2, "gradient_accumulation_steps": 3})
    assert "gradient_accumulation_steps 3" in message
    assert "train_batch_size 2" in message
    with pytest.raises(ConfigError):
        replace(TrainConfig(gradient_accumulation_steps=8), train_batch_size=4)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning-rate", "learning_rate"),
        ("lerning_rate", "learning_rate"),
        ("train_batchsize", "train_batch_size"),
        ("resolutoin", "resolution"),
        ("max_train_step", "max_train_steps"),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, meant: str) -> None:
    message = refused({name: 1})
    assert repr(name) in message
    assert message.endswith(f"Did you mean {meant!r}?")


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    assert refused({"zzzzzz": 1}) == "unknown setting 'zzzzzz'"
    assert suggestion("zzzzzz", ["seed"]) == ""


def test_names_belong_to_one_section_only() -> None:
    names = [one.name for section in SECTIONS for one in fields(section)]
    assert len(names) == len(set(names)) == len(flatten(RunConfig()))


def test_every_option_has_a_line_of_help() -> None:
    for section in (*SECTIONS, SampleConfig):
        for one in fields(section):
            assert len(one.metadata["help"]) > 3, one.name


def test_override_leaves_the_rest_and_the_original_alone() -> None:
    before = RunConfig()
    after = override(before, {"seed": "7", "dropout": 0.2})
    assert before == RunConfig()
    assert after == replace(
        before, train=replace(before.train, seed=7), model=replace(before.model, dropout=0.2)
    )
    assert override(before, {}) == before


# --- through JSON and back ----------------------------------------------------------------------


def values_of(one: Any) -> st.SearchStrategy[Any]:
    """Legal values of a field, by its type and limits."""
    kind, limits = str(one.type), one.metadata
    if isinstance(one.default, StrEnum):
        return st.sampled_from(list(type(one.default)))
    optional = {"prediction_type": PredictionType, "beta_schedule": BetaSchedule}
    if one.name in optional:
        return st.none() | st.sampled_from(optional[one.name])
    if "tuple[int" in kind:
        side = st.integers(4, MAX_RESOLUTION)
        return st.none() | st.tuples(side, side)
    if "bool" in kind:
        return st.booleans()
    if "str" in kind:
        return st.text(min_size=1)
    plain: st.SearchStrategy[Any]
    if "int" in kind:
        most = min(limits.get("at_most", 2**40), limits.get("below", 2**41) - 1)
        plain = st.integers(math.ceil(limits["at_least"]), most)
    else:
        low, high = limits.get("at_least", limits.get("above")), limits.get("at_most")
        plain = st.floats(
            -1e9 if low is None else low,
            limits.get("below", 1e9) if high is None else high,
            exclude_min="above" in limits,
            exclude_max="below" in limits,
        )
    return st.none() | plain if "None" in kind else plain


@st.composite
def settings(draw: Any) -> dict[str, Any]:
    every = [one for section in SECTIONS for one in fields(section)]
    chosen = draw(st.lists(st.sampled_from(every), unique_by=lambda one: one.name))
    values = {one.name: draw(values_of(one)) for one in chosen}
    if {"train_batch_size", "gradient_accumulation_steps"} & values.keys():
        parts = values.get("gradient_accumulation_steps") or 1
        values["train_batch_size"] = max(parts, values.get("train_batch_size", 1))
    return values


@given(settings())
def test_what_is_flattened_as_json_comes_back_the_same(values: dict[str, Any]) -> None:
    config = override(RunConfig(), values)
    flat = flatten(config)
    again = override(RunConfig(), json.loads(json.dumps(flat, allow_nan=False)))
    assert again == config
    assert all(flat[name] == plain(value) for name, value in values.items())


def plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(sorted(flatten(RunConfig()))), anything)
def test_any_value_is_taken_or_refused_in_one_line(name: str, value: object) -> None:
    """Z3: no value of a setting ends in anything but a ConfigError."""
    message, config = outcome(name, value)
    assert message.startswith((name, "gradient_accumulation_steps")) != (config is not None)
    assert config is None or override(RunConfig(), flatten(config)) == config


def outcome(name: str, value: object) -> tuple[str, RunConfig | None]:
    try:
        return "", override(RunConfig(), {name: value})
    except ConfigError as error:
        return str(error), None


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_settings_and_the_user_comes_first(name: str) -> None:
    plain = override(RunConfig(), {**RECIPES[name].settings})
    assert override(RunConfig(), {"preset": name}) == plain
    mine = override(RunConfig(), {"preset": name, "max_train_steps": 7, "dropout": 0.2})
    assert (mine.train.max_train_steps, mine.model.dropout) == (7, 0.2)
    assert mine.model.preset == plain.model.preset != name
    again = override(mine, flatten(mine))
    assert again == mine
