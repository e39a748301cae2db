"""Numbers that no option accepts: NaN, infinity, negative ones, and those that libraries cannot represent."""

import math
import types
import typing

import pytest

from pipelines.__main__ import SCALEKD
from scalekd_cache.config.options import build, options_of
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.errors import UserError

REQUIRED = {"to": "p", "url": "u", "ckpt": "f", "out": "o", "run": "r", "data_license": "mit",
            "teacher_license": "mit", "backbone": "b", "init": "i", "teacher": "t"}  # fmt: skip
CLASSES = list(dict.fromkeys(one for command in SCALEKD.commands.values() for one in command.config_classes))


def numbers_of(config_class):
    """Name and type (int or float) of every option that takes one number."""
    for option in options_of(config_class):
        kind = option.info.annotation
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        for one in {int, float} & set(kinds):
            yield option.name, one


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda one: one.__name__)
def test_no_option_of_a_command_takes_a_number_that_no_computation_can_use(config_class):
    names = {option.name for option in options_of(config_class)}
    needed = {name: value for name, value in REQUIRED.items() if name in names}
    needed |= {"cache": "c"} if config_class.__name__ == "PublishConfig" else {}
    build(config_class, needed)
    for name, kind in numbers_of(config_class):
        for text in ("nan", "inf", "-inf", "-1", "1e39" if kind is float else "9223372036854775808"):
            with pytest.raises(UserError, match=name):
                build(config_class, needed, {name: text})


@pytest.mark.parametrize("name", ["views.crop_ratio", "views.erase_ratio"])
def test_a_range_does_not_end_at_infinity(name):
    config_class = SCALEKD.commands["cache-teacher"].config_classes[0]
    with pytest.raises(UserError, match=f"invalid value for {name}"):
        build(config_class, {name: "[0.5,.inf]"})
    with pytest.raises(UserError, match=f"invalid value for {name}"):
        build(config_class, {name: (0.5, math.inf)})


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("optim.warmup_start", 1.5, 1),
        ("optim.min_lr", 2, 0.01),
        ("optim.step_epochs", 0, 1),
        ("train.seeds", "0,99999999999999999999", "0,9223372036854775807"),
        ("train.timeout_minutes", 1e300, 1e6),
        ("follow_timeout_minutes", 1e300, 1e6),
        ("remote.total_s", 1e300, 1e7),
        ("remote.timeout_s", 1e300, 1e7),
        ("remote.backoff_s", 1e9, 30),
    ],
)
def test_numbers_that_end_a_run_later_are_refused_first(name, bad, good):
    build(DistillConfig, {name: good})
    with pytest.raises(UserError, match=f"invalid value for {name}"):
        build(DistillConfig, {name: bad})


@pytest.mark.parametrize("name", ["data.source", "cache.path", "teacher.weights"])
def test_text_that_is_not_utf_8_is_refused(name):
    config_class = SCALEKD.commands["cache-teacher"].config_classes[0]
    with pytest.raises(UserError, match=f"the value of option {name} is not valid UTF-8"):
        build(config_class, {name: "pictures\udcff"})
