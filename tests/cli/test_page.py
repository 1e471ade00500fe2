"""The page of ``auto-trans inspect --html``: what is decided in Python, and what a real browser draws."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import quote

import oracle
import pytest

from auto_trans.core.layout import Box, Layout
from auto_trans.core.strategy import Strategy
from auto_trans.page import axes_of, draw_views, share_of_ranks, write_page

STRATEGIES = oracle.DATA / "mf_llama"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
EXPERT = Layout((2, 2), ((1,), (), (0,)))
LAYOUTS = {
    "matrix": Layout((2, 2), ((0,), (1,))),
    "columns": Layout((2, 2), ((), (0,))),
    "two axes on a dimension": Layout((2, 2), ((1, 0), ())),
    "expert, dims 0 and 1": Layout((2, 2), ((1,), (0,), ())),
    "expert, dims 0 and 2": EXPERT,
    "expert, dims 1 and 2": Layout((2, 2), ((), (0,), (1,))),
    "three dims": Layout((2, 3, 4), ((2,), (1,), (0,))),
    "four dims": Layout((2, 2, 3, 2), ((0,), (1,), (2,), (3,))),
    "vector": Layout((2, 2), ((0,),)),
    "replicated": Layout((2, 2), ((), ())),
    "optimizer shard": Layout((2, 2), ((0,), ()), -1, 2),
    "optimizer shard of an expert": Layout((2, 2, 2), ((), (1,), (0,)), 2, 4),
}


def job(layouts, stages=1, devices=None, refused=None):
    """A strategy of stages that hold parameters by ``{name: {stage: layout}}``."""
    if devices is None:
        devices = next(iter(next(iter(layouts.values())).values())).devices
    return Strategy(stages, devices, layouts, refused or {}, origin="job/strategy")


class Drawn(HTMLParser):
    """What a page shows: for every panel its boxes, each with the ranks and the offsets that its title tells."""

    def __init__(self, dom):
        super().__init__()
        self.panels, self.text, self.options = [], [], []
        self._open = []
        self.feed(dom)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._open.append(tag)
        if tag == "svg":
            self.panels.append([])
        elif tag == "rect" and attributes.get("class") == "box":
            self.panels[-1].append({key: float(attributes[key]) for key in ("x", "y", "width", "height")})
        elif tag == "option":
            self.options.append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open[-2:] == ["rect", "title"]:
            ranks, offset, size = re.fullmatch(r"rank (.*): offset \[(.*)\], size \[(.*)\]", data).groups()
            self.panels[-1][-1].update(ranks=numbers(ranks), offset=offset, size=size)
        elif self._open[-1:] == ["option"]:
            self.options[-1] += data
        elif "script" not in self._open and "style" not in self._open and data.strip():
            self.text.append(data.strip())


def numbers(text):
    """The ranks of a text such as ``0-1, 4``."""
    found = []
    for part in text.split(", "):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


@pytest.fixture
def browse(tmp_path):
    """Opens a page in a real browser, at a parameter, does there what a script says, and reads what it shows."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine")

    def run(page, name, script=""):
        page.write_text(page.read_text() + f"<script>{script}</script>")
        command = [browser, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        done = subprocess.run([*command, f"{page.as_uri()}#{quote(name)}"], capture_output=True, text=True, timeout=120)
        assert "<option" in done.stdout or "none of" in done.stdout, done.stderr[-2000:]
        return Drawn(done.stdout)

    return run


def assert_tiled(boxes):
    """The boxes fill the rectangle around them and none lies on another."""
    low_x, low_y = min(b["x"] for b in boxes), min(b["y"] for b in boxes)
    high_x, high_y = max(b["x"] + b["width"] for b in boxes), max(b["y"] + b["height"] for b in boxes)
    assert all(b["width"] >= 3.99 and b["height"] >= 3.99 for b in boxes), "large enough to see"
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            across = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
            along = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
            assert across < 0.01 or along < 0.01, f"ranks {a['ranks']} and {b['ranks']} lie on each other"
    area = sum(b["width"] * b["height"] for b in boxes)
    assert area == pytest.approx((high_x - low_x) * (high_y - low_y), rel=1e-3), "no gap"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_slice_is_visible_in_a_real_browser(browse, tmp_path, name):
    layout = LAYOUTS[name]
    write_page(tmp_path / "page.html", job({name: {0: layout}}), None)
    drawn = browse(tmp_path / "page.html", name)
    for panel in drawn.panels:
        assert_tiled(panel)
    boxes = [box for panel in drawn.panels for box in panel]
    assert len({(box["offset"], box["size"]) for box in boxes}) == len(boxes)
    assert sorted(rank for box in boxes for rank in box["ranks"]) == list(range(layout.devices))


def test_genuine_experts_in_a_real_browser(auto_trans, genuine, browse, tmp_path):
    case = genuine.model("toy_moe").strategy("dp2mp2ep2")
    weights = genuine.source("toy_moe", "dp2mp2ep2")
    auto_trans("inspect", case, "--weights", weights, "--param", "layers.0.w1", "--html", "page.html")
    drawn = browse(tmp_path / "page.html", "layers.0.w1")
    # w1 is 4 x 64 x 128, cut on dims 0 and 2
    assert [len(panel) for panel in drawn.panels] == [4]
    assert_tiled(drawn.panels[0])
    slices = genuine.model("toy_moe").slices("dp2mp2ep2")
    found = {}
    for box in drawn.panels[0]:
        offset, size = ([int(n) for n in box[key].split(",")] for key in ("offset", "size"))
        index = tuple(slice(o, o + s) for o, s in zip(offset, size))
        found.update({rank: genuine.model("toy_moe").full["layers.0.w1"][index] for rank in box["ranks"]})
    assert sorted(found) == [0, 1, 2, 3]
    assert all((slices[rank]["layers.0.w1"] == part).all() for rank, part in found.items())
    assert "dim 0: 4" in drawn.text and "dim 2: 128" in drawn.text
    assert "not cut and not drawn: dim 1 (64)" in drawn.text


def test_two_strategies_in_a_real_browser(auto_trans, genuine, browse, tmp_path):
    auto_trans(
        "inspect", STRATEGIES / "dp1mp2" / "strategy", "--diff", STRATEGIES / "dp2mp2_opt" / "strategy",
        "--weights", genuine.source("mf_llama", "dp1mp2"), "--param", "model.layers.0.*", "--html", "page.html",
    )  # fmt: skip
    page = (tmp_path / "page.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page, "self-contained"
    drawn = browse(tmp_path / "page.html", "")
    # 2 slices before, 4 after; the first parameter by name is wk: 64 x 64, of 4 bytes an element
    assert [len(panel) for panel in drawn.panels] == [2, 4]
    assert {"ranks": [2], "offset": "16,0", "size": "16,64"}.items() <= drawn.panels[1][1].items()
    assert "8.0 KiB" in drawn.text and "4.0 KiB" in drawn.text
    assert len(drawn.options) == 9


def test_panels_of_further_dimensions_are_labelled_in_a_real_browser(browse, tmp_path):
    after = job({"w": {0: Layout((2, 2, 2), ((1,), (2,), (0,)))}})
    write_page(tmp_path / "page.html", job({"w": {0: EXPERT}}), after)
    drawn = browse(tmp_path / "page.html", "w")
    assert [len(panel) for panel in drawn.panels] == [2, 2, 4, 4], "both sides have the same axes"
    assert drawn.text.count("dim 2: part 1 of 2") == 2 and drawn.text.count("dim 2: part 2 of 2") == 2


def test_page_opens_on_a_weight_of_the_model(browse, tmp_path):
    names = ("accu_grads.w", "adam_m.w", "w", "z.w")
    write_page(tmp_path / "page.html", job({name: {0: EXPERT} for name in names}), None)
    drawn = browse(tmp_path / "page.html", "")
    assert drawn.options == ["w", "z.w", "accu_grads.w", "adam_m.w"]
    assert "w" in drawn.text and "z.w" not in drawn.text


WIDTHS = "document.title = `${document.documentElement.scrollWidth} ${document.querySelector('svg').clientWidth}`;"


@pytest.mark.parametrize("name", ["matrix", "three dims", "optimizer shard"])
def test_page_fits_a_narrow_screen(browse, tmp_path, name):
    """A window cannot be as narrow, but a frame can."""
    long = f"model.{'layers_of_a_long_name.' * 4}{name}"
    write_page(tmp_path / "inner.html", job({long: {0: LAYOUTS[name]}}), job({long: {0: LAYOUTS[name]}}))
    page = (tmp_path / "inner.html").read_text() + f"<script>{WIDTHS}</script>"
    frame = f'<option></option><iframe width="420" height="900" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
    (tmp_path / "page.html").write_text(frame)
    script = "onload = () => document.body.append(document.querySelector('iframe').contentDocument.title);"
    (told,) = browse(tmp_path / "page.html", "", script).text
    whole, drawn = map(int, told.split())
    assert whole <= 420 and 140 < drawn < 400


def test_bars_of_replicas_have_the_colour_of_their_slice(browse, tmp_path):
    """Ranks 0 and 1 share a slice, and so do ranks 2 and 3."""
    write_page(tmp_path / "page.html", job({"w": {0: Layout((2, 2), ((1,), ()))}}), None)
    hues = "[...document.querySelectorAll('.bar i, .box')].map(e => e.style.getPropertyValue('--hue'))"
    script = f"document.body.append({hues}.join(' '));"
    boxes, bars = ["0", "275"], ["0", "0", "275", "275"]
    assert browse(tmp_path / "page.html", "w", script).text[-1].split() == boxes + bars


def test_what_cannot_be_drawn_is_said_in_a_real_browser(browse, tmp_path):
    before = job({"w": {0: Layout((2,), ((0,), ()))}}, refused={"r": "its kind is not known"})
    write_page(tmp_path / "page.html", before, job({"after": {0: Layout((2,))}}))
    assert "refused: its kind is not known" in browse(tmp_path / "page.html", "r").text
    drawn = browse(tmp_path / "page.html", "w")
    assert len(drawn.panels) == 1 and "not listed" in drawn.text
    assert drawn.options == ["after", "r", "w"]


def test_slices_of_a_thousand_ranks_stay_large_enough_in_a_real_browser(browse, tmp_path):
    layout = Layout((128, 8), ((0,), ()), -1, 8)
    write_page(tmp_path / "page.html", job({"w": {1: layout}}, stages=2, devices=1024), None)
    drawn = browse(tmp_path / "page.html", "w")
    assert len(drawn.panels[0]) == 1024
    assert all(box["height"] >= 3.99 for box in drawn.panels[0])
    assert sorted(rank for box in drawn.panels[0] for rank in box["ranks"]) == list(range(1024, 2048))
    assert [text for text in drawn.text if text.startswith("rank")] == ["rank 0-1023", "rank 1024-2047"]


@pytest.mark.parametrize(
    "typed, left, shown",
    [
        ("", ["layer.0.wk", "layer.0.wq", "layer.1.wq"], "layer.0.wk"),
        ("WQ", ["layer.0.wq", "layer.1.wq"], "layer.0.wq"),
        ("wq 1.", ["layer.1.wq"], "layer.1.wq"),
        ("none", [], None),
    ],
)
def test_filter_narrows_the_parameters_in_a_real_browser(browse, tmp_path, typed, left, shown):
    names = ("layer.0.wk", "layer.0.wq", "layer.1.wq")
    write_page(tmp_path / "page.html", job({name: {0: EXPERT} for name in names}), None)
    script = f"filter.value = {typed!r}; filter.dispatchEvent(new Event('input'));"
    drawn = browse(tmp_path / "page.html", "", script)
    assert drawn.options == left
    assert [text for text in drawn.text if text.startswith("layer")] == [shown] * (shown is not None)
    assert bool(drawn.panels) == bool(left)


def test_table_tells_every_slice_in_a_real_browser(browse, tmp_path):
    write_page(tmp_path / "page.html", job({"w": {0: EXPERT}}), None)
    drawn = browse(tmp_path / "page.html", "w", "document.querySelector('details').open = true;")
    rows = drawn.text[drawn.text.index("The 4 slices as a table") + 1 :]
    assert rows[:4] == ["rank", "dim 0", "dim 1", "dim 2"]
    assert rows[4:8] == ["0", "part 1 of 2", "whole", "part 1 of 2"]
    assert rows[8::4] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "ndim, grids, axes",
    [
        (0, [()], ()),
        (1, [(4,)], (0,)),
        (2, [(1, 4)], (0, 1)),
        (3, [(2, 1, 2)], (0, 2)),
        (3, [(1, 1, 1)], (0, 1)),
        (3, [(2, 2, 2)], (0, 1)),
        (3, [(2, 2, 8)], (0, 2)),
        (3, [(2, 1, 1), (1, 1, 4)], (0, 2)),
        (4, [(1, 2, 1, 2)], (1, 3)),
        (2, [], (0, 1)),
    ],
)
def test_the_dimensions_that_are_cut_most_are_the_axes(ndim, grids, axes):
    assert axes_of(ndim, grids) == axes


def test_panels_hold_every_slice_once():
    layout = LAYOUTS["three dims"]
    (view,) = draw_views(job({"w": {0: layout}}), "w", (4, 6, 8), (1, 2))
    assert [panel.fixed for panel in view.panels] == [{0: 0}, {0: 1}]
    for panel in view.panels:
        assert {part.box.offset[0] for part in panel.slices} == {panel.fixed[0] * 2}
    found = {rank: part.box for panel in view.panels for part in panel.slices for rank in part.ranks}
    assert found == {rank: layout.box(rank, (4, 6, 8)) for rank in range(24)}


def test_stages_that_slice_alike_are_one_view():
    cut, whole = Layout((2,), ((0,), ())), Layout((2,))
    first, second = draw_views(job({"w": {0: cut, 1: whole, 2: cut}}, 3), "w", (4, 4), (0, 1))
    assert first.stages == (0, 2) and second.stages == (1,)
    assert [part.ranks for part in first.panels[0].slices] == [(0, 4), (1, 5)]
    assert [part.ranks for part in second.panels[0].slices] == [(2, 3)]
    assert second.panels[0].slices[0].box == Box((0, 0), (4, 4))


@pytest.mark.parametrize("shape, problem", [((7, 4), "does not divide"), ((), "cannot be that of a tensor with 0")])
def test_a_layout_that_does_not_fit_is_a_problem_and_no_drawing(shape, problem):
    strategy = job({"w": {0: Layout((2,), ((0,), ()))}})
    (view,) = draw_views(strategy, "w", shape, ())
    assert problem in view.problem and not view.panels
    assert share_of_ranks([view], 2) == []


def test_a_scalar_is_one_slice():
    (view,) = draw_views(job({"w": {0: Layout((4,))}}), "w", (), ())
    assert [part.ranks for part in view.panels[0].slices] == [(0, 1, 2, 3)]
    assert share_of_ranks([view], 4) == [(range(rank, rank + 1), 1) for rank in range(4)]


def test_ranks_that_hold_nothing_and_many_equal_ranks_share_a_bar():
    small = job({"w": {1: Layout((2,), ((0,), ()))}}, 2)
    assert share_of_ranks(draw_views(small, "w", (4, 4), (0, 1)), 4) == [
        (range(0, 2), 0),
        (range(2, 3), 8),
        (range(3, 4), 8),
    ]
    large = job({"w": {0: Layout((512,), ((0,),)), 2: Layout((512,), ((),))}}, 3)
    shares = share_of_ranks(draw_views(large, "w", (512,), (0,)), 1536)
    assert shares == [(range(0, 512), 1), (range(512, 1024), 0), (range(1024, 1536), 512)]


def test_layouts_for_different_numbers_of_dimensions_are_told_and_stop_no_page(tmp_path):
    flat = job({"w": {0: Layout((2,), ((0,),), ndims=(1,))}})
    write_page(tmp_path / "page.html", flat, job({"w": {0: Layout((2,), ((), (0,)))}}))
    assert "cannot be that of a tensor with 1" in (tmp_path / "page.html").read_text()


def test_parameters_sliced_alike_share_a_drawing(tmp_path):
    layout = Layout((64, 8), ((0,), ()), -1, 8)
    write_page(tmp_path / "one.html", job({"w0": {0: layout}}), None)
    write_page(tmp_path / "many.html", job({f"w{i}": {0: layout} for i in range(300)}), None)
    assert (tmp_path / "many.html").stat().st_size - (tmp_path / "one.html").stat().st_size < 300 * 20


def test_page_needs_a_parameter(auto_trans):
    done = auto_trans("inspect", STRATEGIES / "dp1mp2" / "strategy", "--param", "none", "--html", "page.html", code=1)
    assert "no parameter of" in done.stderr
