"""The report holds what happened, stands alone, and shows nothing that a user wrote as HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from puna.train import report
from puna.train.loss_picture import Curve, smoothed, svg_chart, thinned, ticks, with_smooth, write_png
from puna.train.report import History
from puna.train.trainer import Trainer, TrainResult
from training_data import tiny_config

pytestmark = pytest.mark.slow  # each trains a model

PROMPT = "<script>hello</script> & llama"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def result(place: Path) -> TrainResult:
    config = tiny_config(
        place, output=str(place / "out"), learning_rate=2e-2, eval_split=0.3, eval_steps=4,
        eval_on_start=True, num_train_epochs=20, sample_prompts=PROMPT, sample_max_tokens=5,
    )  # fmt: skip
    return Trainer(config).train()


class Page(HTMLParser):
    """Collect the tags of a page, and the cells of its tables by their heads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[str, str] = {}
        self._last = ("", "")
        self._head = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("th", "dt", "td", "dd"):
            self._last = (tag, "")

    def handle_data(self, data: str) -> None:
        self._last = (self._last[0], self._last[1] + data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "dt"):
            self._head = self._last[1]
        elif tag in ("td", "dd"):
            self.cells[self._head] = self._last[1]


def test_the_page_says_what_happened(place: Path, result: TrainResult) -> None:
    assert result.report == place / "out" / "report.html"
    text = result.report.read_text(encoding="utf-8")
    page = Page(text)
    history = History.read(place / "out" / "metrics.jsonl")
    losses = [value for _, value in history.points("loss")]
    measured = history.points("eval_loss")
    assert page.cells["steps"] == f"{result.step} of {result.total_steps}" and result.step >= 30
    assert page.cells["training loss"] == f"{losses[0]:.4f} to {losses[-1]:.4f}"
    assert page.cells["held-out loss"] == f"{measured[0][1]:.4f} to {measured[-1][1]:.4f}"
    assert page.cells["best step"] == str(result.best_step)
    assert page.cells["learning_rate"] == "0.02" and page.cells["puna"] and page.cells["torch"]
    assert "finished after step" in text
    dots = [attrs for tag, attrs in page.tags if tag == "circle"]
    assert len(dots) == len(measured)
    first = history.samples[0]["samples"][0]["answer"]
    assert page.cells["before"] == first


def test_the_page_stands_alone_and_escapes(result: TrainResult) -> None:
    assert result.report is not None
    text = result.report.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags} and "&lt;script&gt;hello" in text
    assert not [attrs for _, attrs in page.tags if attrs.keys() & {"src", "href"}]
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_curves_are_valid_svg_at_the_right_places() -> None:
    points = [(1.0, 0.0), (2.0, 10.0), (3.0, 5.0)]
    root = ElementTree.fromstring(svg_chart([Curve(name="a<b", points=points, has_dots=True)], label="x & y"))
    polyline = root.find("polyline")
    assert polyline is not None
    (x1, y1), (x2, y2), (x3, y3) = (map(float, p.split(",")) for p in polyline.attrib["points"].split())
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11) and y2 < y3 < y1
    assert (y1 - y3) == pytest.approx((y1 - y2) / 2, abs=0.11)
    titles = [title.text for title in root.iter("title")]
    assert titles == ["a<b, step 1: 0", "a<b, step 2: 10", "a<b, step 3: 5"]
    texts = [element.text for element in root.findall("text")]
    assert texts == ["0", "2", "4", "6", "8", "10", "1", "2", "3", "a<b"]


@pytest.mark.parametrize("points", [[(1.0, 3.0)], [(1.0, 0.0), (2.0, 0.0)], [(5.0, -1.0), (6.0, -1.0)]])
def test_flat_and_single_curves_have_finite_places(points: list[tuple[float, float]]) -> None:
    text = svg_chart([Curve(name="", points=points)], label="flat")
    assert not re.search(r"nan|inf", text)
    assert len(list(ElementTree.fromstring(text).iter("circle"))) == (len(points) == 1)


def test_ticks_are_round_numbers() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.93, 1.12) == pytest.approx([0.95, 1.0, 1.05, 1.1])
    assert ticks(-3, 4) == [-2, 0, 2, 4]


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    assert [v for _, v in smoothed([(1, 2.0), (2, 2.0), (3, 2.0)])] == pytest.approx([2.0, 2.0, 2.0])
    assert [v for _, v in smoothed([(1, 0.0), (2, 1.0)], weight=0.5)] == pytest.approx([0.0, 0.5 / 0.75])
    assert len(with_smooth("a", [(i, 0.0) for i in range(29)])) == 1
    faint, smooth = with_smooth("a", [(i, 0.0) for i in range(30)])
    assert faint.is_faint and smooth.name == "a, smoothed"


def test_thinning_keeps_peaks_and_ends() -> None:
    points = [(float(i), 0.0) for i in range(10_000)]
    points[777], points[9000] = (777.0, 9.0), (9000.0, -4.0)
    kept = thinned(points, 100)
    assert len(kept) <= 102 and {points[0], points[777], points[9000], points[-1]} <= set(kept)
    assert kept == sorted(kept) and thinned(points[:100], 100) == points[:100]


def test_a_broken_last_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "eval_loss": 3.0}\n{"step": 2, "lo')
    history = History.read(file)
    assert history.points("loss") == [(1, 2.0)] and history.points("eval_loss") == [(1, 3.0)]
    assert History.read(tmp_path / "none").steps == []


def test_the_picture_is_a_png(place: Path, result: TrainResult) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert result.picture == place / "out" / "loss.png"
    data = result.picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1600, 900)
    assert [path.name for path in (place / "out").iterdir() if path.name.startswith(".")] == []


def test_the_picture_shows_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    import matplotlib.image

    def darkness(curves: list[Curve]) -> float:
        write_png(tmp_path / "a.png", curves, title="t")
        picture: Any = matplotlib.image.imread(tmp_path / "a.png")
        return float((1 - picture[..., :3]).sum())

    line = Curve(name="a", points=[(0, 0.0), (10, 1.0)])
    bend = Curve(name="b", points=[(0, 1.0), (5, 0.0), (10, 1.0)], has_dots=True)
    assert darkness([line, bend]) > darkness([line]) + 100


def test_without_matplotlib_there_is_no_picture(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "can_draw_png", lambda: False)
    result = Trainer(tiny_config(place, output=str(tmp_path), max_steps=1)).train()
    assert result.picture is None and result.report == tmp_path / "report.html"
    assert not (tmp_path / "loss.png").exists()
