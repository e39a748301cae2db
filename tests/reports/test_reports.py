"""Reports: one file, no network, one known script, everything escaped, charts with text; missing parts are listed."""

import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import measure, needs_browser, screenshot
from image_files import encoded
from image_files import picture as noise
from PIL import Image
from small_cache import CPU, copy_of_cache, make, shared_cache, write_weights

from scalekd_cache import reports
from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage2 import DistillConfig, StudentConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student
from scalekd_cache.reports.cache import CacheReport, cache_report
from scalekd_cache.reports.charts import COLORS
from scalekd_cache.reports.comparison import compare_runs, mean_over_seeds
from scalekd_cache.reports.end_of_run import write_reports
from scalekd_cache.reports.page import MAX_BYTES, page_script, picture, script_hash, write_page
from scalekd_cache.reports.predictions import Predictions, confusion, load_run_teacher
from scalekd_cache.reports.run_data import RunReport, read_run
from scalekd_cache.reports.runs import agreement, run_report
from scalekd_cache.reports.views import ViewInfo, ViewSample, closest_pairs
from scalekd_cache.store.path import absolute
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.run_export import export_state, facts_of
from scalekd_cache.training.run_files import read_facts
from scalekd_cache.training.run_folder import RunFolder

SMALL = CacheReport(views=40, teacher_views=8, images=3)
HOSTILE = '"><script>window.hacked=1</script>$\\frac{1}'


class Page(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.images, self.text, self.charts, self.scripts = [], [], "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if dict(attrs).get("role") == "img":
            self.charts.append(dict(attrs)["aria-label"])

    def handle_data(self, data):
        if self.lasttag == "script":  # of the last element that begins here
            self.scripts.append(data)
        else:
            self.text += data


@pytest.fixture(scope="module")
def cache_page():
    return cache_report(shared_cache(), SMALL, CPU)


def start_run(folder):
    """A run folder in the middle of training."""
    cache = shared_cache()
    run = RunFolder(folder, to_plain(DistillConfig(cache=str(cache.root), student=StudentConfig(name="resnet10t"))))
    run.write_facts(facts_of([cache.manifest.facts], 2, StudentConfig()))
    run.start_metrics(0)
    for step in range(1, 30):
        terms = dict.fromkeys(("label", "logit", "s3_spatial", "s3_frequency", "s4_spatial"), 1 / step)
        run.log(step, {"loss": 5 / step, **terms, "s4_frequency": 0.0, "epoch": 0, "lr": 0.1, "images_per_s": 30.0,
                       "data_wait": 0.01})  # fmt: skip
    return run


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, with a student of random weights."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    run, facts = start_run(folder), facts_of([shared_cache().manifest.facts], 2, StudentConfig())
    config = StudentConfig(name="resnet10t")
    torch.manual_seed(0)
    state = build_student(config, num_classes=10, image_size=64).model.state_dict()
    export_state(config, state, facts, folder / "export")
    run.finish({"student": "resnet10t", "teacher": "demo_swin", "targets": "cached", "top1": 50.0, "top5": 90.0,
                "steps": 29, "teacher_top1": 97.0, "images_per_s": 30.0, "minutes": 1.0, "seed": 0, "epochs": 1,
                "views": 2, "bytes_per_view": 9.5,
                "cache_fingerprint": facts["fingerprint"]})  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run_page(done):
    before = sorted(done.rglob("*"))
    page = run_report([done], RunReport(images=40), CPU)
    assert sorted(done.rglob("*")) == before
    return page


def changed(folder, copy, name, old, new):
    """A copy of a run in which a file says something else."""
    shutil.copytree(folder, copy)
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new))
    return copy


def test_a_report_is_one_small_file_with_one_script(cache_page, run_page):
    for text in (cache_page, run_page):
        page = Page(text)
        assert len(text.encode()) < MAX_BYTES / 2
        assert len(page.images) > 5
        assert all(image["src"].startswith("data:image/") and image["alt"].strip() for image in page.images)
        assert not {"link", "iframe", "object", "embed", "form"} & set(page.tags)
        data, script = (one for one in page.scripts if one.strip())
        assert len(json.loads(data)) == len(page.charts) > 2
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{}'"
        assert f'http-equiv="Content-Security-Policy" content="{policy.format(script_hash(script))}"' in text
        assert script == page_script()  # nothing of the data
        assert text.count("<script") == 2
        assert 'name="viewport"' in text


def test_a_cache_report_says_what_the_cache_is(cache_page):
    manifest, text = shared_cache().manifest, Page(cache_page).text
    for fact in (
        manifest.facts.fingerprint,
        "96 of 10 classes, 2 views each",
        "demo_swin",
        "int8",
        "webdataset, 3 units",
    ):
        assert fact in text
    assert f"{manifest.bytes_per_view['total']:,.0f}" in text
    assert f"{manifest.fidelity['cosine_mean_removed']['p1']:.6f}" in text
    assert "crop " in text
    assert text.count("stored map") >= 6
    assert text.count("live map") >= 6  # the teacher's weights are available
    assert "cosine between stored and live map" in text
    assert re.search(r"\d+ of 40 views \(\d+\.\d%\)", text)  # where the teacher disagrees with the label
    assert "size 64" in text
    for off in ("flip probability", "randaugment", "erase"):
        assert off not in text


def test_the_gallery_shows_the_pixels_that_are_stored(cache_page):
    cache = shared_cache()
    shown = {image["src"] for image in Page(cache_page).images if image["alt"].startswith("The view ")}
    stored = set()
    for view in range(2):
        for record in cache.read(range(96), view):
            with Image.open(io.BytesIO(record.pixels)) as image:
                stored.add(picture(np.array(image), "").source)
    assert len(shown) > 6
    assert shown <= stored


def test_views_of_one_image_are_next_to_each_other(cache_page):
    gallery = cache_page.partition('id="gallery"')[2].partition('id="outliers"')[0]
    cards = gallery.split("<article")[1:]
    assert len(cards) == SMALL.images
    for card in cards:
        assert card.count("<strong>") == 1  # the image's key
        assert re.findall(r"<div>view (\d)", card) == ["0", "1"]
    assert "anywhere" not in cache_page.partition("</style>")[0]  # it breaks words that would fit


def test_without_the_teacher_it_is_said(tmp_path):
    folder = copy_of_cache(tmp_path / "cache")
    page = Page(cache_report(Cache.open(folder), CacheReport(views=10, teacher_views=0, images=1), CPU)).text
    assert "The teacher was not re-run." in page
    assert "cosine between stored and live map" not in page
    assert "stored map" not in page  # a single map is shown as is
    with pytest.raises(UserError, match="weights file does not exist"):
        cache_report(Cache.open(folder), CacheReport(teacher_weights=str(tmp_path / "none")), CPU)


def test_damaged_records_are_named_and_left_out(tmp_path):
    folder = copy_of_cache(tmp_path / "cache")
    shard = next(folder.glob("units/*/v0000.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 4096] = bytes(4096)
    shard.write_bytes(data)
    page = Page(cache_report(Cache.open(folder), CacheReport(views=192, teacher_views=0, images=2), CPU)).text
    assert "view 0, position" in page
    assert "damaged cache" in page
    assert f"scalekd repair --cache {folder}" in page
    assert "random sample of 192 views" not in page


@pytest.fixture(scope="module")
def hostile_cache(tmp_path_factory):
    """A cache whose class names and file names are an attack."""
    root = tmp_path_factory.mktemp("hostile")
    for split in ("train", "val"):
        for number, name in enumerate((HOSTILE.replace("/", "∕"), "_$x$", "名前")):
            for image in range(4):
                file = root / "data" / split / name / f"<img src=x onerror=hacked=1>{image}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encoded(noise(10 * number + image, (64, 64))))
    weights = write_weights(root / "teacher.safetensors", 3)
    return make(root / "cache", weights, data={"source": str(root / "data")})


def test_names_from_data_sets_are_escaped(hostile_cache, tmp_path):
    page = cache_report(hostile_cache, CacheReport(views=24, teacher_views=4, images=2), CPU)
    parsed = Page(page)
    assert page.count("<script") == parsed.tags.count("script") == 2
    assert page_script() in parsed.scripts
    assert all(set(image) == {"src", "alt"} for image in parsed.images)  # no attribute was smuggled in
    assert any("window.hacked" in image["alt"] for image in parsed.images) or "window.hacked" in parsed.text


def test_views_that_look_alike_are_found():
    vectors = np.array([[1, 0], [0, 1], [1, 0.01], [0, -1], [-1, 0]], np.float32)
    views = [
        ViewInfo(
            key=str(n), view=0, position=n, label=0, label_name="a", top_classes=[], predicted=None, words="", digest=d
        )
        for n, d in enumerate(["p", "q", "p", "r", "s"])
    ]
    pairs = closest_pairs(ViewSample(views, vectors, []), 2)
    assert (pairs[0].first, pairs[0].second, pairs[0].same_pixels) == (0, 2, True)
    assert pairs[0].cosine > 0.99 > pairs[1].cosine
    assert closest_pairs(ViewSample(views[:1], vectors[:1], []), 2) == []


def test_confusion_and_agreement_by_hand():
    labels = np.array([0, 0, 1, 1])
    student = Predictions(np.array([0, 1, 1, 1]), np.array([50.0, 60, 70, 80]))
    teacher = Predictions(np.array([0, 0, 1, 0]), np.array([50.0, 60, 70, 80]))
    assert confusion(labels, student, 2).tolist() == [[1, 1], [0, 2]]
    assert student.accuracy(labels) == 75
    assert agreement(student, teacher, labels) == (50, 50, 25, 25, 0)


def test_a_run_report(run_page):
    page = Page(run_page)
    for words in ("50.00%", "Loss terms", "Learning rate", "Throughput", "Waiting for data", "Predictions of first",
                  "Predictions of the teacher", "same prediction", "both wrong",
                  "Images with different predictions"):  # fmt: skip
        assert words in page.text
    assert not any("s4 frequency" in words for words in page.charts)  # a term that is always 0
    assert any("label goes from 1 to" in words for words in page.charts)
    assert "learning rate 0.1 (base rate 0.1 x batch 256 / 256)" in page.text


def test_the_learning_rate_is_the_one_used(done, tmp_path):
    run = changed(done, tmp_path / "run", "config.yaml", "base_batch_size: 256", "base_batch_size: 4096")
    text = Page(run_report([run], RunReport(images=0), CPU)).text
    assert "sgd, learning rate 0.00625 (base rate 0.1 x batch 256 / 4096)" in text


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_report_names_the_teacher(done, tmp_path, finished):
    """Also a run of an earlier version, which has the name only in its summary."""
    facts = json.loads((done / "cache.json").read_text())
    top1 = shared_cache().manifest.facts.teacher["top1"]
    assert facts["teacher"] == f"demo_swin, top-1 {top1:.2f}%"
    old = changed(done, tmp_path / "old", "summary.json", "demo_swin", "demo_swin (random weights)")
    facts.pop("teacher")
    if not finished:
        (old / "summary.json").unlink()
        facts["teacher"] = "demo_swin (random weights), top-1 10.00%"
    (old / "cache.json").write_text(json.dumps(facts))
    text = Page(run_report([old], RunReport(images=0), CPU)).text
    assert f"demo_swin (random weights), top-1 {97 if finished else 10}.00%" in text.replace("\u200b", "")
    assert ("teacher's top-1 (random weights)" in text) == finished


def test_the_columns_of_numbers_exist():
    """A name in a template that is not a column leaves its numbers aligned as text."""
    template = files(reports).joinpath("templates/run.html").read_text()
    code = files(reports).joinpath("runs.py").read_text()
    for names in re.findall(r"parts\.table\(section\.\w+, \[(.*?)\]\)", template):
        assert all(f'"{name}": ' in code for name in re.findall(r"'(.*?)'", names))


def test_a_run_that_is_still_going(tmp_path):
    run = start_run(tmp_path / "going").path
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    text = Page(run_report([run], RunReport(images=10), CPU)).text
    assert "going is not finished: the report shows the steps so far." in text
    assert re.search(r"29\s*last logged step", text)
    teacher = compared([tmp_path / "going", tmp_path / "going"])[-1]
    assert (teacher["run"], teacher["model"][:9], teacher["top-1"]) == ("teacher", "demo_swin", "")
    assert "going has no exported student yet" in text


@pytest.fixture(scope="module")
def four_pages(done, tmp_path_factory):
    """Two seeds, a baseline, and lite heads."""
    folder = tmp_path_factory.mktemp("four")
    second = changed(done, folder / "second", "summary.json", "50.0", "60.0")
    (second / "config.yaml").write_text((second / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    (second / "summary.json").write_text(
        (second / "summary.json").read_text().replace('"minutes": 1.0', '"minutes": 0.3')
    )
    baseline = changed(done, folder / "baseline", "config.yaml", "targets: cached", "targets: none")
    lite = changed(done, folder / "lite", "config.yaml", "projector: cap", "projector: lite")
    (lite / "summary.json").write_text((lite / "summary.json").read_text().replace('"minutes": 1.0', '"minutes": 90.0'))
    return run_report([done, second, baseline, lite, done], RunReport(images=20), CPU)


def test_several_runs_are_compared(four_pages):
    page = Page(four_pages)
    for words in (
        "Runs first, second",
        "training images/s",
        "inference images/s",
        "60.00%",
        "Accuracy and size",
        "Prediction agreement (% of images)",
    ):
        assert words in page.text
    assert page.text.count("Options") == 4
    table = four_pages.split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[1:]]
    assert [(row[0], row[3], row[4], row[5]) for row in rows] == [
        ("first", "cap", "100", "50.00%"),
        ("second", "cap", "100", "60.00%"),
        ("baseline", "none", "100", "50.00%"),
        ("lite", "lite", "100", "50.00%"),
        ("teacher", "", "", "97.00%"),
    ]


def test_runs_of_two_caches(done, tmp_path):
    """Each cache has its own teacher row and chart of the loss; without it, the table does not name the cache."""
    facts = json.loads((done / "cache.json").read_text())
    other = changed(done, tmp_path / "other", "cache.json", facts["fingerprint"], "0" * len(facts["fingerprint"]))
    summary = json.loads((other / "summary.json").read_text()) | {"teacher_top1": 12.5}
    (other / "summary.json").write_text(json.dumps(summary))
    page = Page(run_report([done, other], RunReport(quick=True), CPU))
    assert [words.partition(".")[0] for words in page.charts if words.startswith("Loss,")] == [
        "Loss, cached targets: first", "Loss, cached targets: other"]  # fmt: skip
    rows = compared([done, other])
    assert [row["top-1"] for row in rows] == ["50.00%", "50.00%", "97.00%", "12.50%"]
    assert "cache" in rows[0]
    assert "cache" not in compared([done, done])[0]


def compared(folders):
    """The rows of the comparison's table."""
    first = read_facts(folders[0])
    runs = [read_run(path, None, first, CPU, [], timed=False) for path in folders]
    return compare_runs(runs, None, None)["rows"]


def test_mean_and_spread_over_seeds(four_pages):
    mean = re.findall(r"<td[^>]*>(.*?)</td>", four_pages.split("<tbody>")[2].split("</tbody>")[0])
    assert mean[2:8] == ["cap", "100", "2", "55.00 ± 7.07%", "50.00%", "60.00%"]


def test_losses_of_other_targets_have_their_own_chart(four_pages):
    losses = [words for words in Page(four_pages).charts if words.startswith("Loss") and "weighted loss over" in words]
    assert [re.findall(r"(\w+) goes", words) for words in losses if "terms" not in words] == [
        ["first", "second", "lite"],
        ["baseline"],
    ]


def test_a_run_has_one_color_and_its_name_in_all_charts(four_pages):
    """The baseline is the third run, and alone in the chart of its loss."""
    charts = re.search(r'id="charts">(.*?)</script>', four_pages, re.DOTALL)[1]
    drawn = [json.dumps(chart) for chart in json.loads(charts) if '"baseline"' in json.dumps(chart)]
    alone, throughput = (text for text in drawn if '"line_width": 2' in text)
    assert set(re.findall(r'"line_color": "(#\w{6})"', alone)) == {COLORS[2]}
    assert '"Legend"' in alone
    assert list(dict.fromkeys(re.findall(r'"line_color": "(#\w{6})", "line_width": 2', throughput))) == list(COLORS[:4])


def test_a_run_without_its_data_and_its_cache(done, tmp_path):
    run = changed(done, tmp_path / "run", "cache.json", '"source": "demo"', '"source": "gone"')
    text = Page(run_report([run], RunReport(), CPU)).text
    assert "No validation images are available" in text
    assert "Loss terms" in text
    other = changed(done, tmp_path / "other", "config.yaml", str(shared_cache().root), str(tmp_path / "no-cache"))
    assert "The teacher is omitted: no manifest" in Page(run_report([other], RunReport(images=5), CPU)).text


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(UserError, match="no run"):
        run_report([tmp_path], RunReport(), CPU)
    with pytest.raises(UserError, match="number of runs"):
        run_report([], RunReport(), CPU)
    with pytest.raises(UserError, match="is a folder"):
        write_page(tmp_path, "page")


@pytest.mark.parametrize("data", [b'{"format_version": 9}', b"\x89PNG", b"<svg>"])
def test_a_report_replaces_only_a_report(tmp_path, data):
    place = tmp_path / "page.html"
    place.write_bytes(data)
    with pytest.raises(UserError, match="would replace a file that is not a report"):
        write_page(place, "<!DOCTYPE html>1")
    assert place.read_bytes() == data
    place.write_bytes(b"")
    for page in ("<!DOCTYPE html>1", "<!DOCTYPE html>2"):
        write_page(place, page)
        assert place.read_text() == page


def test_reports_at_the_end_of_training(done, tmp_path, monkeypatch, capsys):
    """They need no forward pass. A newer one, which `scalekd report` may have written with predictions, is kept."""

    def fail(*_):
        raise AssertionError("a forward pass")

    monkeypatch.setattr("scalekd_cache.reports.predictions._speed", fail)
    monkeypatch.setattr("scalekd_cache.reports.run_data.predict_images", fail)
    folders = [tmp_path / name for name in ("one", "two")]
    pages = [*(folder / "report.html" for folder in folders), tmp_path / "one-and-1-more.html"]
    for folder in folders:
        shutil.copytree(done, folder)
    write_reports(folders, CPU._replace(rank=1))
    assert not any(page.exists() for page in pages)
    write_reports(folders[:1], CPU)
    assert f"report: {pages[0]} (" in capsys.readouterr().out
    assert f"To add them: scalekd report --run {folders[0]}" in Page(pages[0].read_text()).text
    pages[0].write_text("<!DOCTYPE html>with predictions")
    write_reports(folders, CPU)
    assert f"report: {pages[-1]} (" in capsys.readouterr().out
    assert pages[0].read_text() == "<!DOCTYPE html>with predictions"
    assert not (tmp_path / "comparison.html").exists()  # `scalekd report` writes it for other runs, too
    assert "Accuracy and size" in Page(pages[-1].read_text()).text
    (folders[0] / "summary.json").touch()
    write_reports(folders[:1], CPU)
    assert "Loss terms" in Page(pages[0].read_text()).text


def test_a_report_that_fails_does_not_fail_the_run(done, tmp_path, monkeypatch, capsys):
    shutil.copytree(done, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "scalekd_cache.reports.page", None)
    write_reports([tmp_path / "run"], CPU)
    assert re.search(r"could not write the report .*run: .+\n", capsys.readouterr().out)


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_at_any_width(cache_page, four_pages, hostile_cache, tmp_path, width):
    hostile = cache_report(hostile_cache, CacheReport(views=24, teacher_views=0, images=2), CPU)
    for page in (cache_page, hostile, four_pages):
        found = measure(page, width, tmp_path)
        assert found["images"] > 5
        assert (found["broken"], found["without_alt"], found["hacked"], found["small"]) == (0, 0, False, 0)
        assert found["width"] <= width  # nothing sticks out: no sideways scrolling
        assert found["clipped"] == []
        assert found["fetched"] == 0
        assert found["plots"] > 0
        assert found["undrawn"] == 0  # the policy admits the library
    assert re.search(r"first: [\d.]+ at step \d+", found["tooltip"])
    names = next(rows for head, rows in found["sorted"].items() if head.startswith("run"))
    assert names == sorted(names)
    by_time = next(rows for head, rows in found["by_last"].items() if head.startswith("run"))
    assert by_time == ["second", "first", "baseline", "lite", "teacher"]  # 18 seconds, a minute, 1.5 hours


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_screenshot_has_the_pictures_that_matter(cache_page, tmp_path, dark):
    file = screenshot(cache_page, 1280, 2000, tmp_path / "page.png", tmp_path, dark=dark)
    with Image.open(file) as image:
        shot = np.asarray(image.convert("RGB")).astype(int)
    assert shot.shape == (2000, 1280, 3)
    assert (shot[0, 0] > 200).all() != dark
    assert (shot.max(2) - shot.min(2) > 60).mean() > 0.02  # bars, histograms, maps
    shutil.rmtree(tmp_path / "profile")


@needs_browser
def test_no_other_script_runs(run_page, tmp_path):
    page = run_page.replace("</main>", "<script>window.hacked=1</script><img src=x onerror='hacked=1'></main>")
    assert not measure(page, 800, tmp_path)["hacked"]
    loose = re.sub(r"; script-src '[^']*'", "; script-src 'unsafe-inline'", page)
    assert measure(loose, 800, tmp_path)["hacked"]  # without the policy it would


def test_runs_from_other_weights_are_not_seeds_of_one_setting(done, tmp_path):
    """Each of --init and --student-size makes another setting; the seed does not."""
    runs = [read_run(done, None, read_facts(done), CPU, [], timed=False)]
    for number, (name, value) in enumerate({"init": "runs/before", "student": {"image_size": 32}}.items()):
        options = {**runs[0].options, "train": {**runs[0].options["train"], "seed": number + 1}}
        options[name] = {**options[name], **value} if isinstance(value, dict) else value
        runs.append(runs[0]._replace(options=options))
    assert mean_over_seeds(runs) == []
    other = {**runs[0].options, "train": {**runs[0].options["train"], "seed": 7}}
    (row,) = mean_over_seeds([*runs, runs[0]._replace(options=other)])
    assert row["seeds"] == "2"


def test_the_teacher_of_a_run_with_a_smaller_student(done):
    teacher = load_run_teacher(done, None, CPU)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert teacher(images[..., :48, :48]).shape == teacher(images).shape


@pytest.mark.parametrize(("place", "name"), [(".", "demo"), ("../demo", "demo"), ("../demo/.", "demo")])
def test_a_report_is_named_after_the_cache(tmp_path, monkeypatch, place, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert absolute(Path(place)) == tmp_path / name
