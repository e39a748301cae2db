"""The how-to guides and examples/: every block runs, and the guides show the code of the examples."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torchvision
from commands import ENV, LIMIT_S, ROOT, execute
from documented import check_scalekd
from image_files import folder_tree, shard
from safetensors.torch import load_file, save_file
from small_cache import CPU, options, shared_cache
from timm import create_model
from upstream_students import paper_student

from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.config.stage1 import DataConfig, TeacherConfig
from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.convert.formats import export_file
from scalekd_cache.convert.timm_export import export_student
from scalekd_cache.data.source import open_source
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student
from scalekd_cache.models.tail import TailParts, load_tail, register_family, tail_bytes
from scalekd_cache.models.teacher import check_tail, load_teacher, split_tail
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.custom_loop import CachedTargets, ScaleKDLoss, timm_student

DOCS = ROOT / "docs"
PAGES = [*sorted((DOCS / "guides").glob("*.md")), *(DOCS / name for name in ("tutorial.md", "REPORTS.md", "REMOTE.md"))]
BLOCKS = {page.stem: re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for page in PAGES}
PYTHON = {name: [text for kind, text in blocks if kind == "python"] for name, blocks in BLOCKS.items()}
LINES = {
    name: [line for _, text in blocks for line in text.replace("\\\n", " ").splitlines()]
    for name, blocks in BLOCKS.items()
}
COMMANDS = [(name, line) for name, lines in LINES.items() for line in lines if line.startswith("scalekd ")]


def test_the_guides_have_commands():
    assert {name for name, _ in COMMANDS} >= {"data", "teacher", "take-away", "tutorial", "REPORTS", "REMOTE"}
    assert not [line for lines in LINES.values() for line in lines if line.startswith("make ")]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_is_understood(page, command):
    check_scalekd(command)


def test_the_guides_show_the_examples():
    shown = {"my_teacher": PYTHON["teacher"][0], "plain_pytorch": PYTHON["students"][0],
             "my_student": PYTHON["students"][2], "webdataset_pipeline": PYTHON["students"][3],
             "huggingface_datasets": PYTHON["students"][4]}  # fmt: skip
    for name, text in shown.items():
        assert text.strip() in (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")


def output_of_example(name, *words):
    command = [sys.executable, str(ROOT / "examples" / name), str(shared_cache().root), *map(str, words)]
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S, env=env).stdout


def run_example(name, *words):
    first, _, rest = (said := output_of_example(name, *words)).partition("\n")
    assert first.startswith("loss weights: spatial 0.005"), said
    return rest


def test_the_plain_loop(tmp_path):
    lines = run_example("plain_pytorch.py", tmp_path / "student.safetensors").splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {n} of 3" for n in (1, 2, 3)]
    losses = [float(line.split()[-1]) for line in lines]
    assert losses[-1] < losses[0]
    assert load_file(tmp_path / "student.safetensors")["fc.weight"].shape == (10, 512)


def test_the_student_of_ones_own():
    lines = run_example("my_student.py").splitlines()
    assert len(lines) == 3
    assert float(lines[-1].split()[-1]) < float(lines[0].split()[-1])


def test_the_lightning_loop():
    lines = [line for line in run_example("lightning_loop.py").splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == [f"step {n}" for n in (1, 2, 3)]
    assert float(lines[-1].split()[-1]) < float(lines[0].split()[-1])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_lightning_loop_on_two_processes():
    """Each step of 64 samples is one of two processes; the third batch of 32 is none."""
    lines = [line for line in output_of_example("lightning_loop.py", 2).splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_lightning_run_resumes_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    lightning, example = importlib.import_module("lightning"), importlib.import_module("examples.lightning_loop")

    def run(folder, resumed=None, **options):
        lightning.seed_everything(0)
        data = example.CachedData(shared_cache().root, batch_size=16)
        saved = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(max_epochs=1, callbacks=[saved], **quiet, **options)
        module = example.Distillation(data.train_dataloader())
        trainer.fit(module, datamodule=data, ckpt_path=resumed)
        assert trainer.global_step == options.get("max_steps", 6)
        return module.state_dict()

    whole = run(tmp_path / "whole")
    run(tmp_path / "half", max_steps=2)
    resumed = run(tmp_path / "resumed", next((tmp_path / "half").glob("*step=2.ckpt")))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["webdataset_pipeline.py", "huggingface_datasets.py"])
def test_the_other_pipelines(name):
    """Two workers: every sample once; the loss falls."""
    lines = output_of_example(name).splitlines()
    assert sum(int(line.split()[2]) for line in lines) == len(shared_cache())
    losses = [float(line.split()[-1]) for line in lines]
    assert all(0 < loss < 10 for loss in losses)


def test_the_plain_loop_is_short():
    assert len(PYTHON["students"][0].strip().splitlines()) <= 22


def test_a_teacher_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    importlib.import_module("examples.my_teacher")
    model = create_model("my_net", num_classes=10)
    save_file(model.state_dict(), str(tmp_path / "my_net.safetensors"))
    teacher = {"name": "my_net", "weights": str(tmp_path / "my_net.safetensors")}
    cache_teacher(options(tmp_path / "cache", "", teacher=teacher, data={"max_samples": 32}), CPU)
    cache = Cache.open(tmp_path / "cache")
    assert cache.manifest.facts.teacher["spec"]["family"] == "my_net"
    assert cache.manifest.facts.teacher["spec"]["feature_shape"] == [64, 4, 4]
    targets = CachedTargets(cache, batch_size=8)
    student = timm_student("test_resnet", targets)
    loss = ScaleKDLoss(targets, student)
    images, labels, target = next(iter(targets))
    terms = loss(*student(images), labels, target)
    assert terms.total.isfinite()
    with pytest.raises(UserError, match="already registered"):
        register_family("my_net", type("Other", (), {}), lambda model: TailParts([], model, "nchw"))


@pytest.mark.parametrize(
    ("name", "feature_shape"), [("vit_b_32", [768, 2, 2]), ("swin_t", [768, 2, 2]), ("convnext_tiny", [768, 2, 2])]
)
def test_teachers_of_torchvision(tmp_path, monkeypatch, name, feature_shape):
    monkeypatch.syspath_prepend(str(ROOT))
    importlib.import_module("examples.torchvision_teachers")
    size = {"image_size": 64} if name.startswith("vit") else {}
    whole = torchvision.models.get_model(name, num_classes=7, **size).eval()
    file = str(tmp_path / "teacher.safetensors")
    save_file(whole.state_dict(), file)
    for classes in (None, 0):  # with and without the classifier of the file
        config = TeacherConfig(name=f"torchvision_{name}", weights=file, num_classes=classes, precision="float32")
        teacher = load_teacher(config, image_size=64, num_classes=7, device=CPU.device)
        assert list(teacher.spec.feature_shape) == feature_shape
        assert teacher.spec.num_classes == (7 if classes is None else 0)
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        assert check_tail(teacher, images) <= 1e-5
        if classes is None:
            assert torch.equal(teacher(images).logits, whole(teacher.normalize(images)))
    (tmp_path / "tail").write_bytes(tail_bytes(split_tail(teacher), teacher.spec))
    assert load_tail(tmp_path / "tail", teacher.spec).out_shape == tuple(feature_shape)
    with pytest.raises(UserError, match="set --teacher-weights"):
        load_teacher(TeacherConfig(name=f"torchvision_{name}"), image_size=64, num_classes=7, device=CPU.device)


def test_a_plugin_is_imported_for_a_command(tmp_path):
    said = execute(sys.executable, "-m", "pipelines.costs", "--plugin", "nothing.here", status=2)
    assert "cannot import the plugin" in said
    assert "--plugin nothing.here" in said
    said = execute(sys.executable, "-m", "pipelines.cache_teacher", "--plugin", "examples.my_teacher", "--help")
    assert "--teacher.name" in said


def test_folders_and_tars_of_the_guide(tmp_path):
    folder_tree(tmp_path / "pets", ["cat/1.jpg", "dog/7.png"], ["cat/3.jpg", "dog/4.jpg"])
    for name in ("train", "val"):
        shard(tmp_path / "pets-wds" / name / "000000.tar", ["a", "b"], [0, 1])
    for number in range(16):
        shard(tmp_path / f"pets-{number:06d}.tar", [f"a{number}"], [0])
    for source, split, count in (
        ("pets", "train", 2),
        ("pets", "val", 2),
        ("pets-wds", "train", 2),
        ("pets-{000000..000015}.tar", "train", 16),
    ):
        assert len(open_source(DataConfig(source=str(tmp_path / source)), split).samples) == count


def test_hugging_face_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    from image_files import picture

    rows = {"image": [picture(n) for n in range(4)], "label": [0, 1, 0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    one = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.chdir(tmp_path)
    datasets.DatasetDict({"train": one, "validation": one}).save_to_disk("pets-arrow")
    exec(PYTHON["data"][0], {})
    for split in ("train", "val"):
        source = open_source(DataConfig(source=str(tmp_path / "pets-hf")), split)
        assert (source.class_names, len(source.samples)) == (("ant", "bee"), 4)


def test_what_is_taken_away(tmp_path, monkeypatch):
    student = build_student(StudentConfig(name="resnet50"), num_classes=10, image_size=64).eval()
    folder = tmp_path / "runs" / "resnet50"
    folder.mkdir(parents=True)
    export_student(
        student, StudentConfig(name="resnet50"), folder / "export", image_size=64, class_names=list("0123456789")
    )
    export_file(student, "mmpretrain", folder / "resnet50-mmpretrain.safetensors", image_size=64, facts={})
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(PYTHON["take-away"][1], found)
    assert found["backbone"].feature_info.channels()[-2:] == [1024, 2048]
    exec(PYTHON["take-away"][2], {})
    backbone = {
        name.removeprefix("backbone."): value
        for name, value in torch.load(tmp_path / "student.pth", weights_only=True).items()
        if name.startswith("backbone.")
    }
    paper_student("resnet50", 10).backbone.load_state_dict(backbone, strict=True)


def test_the_downstream_example(tmp_path):
    student = build_student(StudentConfig(name="test_resnet"), num_classes=10, image_size=64).eval()
    export_student(
        student, StudentConfig(name="test_resnet"), tmp_path / "export", image_size=64, class_names=list("0123456789")
    )
    said = execute(sys.executable, ROOT / "examples" / "segmentation.py", tmp_path / "export", 3)
    figures = re.findall(r"(random initialization|exported student): mIoU ([\d.]+)% after 3 steps", said)
    assert [name for name, _ in figures] == ["random initialization", "exported student"]
    assert all(0 < float(value) < 100 for _, value in figures)


SMALL = {
    "cache-teacher": ["--pretrained", "false", "--views", "2", "--workers", "0"],
    "distill": ["--epochs", "1", "--batch", "8", "--workers", "0"],
}


@pytest.mark.slow
def test_the_tutorial(tmp_path, monkeypatch, capsys):
    """Every command, on twelve images and with a teacher of random weights, and the code that loads the student."""
    images = [f"{'cat' if number % 2 else 'dog'}/{number}.jpg" for number in range(8)]
    folder_tree(tmp_path / "photos", images, ["cat/3.jpg", "cat/5.jpg", "dog/4.jpg", "dog/6.jpg"])
    for page, command in COMMANDS:
        if page == "tutorial":
            words = shlex.split(command)[1:]
            program = ["env", "-C", tmp_path, f"PYTHONPATH={ROOT}", sys.executable, "-m", "pipelines"]
            execute(*program, *words, *SMALL.get(words[0], []))
    assert (tmp_path / "runs" / "comparison.html").is_file()
    monkeypatch.chdir(tmp_path)
    exec(PYTHON["tutorial"][0], {})
    assert "tensor" in capsys.readouterr().out
