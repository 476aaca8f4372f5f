"""The report: what a page says of a run's records, in bounded memory, and how it looks in a real browser."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.tools.report.charts import Axis, Line, chart, short
from moe_lm.tools.report.heatmap import DEAD, EVEN, LAST, heat_map, levels, png
from moe_lm.tools.report.page import differences, page_of
from moe_lm.tools.report.reading import HELD_OUT, POINTS, Run, column, read_run
from moe_lm.tools.report.report import report
from moe_lm.tools.report.thinning import Spans, Spread
from moe_lm.tools.report.words import facts, loss_title, points, standing, verdict
from tests.sick import HEALTHY, run_of

MoeLm = Callable[..., Any]  # the fixture `moe_lm`
Record = dict[str, Any]


def step(number: int, **more: Any) -> Record:
    """A record of a healthy step with two MoE layers of eight experts; a step takes 10 s, of which 1 is between."""
    layer = {"max_violation": 0.3, "entropy": 0.98, "dead_share": 0.0}
    loaded = layer | {"load": [100, 100, 0, 200, 100, 100, 100, 100]}
    return {
        "step": number, "loss": 4 - number / 100, "lr": 3e-4, "grad_norm": 0.5, "tokens": 200, "seconds": 9.0,
        "tokens_per_second": 22.0, "data_seconds": 0.5, "skipped": False, "time": 1e9 + 10 * number,
        "tokens_so_far": 200 * number, "experts": [layer | loaded, loaded if number % 2 else layer], **more,
    }  # fmt: skip


def event(kind: str, number: int, message: str = "", **more: Any) -> Record:
    return {"event": kind, "step": number, "time": 1e9, "message": message, **more}


@pytest.fixture
def run_with(tmp_path: Path) -> Callable[..., Run]:
    """Reads a run folder with these lines."""

    def read(*lines: Record, name: str = "mine", **settings: Any) -> Run:
        folder = tmp_path / name
        run_of(HEALTHY, folder, steps=40, **settings)
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return read_run(folder)

    return read


ReadRun = Callable[..., Run]

# The whole way


def test_the_page_of_a_run_needs_no_network_and_no_script(pretrained: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    page = tmp_path / "page.html"
    done = moe_lm("report", pretrained, "--out", page)
    assert (done.code, done.out) == (0, f"wrote {page}\n")
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|<script|@import|url\(", text)
    assert "Nothing looks wrong" in text
    assert "Training loss fell from" in text
    assert text.count('class="heat"') == 2
    assert "train.optimizer.lr" in text


# What it reads


def test_a_checkpoint_means_its_run_and_a_run_may_be_called_like_one(
    tmp_path: Path, run_with: ReadRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_with(step(1), name="step-study").step == 1
    folder = tmp_path / "mine" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    run_with(step(1))
    monkeypatch.chdir(folder)
    for path in (folder, Path(), Path("../step-00000001")):
        assert read_run(path).name == f"{tmp_path.name}/mine"
    monkeypatch.chdir(folder.parent)
    assert read_run(Path(folder.name)).folder == Path("..")


def test_the_held_out_loss_is_the_last_one_and_not_that_of_a_span(run_with: ReadRun) -> None:
    evaluations = 3 * POINTS
    run = run_with(*(step(number, val_loss=3 - number / evaluations) for number in range(1, evaluations + 1)))
    told = dict(facts(run))
    assert told["held-out loss"] == "2"
    assert told["lowest held-out loss"] == f"2 after step {evaluations}"


def test_pauses_are_no_training_and_tokens_go_on(run_with: ReadRun) -> None:
    later = {"time": 2e9, "seconds": 9.0}
    run = run_with(step(1), step(2), event("stop", 2), event("start", 2), step(3, **later), step(4, time=2e9 + 12))
    assert run.hours * 3600 == pytest.approx(9 + 10 + 9 + 12)
    assert run.tokens == 800
    old = [{key: value for key, value in step(n).items() if key not in ("time", "tokens_so_far")} for n in (1, 2)]
    run = run_with(*old)
    assert (run.hours * 3600, run.tokens) == (pytest.approx(18), 400)


def test_held_out_losses_samples_and_tasks_are_kept_with_their_steps(run_with: ReadRun) -> None:
    sources = {"val_loss": 3.0, "val_loss_by_source": {"books": 2.5}}
    run = run_with(
        {"step": 0, "val_loss": 5.0, "time": 1e9}, step(1, **sources), step(2, val_loss=3.5),
        event("sample", 2, prompt="Once <b>", text="upon <script>alert(1)</script>"),
        event("tasks", 2, tasks={"blimp": {"acc": 0.712, "stderr": 0.014, "n": 67}}),
    )  # fmt: skip
    assert run.best == (1, 3.0)
    assert column(run.held_out.means(), HELD_OUT, "val_loss").tolist() == [5.0, 3.0, 3.5]
    page = page_of([run])
    for said in ("3 after step 1", "held-out loss of books", "0.712 ± 0.014 (acc)", "Once &lt;b&gt;"):
        assert said in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([event("gave_up", 2, "no good checkpoint")], "gave up after 2 of 40 steps"),
        ([event("stop", 2, "SIGTERM")], "stopped after 2 of 40 steps; the same command goes on"),
        ([event("early_stop", 2, "ended early after step 2: no")], "ended early after step 2: no; 2 of 40 steps"),
        ([step(40)], "finished, 40 of 40 steps"),
        ([], "2 of 40 steps, the last at 2001-09-09"),
    ],
)
def test_the_page_says_where_a_run_stands(run_with: ReadRun, lines: list[Record], said: str) -> None:
    assert standing(run_with(step(1), step(2), *lines)).startswith(said)


def test_what_went_wrong_between_steps_is_a_point_too(run_with: ReadRun) -> None:
    run = run_with(step(1), event("rollback", 1, "back to step 0"), event("slow_rank", 1, "rank 3 is slow"), step(2))
    assert [(point.title, point.said) for point in points(run)] == [
        ("Rollback", "Back to step 0"), ("Slow rank", "Rank 3 is slow"),
    ]  # fmt: skip
    assert verdict(run, points(run)) == "2 things look wrong."


def test_an_alarm_of_steps_that_were_dropped_is_kept(run_with: ReadRun) -> None:
    """A rollback takes the steps out of the log, but not what was said of them."""
    alarm = event("alarm", 30, "loss spike: the loss jumps. Look.", symptom="loss spike", cure="Look.")
    (point,) = points(run_with(step(1), alarm, step(2)))
    assert (point.title, point.when, point.said, point.cure) == (
        "Loss spike", "said at step 30", "The loss jumps.", "Look.",
    )  # fmt: skip


def test_symptoms_of_the_settings_are_there(run_with: ReadRun) -> None:
    start = event("start", 0, fresh=True, epochs={"books": 9.0}, model=None)
    found = points(run_with(start, step(1), schedule={"warmup_steps": 100}))
    assert [(point.title, point.when) for point in found] == [
        ("Warm-up too long", "by the settings"), ("Repeated data", "by the settings"),
    ]  # fmt: skip


def test_records_that_cannot_be_judged_are_said_and_drawn(run_with: ReadRun) -> None:
    run = run_with(*({"step": number, "loss": 1.0} for number in range(1, 4)))
    assert "could not be looked for: the record of step 1 lacks figures" in page_of([run])
    (run.folder / "config.yaml").write_text("a: [1")
    assert "could not be looked for: the config" in page_of([read_run(run.folder)])


def test_of_runs_with_one_name_the_title_says_the_folder(run_with: ReadRun) -> None:
    runs = [run_with(step(1, loss=loss)) for loss in (2.0, 1.0, math.nan)]
    named = [replace(run, name="run", folder=Path(place)) for run, place in zip(runs, "abc", strict=True)]
    assert loss_title(named) == "Training loss ends lowest in b, at 1"
    assert loss_title(named[2:] * 2) == "No step had a finite loss"
    assert loss_title([replace(named[0], name="first"), *named[2:]]) == "Training loss ends lowest in first, at 2"


def test_torn_and_strange_lines_are_passed_over(run_with: ReadRun) -> None:
    run = run_with(step(1))
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[]\nnull\n{"step": "x"}\n\xff\xfe\n{"step": 2, "lo')
    assert read_run(run.folder).step == 1


def test_bad_input_is_said(tmp_path: Path, run_with: ReadRun, moe_lm: MoeLm) -> None:
    done = moe_lm("report", tmp_path)
    assert (done.code, "holds no metrics.jsonl; expected the folder of a run that has begun" in done.err) == (2, True)
    (tmp_path / "merged" / "checkpoints" / "step-00000000").mkdir(parents=True)
    with pytest.raises(UsageError, match="merged was imported, upcycled or merged, and no training of it is recorded"):
        read_run(tmp_path / "merged")
    with pytest.raises(UsageError, match="has no step yet"):
        run_with(event("start", 0))
    with pytest.raises(UsageError, match="9 runs are more than one page tells apart"):
        report([tmp_path] * 9)


def test_a_page_that_cannot_be_written_is_said_before_the_records_are_read(
    tmp_path: Path, run_with: ReadRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoeLmError, match=r"cannot write .*file/page.html: .*; name another --out"):
        report([tmp_path / "none"], tmp_path / "file" / "page.html")
    monkeypatch.setattr("moe_lm.tools.report.report.NAME", "none/report.html")  # in the run folder
    folder = run_with(step(1)).folder
    with pytest.raises(MoeLmError, match=r"cannot write .*report.html: No such file or directory; name another --out"):
        report([folder])


def test_several_runs_share_their_pictures_and_a_table_of_differences(run_with: ReadRun) -> None:
    runs = [run_with(step(1), step(2, loss=loss), name=f"r{loss}", eval_every=loss) for loss in (3, 2)]
    assert differences(runs) == [("train.eval_every", ["3", "2"])]
    page = page_of(runs)
    assert re.search(r"Training loss ends lowest in [\w-]*/r2, at 2\b", page)
    assert page.count('class="line c1"></i>') == 6  # in the legend of every shared picture


# In bounded memory


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 1000])
def test_spans_have_the_means_lows_and_highs_of_equal_numbers_of_rows(rows: int) -> None:
    values = np.random.default_rng(rows).normal(size=(rows, 2))
    values[::3, 1] = np.nan
    spans = Spans(8)
    for row in values:
        spans.add(row)
    size = spans.rows_of_a_span
    assert len(spans) <= 16
    assert len(spans) == -(-rows // size)
    for place, (mean, low, high) in enumerate(zip(spans.means(), spans.lows(), spans.highs(), strict=True)):
        own = values[place * size : (place + 1) * size]
        assert mean[0] == pytest.approx(own[:, 0].mean())
        known = own[~np.isnan(own[:, 1]), 1]
        expected = (known.mean(), known.min(), known.max()) if len(known) else (np.nan,) * 3
        assert (mean[1], low[1], high[1]) == pytest.approx(expected, nan_ok=True)


def test_spread_items_are_even_and_have_the_newest() -> None:
    spread = Spread(4)
    for number in range(1001):
        spread.add(number)
        assert len(spread.items) <= 9
    assert spread.number == 1001
    assert spread.items[-1] == 1000
    gaps = set(np.diff(spread.items[:-1]).tolist())
    assert len(gaps) == 1


def test_a_long_run_gives_a_small_page(run_with: ReadRun) -> None:
    lines = [step(number) if number % 5 else event("skip", number) for number in range(1, 3001)]
    assert len(page_of([run_with(*lines)])) < 150_000


# Pictures


def test_a_picture_of_the_load_is_a_png_of_its_levels() -> None:
    shares = np.array([[0.0, 100.0], [12.5, 800.0], [50.0, 3200.0]])
    places = levels(shares)
    assert places.tolist() == [[DEAD, EVEN], [1, LAST], [round(EVEN - 127 / 3), LAST]]
    content = base64.b64decode(png(places).partition(",")[2])
    assert content[16:24] == bytes([0, 0, 0, 2, 0, 0, 0, 3])  # width and height
    length = int.from_bytes(content[(at := content.index(b"IDAT")) - 4 : at])
    rows = zlib.decompress(content[at + 4 : at + 4 + length])
    assert [list(rows[start + 1 : start + 3]) for start in (0, 3, 6)] == places.tolist()


def test_the_title_of_a_layer_says_what_one_sees() -> None:
    steps = np.arange(8.0)
    shares = np.full((8, 4), 100.0)
    assert "Layer 3: even, at most 1.0 times" in heat_map(3, steps, shares)
    shares[-1, 2] = 0
    assert "without" not in heat_map(3, steps, shares)  # in one span, by chance
    shares[-3:, 2] = 0
    assert "Layer 3: 1 of 4 experts without tokens" in heat_map(3, steps, shares)


def test_a_line_has_gaps_where_there_is_no_figure_and_far_values_make_the_axis_logarithmic() -> None:
    x = np.arange(5.0)
    drawn = chart("Title <1>", [Line("a", x, np.array([1.0, 2.0, np.nan, 3.0, 4.0]))], "step", "loss")
    assert "Title &lt;1&gt;" in drawn
    (path,) = re.findall(r'class="line c0" d="([^"]+)"', drawn)
    assert path.count("M") == 2
    assert "logarithmic" not in drawn
    assert "loss (logarithmic)" in chart("t", [Line("a", x, np.array([1.0, 1, 1, 1, 1000]))], "step", "loss")
    assert chart("t", [Line("a", x, np.full(5, np.nan))], "step", "loss") == ""


@pytest.mark.parametrize("ends", [(0, 1), (3, 3), (0, 0), (1e-9, 3e-9), (12, 99_000), (-5, 7), (2.0, 2.0000001)])
def test_an_axis_has_a_few_round_ticks_within_its_ends(ends: tuple[float, float]) -> None:
    axis = Axis.over(np.array(ends, dtype=float), False, 0, 100)
    ticks = axis.ticks(4)
    assert 1 <= len(ticks) <= 6
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in axis.place(np.array(ticks)))


def test_numbers_are_short() -> None:
    values = (0, 3e-4, 0.25, 12, 1500, 2.5e6, 7e9)
    assert [short(value) for value in values] == ["0", "3e-4", "0.25", "12", "1.5k", "2.5M", "7B"]


# In a real browser


@pytest.fixture
def chromium() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def test_the_page_fits_a_phone_and_a_desk_and_breaks_no_rule_of_its_own(run_with: ReadRun, chromium: Any) -> None:
    runs = [run_with(*(step(n) for n in range(1, 30)), event("save", 29), name=name) for name in ("a" * 60, "b")]
    page = runs[0].folder / "page.html"
    page.write_text(page_of(runs))
    chromium.get(page.as_uri())
    for detail in chromium.find_elements("tag name", "details"):
        chromium.execute_script("arguments[0].open = true", detail)
    for width in (320, 1280):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    images = chromium.find_elements("css selector", ".heat img")
    assert [image.get_property("naturalHeight") for image in images] == [8] * len(images)
    assert len(images) == 4
    assert chromium.get_log("browser") == []
