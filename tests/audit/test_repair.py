"""Repair: regenerates exactly what is damaged, byte for byte; intact files and failed repairs change nothing."""

import shutil

import pytest
from small_cache import CPU, copy_of_cache, flip_byte, reseal, shared_weights, tree

from scalekd_cache.audit.repair import repair_cache
from scalekd_cache.caching import prepare
from scalekd_cache.errors import UserError
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.verify import verify_cache

BAD = "units/g000-r00001"


def damage_record(root):
    tar = root / BAD / "v0001.tar"
    flip_byte(tar, tar.stat().st_size // 2)


def damage_sidecar(root):
    flip_byte(root / BAD / "unit.json", 300)


def delete_unit(root):
    shutil.rmtree(root / BAD)


def delete_file(root):
    (root / BAD / "v0000.idx").unlink()


def swap_views(root):
    for end in ("tar", "idx"):
        first, second = root / BAD / f"v0000.{end}", root / BAD / f"v0001.{end}"
        data = first.read_bytes(), second.read_bytes()
        first.write_bytes(data[1])
        second.write_bytes(data[0])


def damage_manifest(root):
    flip_byte(root / "manifest.json", 100)


def delete_manifest(root):
    (root / "manifest.json").unlink()


def damage_tail(root):
    flip_byte(root / "tail.safetensors", -100)


def delete_tail(root):
    (root / "tail.safetensors").unlink()


def damage_plan(root):
    flip_byte(root / "plan.json", 50)


def delete_plan(root):
    (root / "plan.json").unlink()


def damage_much(root):
    damage_record(root)
    damage_plan(root)
    damage_tail(root)


UNIT = [damage_record, damage_sidecar, delete_unit, delete_file, swap_views]
REST = [damage_manifest, delete_manifest, damage_tail, delete_tail, damage_plan, delete_plan]


@pytest.fixture
def quick(monkeypatch):
    """The teacher's accuracy is not measured again, because manifest and plan have it."""
    shared_weights()
    monkeypatch.setattr(prepare, "_teacher_top1", None)


@pytest.mark.parametrize("damage", [*UNIT, *REST, damage_much], ids=lambda damage: damage.__name__)
def test_a_repaired_cache_is_the_original(tmp_path, quick, damage):
    root = copy_of_cache(tmp_path / "cache")
    original = tree(root)
    untouched = {path: path.stat().st_ino for path in (root / "units").glob("*") if path.name != "g000-r00001"}
    damage(root)
    assert tree(root) != original
    assert verify_cache(root, deep=True) or damage is delete_plan
    done = repair_cache(root, CPU)
    assert done.units == ([(0, 1)] if damage in (*UNIT, damage_much) else [])
    assert done.left == []
    assert tree(root) == original
    assert {path: path.stat().st_ino for path in untouched} == untouched


def test_a_whole_cache_needs_nothing(tmp_path, monkeypatch):
    root = copy_of_cache(tmp_path / "cache")
    monkeypatch.setattr("scalekd_cache.audit.repair.cache_teacher", None)
    assert repair_cache(root, CPU) == ([], [], [])


def test_a_plan_is_written_again_without_a_teacher(tmp_path, monkeypatch):
    root = copy_of_cache(tmp_path / "cache")
    original = tree(root)
    damage_plan(root)
    monkeypatch.setattr("scalekd_cache.audit.repair.cache_teacher", None)
    assert repair_cache(root, CPU).left == []
    assert tree(root) == original


def test_wrong_numbers_under_right_checksums_are_made_again(tmp_path, quick):
    """A consistent unit with wrong targets: only re-running the teacher detects it."""
    root = copy_of_cache(tmp_path / "cache")
    manifest = read_manifest(root)
    from damage import rewrite_unit

    rewrite_unit(root, lambda record: record._replace(features=record.features[::-1]))
    assert verify_cache(root, deep=True) == []
    assert read_manifest(root) != manifest
    done = repair_cache(root, CPU)
    assert (0, 0) in done.units
    assert done.left == []


def test_what_is_not_the_caches_is_left_and_named(tmp_path, quick):
    root = copy_of_cache(tmp_path / "cache")
    stranger = root / BAD / "notes.txt"
    stranger.write_text("mine")
    done = repair_cache(root, CPU)
    assert done.units == []
    assert [problem.where for problem in done.left] == [f"{BAD}/notes.txt"]
    assert stranger.read_text() == "mine"


def test_the_file_of_somebody_else_outlives_the_damaged_unit_around_it(tmp_path, quick):
    root = copy_of_cache(tmp_path / "cache")
    original = tree(root)
    damage_sidecar(root)
    for name in ("notes.txt", "more/notes.txt"):
        (root / BAD / name).parent.mkdir(exist_ok=True)
        (root / BAD / name).write_text("mine")
    done = repair_cache(root, CPU)
    assert done.units == [(0, 1)]
    names = {problem.where for problem in done.left}
    assert names == {f"{BAD}/more", f"{BAD}/more/notes.txt", f"{BAD}/notes.txt"}
    assert tree(root).keys() - original.keys() == {f"{BAD}/more/notes.txt", f"{BAD}/notes.txt"}


def test_another_teacher_changes_nothing(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    root = copy_of_cache(tmp_path / "cache")
    damage_record(root)
    before = tree(root)
    state = load_file(shared_weights())
    name = next(name for name, value in state.items() if value.ndim == 2)
    save_file({**state, name: state[name] + torch.ones(())}, tmp_path / "other.safetensors")
    for weights, text in (("other.safetensors", "weights_sha256"), ("absent.safetensors", "absent")):
        with pytest.raises(UserError, match=text):
            repair_cache(root, CPU, weights=str(tmp_path / weights))
        assert tree(root) == before


def test_an_error_on_the_way_gives_the_old_unit_its_name_back(tmp_path, monkeypatch):
    root = copy_of_cache(tmp_path / "cache")
    damage_record(root)
    before = tree(root)

    def fail(*_):
        assert not (root / BAD).exists()
        raise UserError("the disk is full")

    monkeypatch.setattr("scalekd_cache.audit.repair.cache_teacher", fail)
    with pytest.raises(UserError, match="disk is full"):
        repair_cache(root, CPU)
    assert tree(root) == before


def test_a_killed_repair_is_continued_and_cleaned_up(tmp_path, quick):
    root = copy_of_cache(tmp_path / "cache")
    original = tree(root)
    (root / BAD).rename(root / "units" / ".aside-g000-r00001-0a0b0c0d")
    assert repair_cache(root, CPU).units == [(0, 1)]
    assert tree(root) == original


def test_moved_data_and_weights_are_found(tmp_path, quick):
    root = copy_of_cache(tmp_path / "cache")
    for name in ("manifest.json", "plan.json"):
        reseal(root / name, lambda fields: fields["teacher"]["config"].update(weights="gone.safetensors"))
    units = {path: data for path, data in tree(root).items() if path.startswith("units/")}
    damage_record(root)
    with pytest.raises(UserError, match=r"not available(.|\n)*--teacher-weights"):
        repair_cache(root, CPU)
    assert repair_cache(root, CPU, weights=str(shared_weights()), data="demo").left == []
    assert {path: data for path, data in tree(root).items() if path.startswith("units/")} == units


@pytest.mark.parametrize("damaged", [True, False])
def test_without_plan_and_manifest_it_says_what_to_do(tmp_path, damaged):
    root = copy_of_cache(tmp_path / "cache")
    for name in ("manifest.json", "plan.json"):
        flip_byte(root / name, 40) if damaged else (root / name).unlink()
    before = tree(root)
    with pytest.raises(UserError, match="scalekd cache-teacher"):
        repair_cache(root, CPU)
    assert tree(root) == before
