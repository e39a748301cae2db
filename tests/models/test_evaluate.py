"""Accuracy: reference counts, the images of each rank, images that cannot be decoded."""

import json

import numpy as np
import pytest
import torch
from image_files import folder_tree, source_of, write
from PIL import Image
from small_run import FACTS

from pipelines.evaluate import main
from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.config.stage2 import DistillConfig, StudentConfig
from scalekd_cache.convert.timm_export import export_student
from scalekd_cache.data.source import open_cache_source, open_source
from scalekd_cache.errors import UserError
from scalekd_cache.models.evaluate import Tally, evaluate, tally
from scalekd_cache.models.student import build_student
from scalekd_cache.reports.run_data import RunReport, load_validation_images
from scalekd_cache.training.run_files import read_facts
from scalekd_cache.training.run_folder import RunFolder

CPU = torch.device("cpu")


def test_counts_by_hand():
    logits = torch.tensor(
        [[9, 8, 7, 6, 5, 4, 3.0], [9, 8, 7, 6, 5, 4, 3.0], [9, 8, 7, 6, 5, 4, 3.0], [0, 0, 0, 0, 0, 0, 1.0]]
    )
    assert tally(logits, torch.tensor([0, 4, 5, 6])) == Tally(2, 3, 4, 0)
    assert tally(logits[:2], torch.tensor([1, 6])) == Tally(0, 1, 2, 0)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_fewer_than_five_classes(classes):
    logits = torch.eye(classes)
    assert tally(logits, torch.arange(classes)) == Tally(classes, None, classes, 0)
    assert tally(logits, torch.arange(classes).roll(1)) == Tally(0, None, classes, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_nan_have_no_accuracy(dtype):
    logits = torch.zeros(3, 4, dtype=dtype)
    assert tally(logits - torch.inf, torch.zeros(3, dtype=torch.int64)).images == 3
    logits[2, 1] = torch.nan
    with pytest.raises(UserError, match="the model's logits contain NaN"):
        tally(logits, torch.zeros(3, dtype=torch.int64))


def test_percentages():
    both = Tally(1, 2, 4, 1).plus(Tally(2, 4, 4, 0))
    assert both == Tally(3, 6, 8, 1)
    assert (both.top1_percent, both.top5_percent) == (37.5, 75.0)
    assert Tally(0, 0, 0, 3).top1_percent == 0


def guess(images):
    """Logits that depend on the image content."""
    return images.float().mean((1, 2, 3))[:, None] * torch.arange(1, 11) % 7


def test_shares_of_ranks_add_up():
    source = open_source(DataConfig(max_samples=61), "val")
    whole = evaluate(guess, source, 32, CPU)
    assert whole.images == 61
    assert 0 < whole.top1 < whole.top5 < 61
    for world_size in (2, 3):
        shares = [
            evaluate(guess, source, 32, CPU, rank=rank, world_size=world_size, batch_size=7, workers=rank % 2)
            for rank in range(world_size)
        ]
        assert shares[0].plus(shares[1]).plus(shares[2] if world_size == 3 else Tally(0, 0, 0, 0)) == whole


def test_unreadable_images_are_counted(tmp_path):
    root = folder_tree(tmp_path, val=[f"ant/{n}.png" for n in range(5)] + ["bee/1.png"])
    for number in (0, 1, 2):
        write(root / "val" / "ant" / f"{number}.png", b"nothing")
    batches = []

    def predict(images):
        assert images.dtype == torch.uint8
        batches.append(tuple(images.shape))
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)

    lost: list[int] = []  # some batches have no readable image
    result = evaluate(predict, source_of(root, "val"), 32, CPU, batch_size=1, on_unreadable=lost.extend)
    assert result == Tally(2, None, 3, 3)
    assert {source_of(root, "val").samples[index].key for index in lost} == {"ant/0", "ant/1", "ant/2"}
    assert batches == [(1, 3, 32, 32)] * 3
    assert evaluate(predict, source_of(root, "val"), 32, CPU) == result


def pictures(root, classes):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def exported(folder, names):
    config = StudentConfig(name="test_resnet")
    student = build_student(config, num_classes=3, image_size=32)
    export_student(student, config, folder, image_size=32, class_names=names)


@pytest.mark.parametrize("place", [".", "student"])
@pytest.mark.parametrize("names", [["a", "b", "c"], []])
def test_an_exported_or_imported_student_without_a_run(tmp_path, capsys, place, names):
    """`import-upstream` writes student/ without class names."""
    exported(tmp_path / "out" / place, names)
    main({"run": str(tmp_path / "out"), "data": str(pictures(tmp_path / "data", "abc")), "device": "cpu", "json": True})
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 6
    assert facts["top5"] is None


def test_exported_students_that_cannot_be_judged(tmp_path):
    folder = tmp_path / "out"
    exported(folder, ["a", "b", "c"])
    with pytest.raises(UserError, match="set --data"):
        main({"run": str(folder)})
    for number, classes in enumerate(("abd", "ab")):
        with pytest.raises(UserError, match="different classes"):
            main({"run": str(folder), "data": str(pictures(tmp_path / str(number), classes))})
    data = str(pictures(tmp_path / "data", "abc"))
    description = (folder / "config.json").read_text()
    (folder / "config.json").write_text(description.replace("test_resnet", "resnet18"))
    with pytest.raises(UserError, match="do not match the model"):
        main({"run": str(folder), "data": data})
    (folder / "config.json").write_text(description.replace('"mean"', '"average"'))
    with pytest.raises(UserError, match="mean: missing"):
        main({"run": str(folder), "data": data})
    (folder / "config.json").write_text(description)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")  # never opened
    with pytest.raises(UserError, match=r"model\.safetensors"):
        main({"run": str(folder), "data": data})


def test_a_recorded_dataset_that_is_gone(tmp_path):
    """The message does not blame the user's command, and --data opens the new path."""
    run = tmp_path / "run"
    exported(run / "export", ["a", "b", "c"])
    folder = RunFolder(run, to_plain(DistillConfig(student=StudentConfig(name="test_resnet"))))
    old = str(tmp_path / "photos")
    folder.write_facts({**FACTS, "image_size": 32, "class_names": ["a", "b", "c"], "data": {"source": old}})
    with pytest.raises(UserError) as error:
        main({"run": str(run), "device": "cpu"})
    assert f"the dataset is not at the path stored in the run {run}" in str(error.value)
    assert f"got: no folder or file {old}" in str(error.value)
    assert "set its current path with --data" in str(error.value)
    with pytest.raises(UserError, match="not at the path stored in the cache"):
        open_cache_source({"source": old}, None, "train")
    main({"run": str(run), "data": str(pictures(tmp_path / "renamed", "abc")), "device": "cpu"})


@pytest.mark.parametrize(
    ("classes", "text"), [("acb", None), ("abd", "different classes"), ("ab", "different classes"), ("", "no labels")]
)
def test_a_run_is_not_evaluated_on_other_classes(tmp_path, capsys, classes, text):
    """Other names, one class less, no labels; the report of runs neither."""
    run = tmp_path / "run"
    exported(run / "export", ["a", "b", "c"])
    folder = RunFolder(run, to_plain(DistillConfig(student=StudentConfig(name="test_resnet"))))
    folder.write_facts({**FACTS, "image_size": 32, "class_names": ["a", "b", "c"]})
    data = pictures(tmp_path / "data", classes)
    if not classes:
        folder_tree(data, ["1.png", "2.png"], ["3.png"])
    given, report = {"run": str(run), "data": str(data), "device": "cpu"}, RunReport(data=str(data))
    if text is None:
        main(given)
        assert "of 6 images" in capsys.readouterr().out
        assert load_validation_images(run, read_facts(run), report, [])
        return
    with pytest.raises(UserError, match=text):
        main(given)
    with pytest.raises(UserError, match=text):
        load_validation_images(run, read_facts(run), report, [])


def test_top_5_says_nothing_where_there_are_at_most_five_classes():
    few, many = tally(torch.eye(5), torch.arange(5)), tally(torch.eye(6), torch.arange(6))
    assert (few.top5, few.top5_percent, few.accuracies) == (None, None, "top-1 100.00%")
    assert many.accuracies == "top-1 100.00%, top-5 100.00%"
    assert few.plus(few) == Tally(10, None, 10, 0)
    assert Tally(0, 0, 0, 0).plus(few).plus(Tally(0, 0, 0, 2)) == Tally(5, None, 5, 2)


def test_an_evaluation_ends_when_it_is_told_to():
    source = open_source(DataConfig(source="demo"), "val")
    batches = []
    found = evaluate(
        lambda images: torch.zeros(len(images), 10), source, 16, CPU, batch_size=8,
        on_batch=lambda logits, labels: batches.append(len(labels)), stop=lambda: len(batches) == 2,
    )  # fmt: skip
    assert found.images == 16
