"""Transfers between host and device in stage 1: what is copied, in which order, and which thread waits.

The device is torch's meta device (`crossings.py`): shapes are real, values are not. The loop is stage 1's own code.
"""

import dataclasses
import threading

import torch
from crossings import META, device_crossings
from small_cache import options, shared_weights

from scalekd_cache.caching import encode_batch
from scalekd_cache.caching.make_units import Stage, fill_unit
from scalekd_cache.caching.sample_views import EncodedView, SampledViews, Unit
from scalekd_cache.codec import make_codec
from scalekd_cache.codec.logits import DenseLogits
from scalekd_cache.codec.pooled import pooled_codec
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import SampleRef
from scalekd_cache.models.teacher import TeacherOutput, load_teacher

VIEWS, BATCH, IMAGES, CLASSES = 2, 4, 6, 10


def images(count=IMAGES):
    for number in range(count):
        pixels = torch.randint(0, 256, (VIEWS, 3, 64, 64), dtype=torch.uint8)
        views = [EncodedView(b"jpeg", "{}", f"{view:016x}") for view in range(VIEWS)]
        yield SampledViews(0, SampleRef(f"a/{number}", 0), "", pixels, views, "")


def zeros(batch):
    return TeacherOutput(torch.zeros(batch, 4, 2, 2), torch.zeros(batch, CLASSES), torch.zeros(batch, 0))


def stage_of(root, teacher, device, shape):
    return Stage(
        root=root, backend="webdataset", fingerprint="0" * 64, source=None, views=ViewConfig(size=64), teacher=teacher,
        codec=make_codec("int8", shape), logit_codec=DenseLogits(CLASSES), batch_size=BATCH, device=device, versions={},
    )  # fmt: skip


def fill(stage, count=IMAGES):
    unit = Unit(group=0, range_id=0, positions=range(count), views=tuple(range(VIEWS)))
    [(writer, figures)] = fill_unit([stage], unit, images(count))
    return writer, figures


def test_every_crossing_of_stage_1(tmp_path):
    """Two batches of two views: pixels and seeds are copied to the device, five results back, no value is read."""
    config = options(tmp_path, shared_weights()).teacher
    teacher = load_teacher(config, image_size=64, num_classes=CLASSES, device=torch.device("cpu"))
    stage = stage_of(tmp_path, teacher.to(META), META, teacher.spec.feature_shape)
    with device_crossings() as seen:
        writer, _ = fill(stage)
    writer.abort()
    row, logits = stage.codec.bytes_per_view, 9 + CLASSES + 4 * CLASSES
    expected = []
    for batch in (4, 4, 2, 2):
        expected += [("to device", (batch, 3, 64, 64)), ("to device", (batch,))]
        expected += [("to host", shape) for shape in ((batch, row), (batch,), (batch,), (2, batch), (batch, logits))]
    assert seen == expected


def test_pooled_embeddings_cross_with_their_batch(tmp_path):
    """Three more results back to the host, and still no value is read."""
    config = options(tmp_path, None, teacher={"name": "test_vit", "pretrained": False, "weights": None}).teacher
    teacher = load_teacher(config, image_size=64, num_classes=0, device=torch.device("cpu"))
    second = pooled_codec("int8", teacher.spec.pooled)
    stage = stage_of(tmp_path, teacher.to(META), META, teacher.spec.feature_shape)
    with device_crossings() as seen:
        fill(dataclasses.replace(stage, logit_codec=DenseLogits(0), second_codec=second), BATCH)[0].abort()
    expected = [("to host", shape) for shape in ((BATCH, second.bytes_per_view), (BATCH,), (BATCH,))]
    assert [line[-3:] for line in (seen[:10], seen[10:])] == [expected] * VIEWS
    assert len(seen) == VIEWS * (2 + 5 + 3)


class Log:
    """The order of forward passes, events and waits, with the thread of each."""

    def __init__(self, monkeypatch):
        self.lines, main = [], threading.current_thread()

        class Event:
            def __init__(self, number):
                self.number = number

            def synchronize(event):
                own = threading.current_thread() is main
                self.lines.append(("main waits" if own else "writer waits", event.number))

        def recorded(device):
            number = sum(what == "event" for what, _ in self.lines)
            self.lines.append(("event", number))
            return Event(number)

        monkeypatch.setattr(encode_batch, "recorded_event", recorded)

    def teacher(self, images):
        self.lines.append(("forward", len(images)))
        generator = torch.Generator().manual_seed(len(self.lines))
        return TeacherOutput(
            torch.randn(len(images), 4, 2, 2, generator=generator),
            torch.randn(len(images), CLASSES, generator=generator),
            torch.empty(len(images), 0),
        )


def test_only_the_writer_waits(tmp_path, monkeypatch):
    """Each forward pass is followed by its own encoding; the main thread waits only to fill the first buffer again."""
    log = Log(monkeypatch)
    stage = stage_of(tmp_path, log.teacher, torch.device("cpu"), (4, 2, 2))
    writer, _ = fill(stage, 3 * BATCH)
    writer.abort()
    main = [line for line in log.lines if line[0] != "writer waits"]
    # 2 views per batch, then the event of the batch's pixels (numbers 2, 5 and 8)
    batch = ["forward", "event", "forward", "event", "event"]
    assert [what for what, _ in main] == [*batch, *batch, "main waits", *batch]
    assert ("main waits", 2) in main
    assert [number for what, number in log.lines if what == "writer waits"] == [0, 1, 3, 4, 6, 7]


def test_pixels_are_copied_once(tmp_path):
    """No stack or concatenation of pixels: the teacher's input is a part of the buffer, the same for all batches."""
    places = []

    def teacher(images):
        assert images.is_contiguous()
        places.append(images.untyped_storage().data_ptr())
        return zeros(len(images))

    writer, _ = fill(stage_of(tmp_path, teacher, torch.device("cpu"), (4, 2, 2)), 5 * BATCH)
    writer.abort()
    assert len(places) == 5 * VIEWS
    assert len(set(places)) == 2


def test_the_teacher_sees_each_view_of_each_image(tmp_path):
    seen = []

    def teacher(images):
        seen.append(images.clone())
        return zeros(len(images))

    torch.manual_seed(0)
    expected = [item.pixels for item in images()]
    torch.manual_seed(0)
    writer, _ = fill(stage_of(tmp_path, teacher, torch.device("cpu"), (4, 2, 2)))
    writer.abort()
    for view in range(VIEWS):
        got = torch.cat(seen[view::VIEWS])
        assert torch.equal(got, torch.stack([pixels[view] for pixels in expected]))
