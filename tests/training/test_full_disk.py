"""A full disk (a small tmpfs visible only to the test): one message, no damaged file, and a rerun finishes."""

import pytest
from commands import cache_flags, distill_flags
from stage1_process import FORKING, Job, fill, on_a_bad_disk, own_disk
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from scalekd_cache.errors import UserError
from scalekd_cache.training.metrics import read_metrics
from scalekd_cache.training.run_folder import RunFolder

VALUES = {"events": {"loss": 0.5}, "metrics": {f"loss of part {n}": 1 / 3 for n in range(8)}}
"""Log values so that this file is the first to need another page of the disk."""


def _log_until_full(disk, values, sender) -> None:
    """The body of a forked process: sends the message and both files, then logs again after space was freed."""
    if not own_disk(disk):
        sender.send(None)
        return
    run = disk / "run"
    folder = RunFolder(run, {})
    folder.start_metrics(0)
    folder.log(1, values)
    fill(disk, room=0)
    try:
        for step in range(2, 10_000):
            folder.log(step, values)
        message = "no error"
    except UserError as error:
        message = str(error)
    (event,) = (run / "tensorboard").iterdir()
    steps = {
        "metrics": [metrics["step"] for metrics in read_metrics(run)[0]],
        "events": [event.step for event in EventFileLoader(str(event)).Load() if event.HasField("summary")],
    }
    del folder
    (disk / "ballast").unlink()
    folder = RunFolder(run, {})
    folder.start_metrics(step - 1)
    folder.log(step, values)
    sender.send((message, step, steps, [metrics["step"] for metrics in read_metrics(run)[0]]))


@pytest.mark.parametrize("first", VALUES)
def test_metrics_and_tensorboard(tmp_path, first):
    receiver, sender = FORKING.Pipe(duplex=False)
    process = FORKING.Process(target=_log_until_full, args=(tmp_path, VALUES[first], sender))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    if found is None:
        pytest.skip("needs the right to mount")
    message, step, steps, after = found
    assert message.startswith("the disk is full\n  got: ")
    assert f"where: {tmp_path / 'run'}" in message
    assert steps["metrics"] == list(range(1, step + (first == "events")))
    assert steps["events"] == list(range(1, step))
    assert after == list(range(1, step + 1))


@pytest.mark.ci_slow
def test_a_run_on_a_disk_that_fills_up(tmp_path, weights):
    """The disk fills up before various operations: checkpoint, metrics, export, model card, summary."""
    cache, disk, log = tmp_path / "cache", tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    assert Job(cache_flags(cache, weights, **{"data.max_samples": 16}), cache, log).wait().statuses == [0]
    options = {"train.epochs": 1, "train.global_batch_size": 16, "train.micro_batch_size": 16}
    statuses = []
    for operation in (4, 14, 24):
        words = distill_flags(cache, disk / "run", **options)
        result = on_a_bad_disk(words, disk / "run", log, "full", operation, "distill", "256m")
        if result is None:
            pytest.skip("needs the right to mount")
        (status, output, _), (again, rest, _), files = result
        assert "Traceback" not in output, output
        assert (status, "\nerror: the disk is full\n" in output) in ((2, True), (0, False)), output
        assert again == 0, rest
        assert {"summary.json", "export/model.safetensors", "export/README.md"} <= set(files)
        assert not [name for name in files if ".tmp" in name]
        statuses.append(status)
    assert statuses.count(2) >= 2
