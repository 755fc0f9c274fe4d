import base64
import copy
import itertools
import pickle
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO, StringIO

import numpy as np
import pytest
import torch
from PIL import Image

import approxconv
from approxconv import Multiplier, compare
from approxconv.pictures import heat_map_text, pareto_front

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "<script>alert('1')</script>\"&\x1b[31m\n\u202e\ud800 $x_1$ [red]"
FORMATS = [
    ((2, 2), (False, False)),
    ((2, 2), (True, True)),
    ((3, 5), (True, False)),
    ((5, 3), (False, True)),
    ((8, 4), (False, True)),
    ((2, 8), (True, True)),
    ((8, 8), (False, True)),
    ((8, 8), (True, False)),
]
every_format = pytest.mark.parametrize(("bits", "flags"), FORMATS, ids=str)

# References work on one pair of Python ints at a time.


def ascending(bits, signed):
    return list(range(-(2 ** (bits - 1)), 2 ** (bits - 1))) if signed else list(range(2**bits))


def product_with_error(bits, flags, name="", seed=0):
    """A multiplier, and its error by ascending values as nested lists."""
    error = np.random.default_rng(seed).integers(-50, 90, (2 ** bits[0], 2 ** bits[1])).tolist()
    a, w = (ascending(n, signed) for n, signed in zip(bits, flags, strict=True))
    table = np.zeros((len(a), len(w)), int)
    for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(w)):
        table[x % len(a), y % len(w)] = x * y + error[i][j]  # Python's % is the code of a negative value
    return Multiplier(table, a_signed=flags[0], w_signed=flags[1], name=name), error


def known(power, error, name="", unit="mW"):
    """A 2-bit multiplier with all entries off by `error`."""
    m = Multiplier.exact(2, False, False)
    info = {} if power is None else {"power": f"{power} {unit}"}
    return Multiplier(m.table + error, a_signed=False, w_signed=False, name=name, info=info)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def texts(figure):
    """Every text that is drawn, tick labels too."""
    import matplotlib.text

    figure.draw_without_rendering()
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]


def margins(figure):
    """The heat map's axes, that above it, that to the right of it and the colour bar's."""
    axes = figure.axes[0]
    above, right, bar = axes.child_axes
    return axes, above, right, bar


def steps(axes, label):
    (found,) = [p for p in axes.patches if p.get_label() == label]
    return found.get_data()


def test_nothing_heavy_is_imported_before_something_is_drawn():
    code = """
import sys, approxconv
from approxconv.pictures import heat_map_text
assert not {"matplotlib", "rich", "PIL"} & set(sys.modules)
m = approxconv.get_multiplier("drum3_4u")
heat_map_text(m)
assert "matplotlib" not in sys.modules
m.plot().savefig(sys.argv[1]), m._repr_png_(), m._repr_html_(), approxconv.compare(["drum3_4u", m])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, "/dev/null"], check=True, timeout=120)


@every_format
@pytest.mark.filterwarnings("error")
def test_the_map_is_the_error_by_value(bits, flags):
    m, error = product_with_error(bits, flags, "some_name")
    figure = m.plot()
    axes, _, _, bar = margins(figure)
    (image,) = axes.images
    assert image.get_array().tolist() == error
    assert image.origin == "lower"
    (a_low, a_high), (w_low, w_high) = m.a_range, m.w_range
    assert image.get_extent() == [w_low - 0.5, w_high + 0.5, a_low - 0.5, a_high + 0.5]
    largest = max(abs(e) for row in error for e in row)
    assert image.get_clim() == (-largest, largest)
    formats = [f"{'' if signed else 'u'}int{n}" for n, signed in zip(bits, flags, strict=True)]
    assert (axes.get_ylabel(), axes.get_xlabel()) == (f"activation ({formats[0]})", f"weight ({formats[1]})")
    for ticks, (low, high) in ((axes.get_yticks(), m.a_range), (axes.get_xticks(), m.w_range)):
        assert ticks[0] == low
        assert ticks[-1] == high
        assert 3 <= len(ticks) <= 6
        assert 0 in ticks
    assert bar.get_ylabel() == "error"
    metrics = m.metrics()
    drawn = texts(figure)
    assert "some_name" in drawn
    assert any(
        all(f"{key.strip('%')} {metrics[key]:.4g}" in text for key in ("MAE", "WCE", "EP%", "MRE%")) for text in drawn
    )


@every_format
def test_the_margins_are_means(bits, flags):
    m, error = product_with_error(bits, flags)
    _, above, right, _ = margins(m.plot())
    for axes, rows, (low, high) in ((right, error, m.a_range), (above, zip(*error, strict=True), m.w_range)):
        rows = list(rows)
        magnitude, signed = steps(axes, "mean |error|"), steps(axes, "mean error")
        assert magnitude.values == pytest.approx([mean(map(abs, row)) for row in rows], rel=1e-12)
        assert signed.values == pytest.approx([mean(row) for row in rows], rel=1e-12, abs=1e-12)
        for each in (magnitude, signed):
            assert each.edges.tolist() == [v - 0.5 for v in range(low, high + 2)]


def test_histograms_weigh_the_margins_and_the_title():
    m, error = product_with_error((3, 2), (True, False))
    by_code, w_hist = [5, 0, 1, 2, 9, 0, 0, 3], torch.tensor([1, 0, 2, 5])
    figure = m.plot(a_hist=by_code, w_hist=w_hist)
    _, above, right, _ = margins(figure)
    a_hist = by_code[4:] + by_code[:4]  # by value
    expected = [sum(abs(e) * n for e, n in zip(row, [1, 0, 2, 5], strict=True)) / 8 for row in error]
    assert steps(right, "mean |error|").values == pytest.approx(expected)
    expected = [sum(e * n for e, n in zip(column, a_hist, strict=True)) / 20 for column in zip(*error, strict=True)]
    assert steps(above, "mean error").values == pytest.approx(expected)
    shares = steps(right, "how often").values
    assert shares / shares.sum() == pytest.approx(np.array(a_hist) / 20)
    assert any(f"MAE {m.metrics(by_code, w_hist)['MAE']:.4g}" in text for text in texts(figure))
    one = m.plot(w_hist=w_hist)
    assert "how often" not in {p.get_label() for p in margins(one)[2].patches}
    assert "how often" in {p.get_label() for p in margins(one)[1].patches}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("relative", [False, True])
def test_a_histogram_that_leaves_nothing_to_divide_by(relative):
    m, _ = product_with_error((3, 2), (True, False))
    figure = m.plot(a_hist=[1] + [0] * 7, w_hist=[0, 0, 7, 0], relative=relative)
    figure.draw_without_rendering()
    above = steps(margins(figure)[1], "mean |error|").values
    assert (above == 0).all() is np.bool_(relative)
    assert any("MRE –" in text for text in texts(figure))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("bits", "flags"), [((3, 4), (True, False)), ((8, 8), (True, True))])
def test_relative_error(bits, flags):
    m, error = product_with_error(bits, flags)
    figure = m.plot(relative=True)
    axes, _, right, bar = margins(figure)
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    a, w = (ascending(n, signed) for n, signed in zip(bits, flags, strict=True))
    for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(w)):
        if x * y:
            assert shown[i, j] == pytest.approx(100 * error[i][j] / (x * y))
        else:
            assert np.isnan(shown[i, j])
    i = a.index(1)
    expected = mean(100 * abs(error[i][j] / y) for j, y in enumerate(w) if y)
    assert steps(right, "mean |error|").values[i] == pytest.approx(expected)
    assert steps(right, "mean |error|").values[a.index(0)] == 0
    magnitude = sorted(abs(v) for v in shown.ravel() if not np.isnan(v))
    limit = axes.images[0].get_clim()[1]
    assert limit in magnitude
    assert mean(v <= limit for v in magnitude) >= 0.99
    assert bar.get_ylabel() == "error in % of a·w"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("bits", [(2, 2), (8, 8), (2, 8)])
def test_a_map_without_errors_is_flat(bits, relative):
    figure = Multiplier.exact(bits, False, True).plot(relative=relative)
    axes, _, right, bar = margins(figure)
    assert np.nansum(np.abs(axes.images[0].get_array().astype(float).filled(0))) == 0
    assert axes.images[0].get_clim() == (-1, 1)
    assert bar.get_yticks().tolist() == [0]
    assert not steps(right, "mean |error|").values.any()
    assert "exact" in "".join(texts(figure))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [-77, 77, 2**31 - 1])
@pytest.mark.parametrize("bits", [(2, 2), (8, 8)])
def test_a_single_wrong_pair_is_seen(bits, error):
    table = torch.zeros(2 ** bits[0], 2 ** bits[1], dtype=torch.long) + Multiplier.exact(bits, False, True).table
    table[0, 1] = error
    m = Multiplier(table, a_signed=False, w_signed=True)
    figure = m.plot()
    axes, above, _, bar = margins(figure)
    shown = axes.images[0].get_array()
    row, column = 0, -m.w_range[0] + 1
    assert shown[row, column] == error
    assert np.count_nonzero(shown) == 1
    assert steps(above, "mean |error|").values[column] == pytest.approx(abs(error) / 2 ** bits[0])
    # One sign only: the bar ends at 0, colours mean the same.
    assert axes.images[0].get_clim() == (-abs(error), abs(error))
    assert sorted(bar.get_ylim()) == sorted((0, error))
    assert "mean error" not in {p.get_label() for p in above.patches}
    rings = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
    assert rings == ([([1], [0])] if bits == (8, 8) else [])
    pixels = np.asarray(Image.open(BytesIO(figure._repr_png_())).convert("RGB")).astype(int)
    assert (np.abs(pixels[..., 0] - pixels[..., 2]) > 80).any()


def test_plot_into_given_axes():
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subplots(1, 2)
    m, error = product_with_error((3, 3), (False, False))
    assert m.plot(right) is figure
    assert right.images[0].get_array().tolist() == error
    assert not left.images
    part = Figure().subfigures(1, 2)[0]
    assert m.plot(part.add_subplot()) is part.figure.figure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ax": 7}, "ax must be a matplotlib Axes or None, got int"),
        ({"relative": 1}, "relative must be True or False, got 1"),
        ({"a_hist": [1, 2]}, r"a_hist must have one count a code, shape \(4,\), got \(2,\)"),
        ({"w_hist": [-1, 0, 0, 2]}, "w_hist must be finite, not negative"),
    ],
)
def test_plot_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Multiplier.exact(2).plot(**arguments)


def test_figures_are_shown_by_notebooks_and_pickled():
    from matplotlib.figure import Figure

    m, _ = product_with_error((3, 3), (False, False))
    for figure in (m.plot(), compare([m])):
        assert isinstance(figure, Figure)
        assert figure._repr_png_().startswith(PNG)
        assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(PNG)


def test_no_pyplot_figure_is_opened_and_no_setting_changed():
    import matplotlib
    import matplotlib.pyplot as plt

    m, _ = product_with_error((4, 4), (False, False))
    before, backend, settings = plt.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams)
    m.plot().savefig(BytesIO())
    m._repr_html_()
    compare([m, known(1, 1)])
    assert plt.get_fignums() == before
    assert matplotlib.get_backend() == backend
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("style", [{}, {"figure.facecolor": (1, 1, 1, 0)}, {"savefig.transparent": True}])
def test_pngs_are_opaque(style):
    import matplotlib

    with matplotlib.rc_context(style):
        m = Multiplier.exact(3)
        for png in (m._repr_png_(), m.plot()._repr_png_()):
            image = np.asarray(Image.open(BytesIO(png)).convert("RGBA"))
            assert (image[..., 3] == 255).all()
            assert image[0, 0].tolist() == [255] * 4


@every_format
@pytest.mark.filterwarnings("error")
def test_the_png_is_small_and_shows_the_map(bits, flags):
    m, _ = product_with_error(bits, flags)
    png = m._repr_png_()
    assert png.startswith(PNG)
    assert len(png) < 100_000
    image = Image.open(BytesIO(png))
    assert min(image.size) >= 256
    pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels[..., 0] - pixels[..., 2] > 100).any()  # red
    assert (pixels[..., 2] - pixels[..., 0] > 60).any()  # blue


class Checked(HTMLParser):
    """Collects tags and texts; fails on tags that are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in ("br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_html_tells_figures_formats_and_info():
    m, _ = product_with_error((3, 5), (True, False), "some_name")
    m = Multiplier(
        m.table, a_signed=True, w_signed=False, name=m.name, info={"PWR": "301 uW", "source": {"deep": [1, None]}}
    )
    page = Checked(m._repr_html_())
    metrics = m.metrics()
    said = "|".join(page.texts)
    for expected in (
        "some_name",
        "activation int3 × weight uint5",
        f"MAE|{metrics['MAE']:.4g}|",
        f"WCE|{metrics['WCE']:.4g}|",
        f"EP|{metrics['EP%']:.4g} %|",
        f"MRE|{metrics['MRE%']:.4g} %|",
        "power|0.301 mW|",
        "PWR|301 uW|",
        'source|{"deep": [1, null]}',
    ):
        assert expected in said
    (source,) = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data, validate=True) == m._repr_png_()
    assert "power" not in Checked(Multiplier.exact(2)._repr_html_()).texts


@pytest.mark.filterwarnings("ignore:Glyph")
def test_html_escapes_all_that_is_not_ours():
    m = Multiplier(
        Multiplier.exact(2, False, False).table,
        a_signed=False,
        w_signed=False,
        name=HOSTILE,
        info={HOSTILE: HOSTILE, "list": [HOSTILE, "<b>"], "</td>": "</table></div>", "img": "<img src=x onerror=y>"},
    )
    html = m._repr_html_()
    page = Checked(html)
    assert set(page.tags) == {"div", "strong", "br", "table", "tbody", "tr", "th", "td", "img"}
    assert page.tags.count("img") == 1
    assert not [name for _, name, _ in page.attributes if name not in ("style", "scope", "alt", "src")]
    assert "<script" not in html
    assert any(text.startswith("<script>alert('1')</script>\"&") for text in page.texts)
    html.encode()  # no lone surrogates, which a notebook file cannot hold
    assert not re.search("[\x00-\x1f\u202e]", html)
    assert m._repr_png_().startswith(PNG)


def test_html_sets_no_colours_of_its_own():
    m, _ = product_with_error((3, 3), (False, False))
    styles = [value for _, name, value in Checked(m._repr_html_()).attributes if name == "style"]
    for style in styles:
        for declaration in filter(None, style.split(";")):
            name, _, value = declaration.partition(":")
            if "color" in name or name in ("background", "border", "border-bottom"):
                assert value in ("currentColor", "transparent", "0", "1px solid currentColor"), declaration


def test_html_is_bounded():
    noise = np.random.default_rng(0).integers(-(2**31), 2**31, (256, 256))
    info = {str(i) + 1000 * '"': 100_000 * '"' for i in range(1000)} | {"big": list(range(10**5))}
    m = Multiplier(noise, a_signed=False, w_signed=True, name="W" * 10**6, info=info)
    html = m._repr_html_()
    assert len(html.encode()) <= 120_000
    assert "and 989 more" in Checked(html).texts
    assert html.count("<tr") < 25


def test_html_of_info_that_was_spoilt_later():
    m = Multiplier(Multiplier.exact(2).table, a_signed=False, w_signed=True, info={"a": 1})
    m.info["b"] = {1, 2}
    assert '"{1, 2}"' in "|".join(Checked(m._repr_html_()).texts)


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "approxconv._picture", raising=False)
    monkeypatch.delattr(approxconv, "_picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_without_matplotlib(no_matplotlib):
    m, _ = product_with_error((3, 3), (False, False), "some_name")
    for draw in (m.plot, lambda: compare([m]), lambda: compare([known(1, 1)])):
        with pytest.raises(ImportError, match=re.escape("pip install 'approxconv[notebooks]'")):
            draw()
    with pytest.raises(ValueError, match="ax must be"):
        m.plot(ax=3)
    assert m._repr_png_() is None
    page = Checked(m._repr_html_())
    assert "img" not in page.tags
    assert {"some_name", "MAE", f"{m.metrics()['MAE']:.4g}"} <= set(page.texts)
    assert heat_map_text(m, 8).plain


# compare


def names_in(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def scatter(figure):
    """``[(label, power, error)]`` of the points, the errors of those without power, and the corners of the front."""
    axes, *beneath = figure.axes
    everyone, _ = (line for line in axes.lines if line.get_marker() == "o")
    points = [(name, *point) for name, point in zip(names_in(axes), everyone.get_xydata().tolist(), strict=True)]
    bars = [
        (label.get_text(), float(bar.get_width()))
        for each in beneath
        for label, bar in zip(each.get_yticklabels(), each.patches, strict=True)
    ]
    (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    return points, bars, list(zip(front.get_xdata().tolist(), front.get_ydata().tolist(), strict=True))


@pytest.mark.filterwarnings("error")
def test_compare_by_power():
    multipliers = [
        known(0.2, 3, "b"),
        known(0.5, 1, "d"),
        known(0.1, 9, "a"),
        known(0.3, 4, "beaten"),
        known(700, 2, "c", "uW"),  # beaten by d
        known(None, 5, "unknown"),
        known(None, 5, "unknown"),
    ]
    figure = compare(iter(multipliers), figure="MAE")
    points, bars, front = scatter(figure)
    points = {name: (round(x, 9), y) for name, x, y in points}
    assert points == {"b": (0.2, 3), "d": (0.5, 1), "a": (0.1, 9), "beaten": (0.3, 4), "c": (0.7, 2)}
    assert bars == [("unknown", 5.0), ("unknown", 5.0)]
    assert front == [(0.1, 9), (0.2, 3), (0.5, 1)]
    axes, beneath = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("power (mW)", "MAE")
    assert (beneath.get_title(loc="left"), beneath.get_xlabel()) == ("no power given", "MAE")


@pytest.mark.parametrize(
    ("errors", "scale"), [([1, 2, 3], "linear"), ([1, 5, 100], "log"), ([0, 5, 200], "symlog"), ([0, 0, 0], "linear")]
)
def test_the_error_axis_is_logarithmic_where_errors_differ_widely(errors, scale):
    figure = compare([known(0.1 * (i + 1), e, str(i)) for i, e in enumerate(errors)], figure="WCE")
    axes = figure.axes[0]
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert low < min(errors)
    assert max(errors) < high
    if scale == "symlog":
        assert axes.get_yticks().min() == 0
    bars = compare([known(None, e) for e in errors], figure="WCE").axes[0]
    assert bars.get_xscale() == scale
    assert [float(bar.get_width()) for bar in bars.patches] == sorted(errors)


def test_signed_figures_are_shown_by_magnitude():
    figure = compare([known(1, -3, "below"), known(2, 2, "above")], figure="bias")
    points, _, front = scatter(figure)
    assert points == [("below", 1, 3), ("above", 2, 2)]
    assert front == [(1, 3), (2, 2)]
    assert figure.axes[0].get_ylabel() == "|bias|"
    assert compare([known(1, 2, "above")], figure="bias").axes[0].get_ylabel() == "bias"


def test_compare_without_any_power_draws_bars():
    names = ["trunc4_8u", Multiplier.exact(8, False, False), "drum4_8u", "drum4_8u", known(None, 1, "$x_1$ <b>")]
    figure = compare(names)
    axes = figure.axes[0]
    expected = {n: approxconv.get_multiplier(n).metrics()["MRE%"] for n in ("trunc4_8u", "drum4_8u", "exact_8u")}
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(labels) == sorted(["trunc4_8u", "exact_8u", "drum4_8u", "drum4_8u", "$x_1$ <b>"])
    for label, bar in zip(labels, axes.patches, strict=True):
        assert bar.get_width() == pytest.approx(expected.get(label, names[-1].metrics()["MRE%"]))
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(labels.index(label), abs=1.01)
    assert axes.get_xlabel() == "MRE (%)"
    assert {f"{v:.4g}" for v in expected.values()} <= set(texts(figure))
    low, high = axes.get_ylim()
    assert low > high  # the best on top


def test_labels_of_as_many_circuits_as_published_in_one_table_hardly_overlap():
    generator = np.random.default_rng(1)
    multipliers = [
        known(f"{0.05 + 0.4 * x:.4f}", int(1 + 1000 * (1 - x) ** 3 * y), f"mul8u_{i:03}")
        for i, (x, y) in enumerate(generator.random((28, 2)))
    ]
    figure = compare(multipliers, figure="WCE")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) == 28
    overlapping = 0
    for one, other in itertools.combinations(boxes, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        overlapping += min(width, height) > 2
    assert overlapping <= 2
    page = figure.bbox
    for box in boxes:
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1


def test_coinciding_unnamed_and_hostile_points():
    figure = compare([known(1, 1), known(1, 1), known(1, 1, HOSTILE), known(1, 2, "x" * 500), known(0, 0)])
    names = names_in(figure.axes[0])
    assert names.count("unnamed") == 3
    assert max(map(len, names)) <= 40
    assert "\n" not in "".join(names)
    _, _, front = scatter(figure)
    assert front == [(0, 0)]
    assert figure._repr_png_().startswith(PNG)


def test_of_very_many_points_only_the_front_is_named():
    figure = compare([known(1 + i, 1 + abs(i - 3), str(i)) for i in range(61)], figure="MAE")
    assert names_in(figure.axes[0]) == ["0", "1", "2", "3"]
    bars = compare([known(None, 1)] * 500, figure="MAE")
    assert bars.get_size_inches()[1] == 100


def test_pareto_front_against_its_definition():
    generator = np.random.default_rng(0)
    for _ in range(50):
        cost, error = generator.integers(0, 6, (2, 12)).astype(float)
        points = list(zip(cost, error, strict=True))
        wanted = {
            i
            for i, (c, e) in enumerate(points)
            if not any(c2 <= c and e2 <= e and (c2, e2) != (c, e) for c2, e2 in points)
        }
        front = pareto_front(cost, error).tolist()
        assert set(front) == wanted
        assert len(front) == len(wanted)
        assert cost[front].tolist() == sorted(cost[front])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("drum4_8u",), "multipliers must be a sequence of Multipliers and zoo names, got 'drum4_8u'"),
        ((known(1, 1),), "multipliers must be a sequence .*got Multiplier"),
        ((7,), "multipliers must be .*got 7"),
        (([],), "multipliers must be .*got none"),
        ((["drum4_8u", 7],), "multipliers must be .*got 7 in it"),
        (([None],), "multipliers must be .*got None in it"),
        ((["drumm4_8u"],), "no multiplier 'drumm4_8u'"),
    ],
)
def test_compare_refuses_what_is_no_multiplier(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(*arguments)


@pytest.mark.parametrize("figure", ["mre", "", None, 7, ["MAE"]])
def test_compare_refuses_unknown_figures(figure):
    with pytest.raises(ValueError, match=f"figure must be one of MAE, MAE%, .*variance, got {re.escape(repr(figure))}"):
        compare([known(1, 1)], figure=figure)


# Terminal

SHADES = " .:-=+*#%@"
ANCHORS = [(5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31)]


def color_of(value, limit):
    place = 2 + 2 * value / limit if limit else 2.0
    left = min(int(place), 3)
    share = place - left
    return tuple(round(a + (b - a) * share) for a, b in zip(ANCHORS[left], ANCHORS[left + 1], strict=True))


def pooled(error, rows, columns, pooling, magnitude=False):
    """Cells by hand; sizes divide or are multiples of one another."""
    if magnitude:
        error = [[abs(e) for e in row] for row in error]
    height, width = len(error), len(error[0])
    cells = []
    for i, j in itertools.product(range(rows), range(columns)):
        inside = [
            error[y][x]
            for y in range(i * height // rows, max(i * height // rows + 1, (i + 1) * height // rows))
            for x in range(j * width // columns, max(j * width // columns + 1, (j + 1) * width // columns))
        ]
        cells.append(mean(inside) if pooling == "mean" else max(inside, key=abs))
    return [cells[i * columns : (i + 1) * columns] for i in range(rows)]


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize(
    ("bits", "flags", "width", "height"),
    [
        ((2, 2), (False, False), 4, 2),
        ((2, 3), (True, False), 8, 4),  # activations twice
        ((4, 3), (False, True), 4, 2),
        ((3, 4), (True, True), 16, 1),
        ((8, 8), (False, True), 32, 16),
        ((3, 3), (False, False), 1, 1),
        ((3, 5), (True, True), 7, 3),
    ],
)
def test_text_in_colour_by_hand(bits, flags, width, height, pooling):
    m, error = product_with_error(bits, flags)
    text = heat_map_text(m, width, height, pooling=pooling)
    lines = text.split("\n")
    assert len(lines) == height + 2
    cells = pooled(error, 2 * height, width, pooling)[::-1]
    limit = max(abs(c) for row in cells for c in row)
    for line, upper, lower in zip(lines[:height], cells[::2], cells[1::2], strict=True):
        assert line.plain == "▀" * width
        styles = [line.get_style_at_offset(_console(), place) for place in range(width)]
        for got, up, down in zip(styles, upper, lower, strict=True):
            assert np.abs(np.subtract(got.color.triplet, color_of(up, limit))).max() <= 1
            assert np.abs(np.subtract(got.bgcolor.triplet, color_of(down, limit))).max() <= 1
    scale = lines[height].plain
    assert scale.startswith(f"{-limit:.4g} ▀")
    assert f"▀ {limit:.4g}  {'mean' if pooling == 'mean' else 'largest'} error" in scale
    (a_low, a_high), (w_low, w_high) = m.a_range, m.w_range
    assert lines[-1].plain == (
        f"up: activation {m.a_format}, {a_low} to {a_high}; right: weight {m.w_format}, {w_low} to {w_high}"
    )


def _console(**options):
    from rich.console import Console

    return Console(file=StringIO(), width=300, **options)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize(
    ("bits", "width", "height"), [((2, 2), 4, 4), ((2, 2), 2, 1), ((3, 2), 8, 16), ((8, 8), 64, 32)]
)
def test_text_without_colour_by_hand(bits, width, height, pooling):
    m, error = product_with_error(bits, (False, True))
    text = heat_map_text(m, width, height, pooling=pooling, color=False)
    assert text.plain.isascii()
    assert not text.spans
    lines = text.plain.split("\n")
    cells = pooled(error, height, width, pooling, magnitude=True)[::-1]
    limit = max(max(row) for row in cells)
    assert lines[:height] == ["".join(SHADES[int(-(-c * 9 // limit))] for c in row) for row in cells]
    assert lines[height].startswith(f'0 "{SHADES}" {limit:.4g}  ')
    assert lines[height].endswith("|error|")


def test_text_by_default_looks_square():
    m, _ = product_with_error((8, 4), (False, True))
    lines = heat_map_text(m).plain.split("\n")
    assert [len(line) for line in lines[:-2]] == [64] * 32
    assert len(heat_map_text(m, 9).plain.split("\n")) == 5 + 2
    assert len(heat_map_text(m, 1, color=False).plain.split("\n")) == 1 + 2


@pytest.mark.parametrize("color", [True, False])
def test_text_of_exact_and_of_errors_that_cancel(color):
    assert "exact everywhere" in heat_map_text(Multiplier.exact(8), 16, color=color).plain
    table = Multiplier.exact(2, False, False).table.clone()
    table[0, 0] += 5
    table[0, 1] -= 5
    cancels = Multiplier(table, a_signed=False, w_signed=False)
    plain = heat_map_text(cancels, 1, 1, color=color).plain
    assert "exact" not in plain
    assert ("@" in plain.split("\n")[0]) is not color
    table[0, 1] += 5
    once = heat_map_text(Multiplier(table, a_signed=False, w_signed=False), 4, 4, color=False).plain.split("\n")
    assert once[:4] == ["    ", "    ", "    ", "@   "]


def test_text_is_printed_by_rich():
    m, _ = product_with_error((4, 4), (False, False))
    console = _console(color_system="truecolor", force_terminal=True)
    console.print(heat_map_text(m, 8, 4))
    assert "\x1b[38;2;" in console.file.getvalue()
    narrow = _console(color_system=None)
    narrow.width = 40
    text = heat_map_text(m, 40, 4, color=False)
    narrow.print(text)
    printed = narrow.file.getvalue()
    assert printed.startswith("\n".join(text.plain.split("\n")[:5]))  # the map and its scale as they are
    assert " ".join(printed.split()).endswith("right: weight uint4, 0 to 15")  # words in as many lines as they need


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"multiplier": "drum4_8u"}, "multiplier must be a Multiplier, got 'drum4_8u'"),
        ({"width": 0}, "width must be an int from 1 to 1000, got 0"),
        ({"width": 1001}, "width must be .*got 1001"),
        ({"width": 8.0}, "width must be .*got 8.0"),
        ({"width": True}, "width must be .*got True"),
        ({"width": "8"}, "width must be .*got '8'"),
        ({"height": -1}, "height must be .*got -1"),
        ({"height": 2.5}, "height must be .*got 2.5"),
        ({"pooling": "min"}, "pooling must be 'mean' or 'max', got 'min'"),
        ({"color": 1}, "color must be True or False, got 1"),
    ],
)
def test_text_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        heat_map_text(**{"multiplier": Multiplier.exact(2), **arguments})


def test_drawing_does_not_change_a_multiplier():
    m, _ = product_with_error((3, 5), (True, False), "name")
    twin = copy.deepcopy(m)
    m.plot(relative=True)
    m._repr_html_()
    heat_map_text(m)
    compare([m])
    assert m == twin
    assert (m.name, m.info) == (twin.name, twin.info)
