"""Suggestions for mistyped names; singular and plural of counted nouns; commands in messages."""

import re
import shlex

import pytest
from commands import ROOT

from scalekd_cache.convert.backbone import find_export
from scalekd_cache.errors import UserError, closest_names, counted, join_or, shell_command, unknown_name

MODELS = ["resnet18", "resnet50", "resnet50d", "vit_small_patch16_224", "gcvit_small", "swin_large_patch4_window7_224"]


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("resnet5", "resnet50"),
        ("resent50", "resnet50"),
        ("vit_small", "vit_small_patch16_224"),
        ("swin_large", "swin_large_patch4_window7_224"),
        ("gcvit", "gcvit_small"),
    ],
)
def test_the_nearest_comes_first(typed, first):
    assert closest_names(typed, MODELS).startswith(first)


def test_a_dotted_option_is_found_by_its_last_part():
    options = ["--run", "--optim.lr", "--optim.min_lr", "--teacher.batch_size", "--train.compile"]
    assert closest_names("--lr", options) == "--optim.lr"
    assert closest_names("--batch-size", options) == "--teacher.batch_size"


def test_lists_in_words():
    assert [join_or(list(names)) for names in ("", "a", "ab", "abc")] == ["", "a", "a or b", "a, b or c"]
    assert closest_names("zzz", ["b", "a"]) == "a or b", "none is close: all of them"


def test_a_mistype_is_one_line():
    error = unknown_name("model", "resnet5", MODELS, "--student")
    assert isinstance(error, UserError)
    assert str(error) == "there is no model resnet5: did you mean resnet50, resnet50d or resnet18? (--student)"
    assert str(unknown_name("cache", "x", [], "--cache")) == "there is no cache x (--cache)"
    many = [f"name{number}" for number in range(100)]
    assert str(unknown_name("model", "zzz", many, "--student")) == "there is no model zzz (--student)", (
        "a hundred are no help"
    )


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "step", "0 steps"),
        (1, "epoch", "1 epoch"),
        (2, "epoch", "2 epochs"),
        (1438, "image", "1,438 images"),
        (1, "class", "1 class"),
        (3, "micro-batch", "3 micro-batches"),
        (2, "loader worker", "2 loader workers"),
    ],
)
def test_a_number_has_its_noun_in_singular_or_plural(count, noun, text):
    assert counted(count, noun) == text


def test_a_command_in_a_message_can_be_pasted_when_a_path_has_spaces(tmp_path):
    words = ["scalekd", "cache-teacher", "--pixels-from", "my caches/a", "--views", "2"]
    assert shlex.split(shell_command("cache-teacher", pixels_from="my caches/a", views=2)) == words
    assert shell_command("cache-teacher", data="demo", cache=None) == "scalekd cache-teacher --data demo"
    run = tmp_path / "my runs" / "it's one"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    with pytest.raises(UserError) as raised:
        find_export(run)
    assert shlex.split(str(raised.value).rpartition("checkpoint: ")[2]) == ["scalekd", "export", "--run", str(run)]


def test_commands_in_messages_are_made_by_one_function():
    """A path that an f-string puts into a command is not quoted."""
    unquoted = re.compile(r"scalekd [a-z-]+ --(cache|run|backbone|pixels-from|data|init|out|url) \{(?!shlex)")
    files = [file for room in ("scalekd_cache", "pipelines") for file in (ROOT / room).rglob("*.py")]
    assert [str(file) for file in files if unquoted.search(file.read_text(encoding="utf-8"))] == []
