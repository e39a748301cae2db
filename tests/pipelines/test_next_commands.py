"""Commands printed after `next:` must work when copied unchanged."""

import subprocess
import sys

import pytest
from commands import ENV, ROOT, make
from image_files import folder_tree

from scalekd_cache.store.manifest import read_manifest

NAMES = [f"{kind}/{number}.png" for kind in ("ant", "bee") for number in range(12)]


def next_of(output):
    """The commands that an output suggests."""
    return [line.removeprefix("next: ") for line in output.splitlines() if line.startswith("next: ")]


def typed(command, status=0):
    """Run a printed command in a shell, for one epoch."""
    done = subprocess.run(
        f"{command} EPOCHS=1 WORKERS=0", shell=True, cwd=ROOT, env=ENV, text=True, capture_output=True
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.ci_slow
@pytest.mark.parametrize(
    ("variables", "views"),
    [
        ({"SET": "views.flip_probability=0.5 cache.samples_per_shard=8"}, {"flip_probability": 0.5}),
        (
            {"SET": "views.size=96 views.randaugment_ops=1", "PIXELS": "replayed"},
            {"size": 96, "randaugment_ops": 1},
        ),
    ],
)
def test_distill_trains_on_the_views_of_the_cache_as_advised(tmp_path, variables, views):
    """Fewer images than the recipe's batch, other view options than the recipe's, and a student that was checked."""
    data, cache = folder_tree(tmp_path / "data", train=NAMES), tmp_path / "cache"
    options = {"DATA": data, "CACHE": cache, "RECIPE": "demo", "VIEWS": 1, "PRETRAINED": 0, "STUDENT": "test_resnet"}
    output = make("cache-teacher", **options, **variables)
    kept = read_manifest(cache).facts.view_recipe
    assert {name: kept[name] for name in views} == views
    assert f"because the dataset has only {len(NAMES)} images" in output
    (command,) = next_of(output)
    assert next_of(make("cache-teacher", **options, **variables)) == [command]  # a finished cache suggests the same
    command += f" RUN={tmp_path / 'run'}"
    assert "top-1" in typed(command)
    assert "is finished; nothing to do" in typed(command)
    assert "the cache's views differ from those of its recipe demo: views." in typed(f"{command} RECIPE=demo")
    assert "remove --recipe to train" in typed(f"{command} RECIPE=cifar10", status=2)


@pytest.mark.ci_slow
@pytest.mark.parametrize("size", [384, 96])
def test_a_teacher_of_another_image_size(tmp_path, size):
    """At its own size, and at a size that differs from both the recipe's and its own."""
    data, cache = folder_tree(tmp_path / "data", train=NAMES[:3] + NAMES[-3:]), tmp_path / "cache"
    options = {"DATA": data, "CACHE": cache, "TEACHER": "vit_tiny_patch16_384", "STUDENT": "test_resnet"}
    output = make("cache-teacher", **options, VIEWS=1, PRETRAINED=0, SET=f"views.size={size}")
    assert read_manifest(cache).facts.teacher["spec"]["image_size"] == size
    (command,) = next_of(output)
    assert "top-1" in typed(f"{command} RUN={tmp_path / 'run'}")


@pytest.mark.ci_slow
def test_the_advice_for_too_large_a_batch_works_as_printed(tmp_path):
    data, cache = folder_tree(tmp_path / "data", train=NAMES), tmp_path / "cache"
    output = make("cache-teacher", DATA=data, CACHE=cache, RECIPE="demo", VIEWS=1, PRETRAINED=0)
    assert "STUDENT=resnet50 " in next_of(output)[0]
    command = f"make distill VENV=none PYTHON={sys.executable} STUDENT=test_resnet CACHE={cache} RUN={tmp_path / 'run'}"
    refused = typed(command, status=2)
    assert "larger than the dataset" in refused
    advice = refused.rpartition("use a smaller batch, for example ")[2].splitlines()[0]
    option, batch = advice.split()
    assert option == "--batch"
    typed(f"{command} BATCH={batch}")
