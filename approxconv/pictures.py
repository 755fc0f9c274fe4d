"""Pictures of multipliers: the error over the operands, in a notebook, on a terminal; error against power.

matplotlib and rich are imported when something is drawn. Nothing here touches pyplot, its backends or open figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ._display import html_table, image, printable
from .figures import printed_figures, probabilities
from .multiplier import Multiplier, check_flag
from .zoo import get_multiplier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from rich.text import Text

    from ._picture import Picture

# From too small over exact to too large: ColorBrewer's RdBu, reversed.
_COLORS = ((5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31))
_SHADES = " .:-=+*#%@"
_MEAN_COLOR, _SHARE_COLOR = (148, 103, 189), (255, 127, 14)
_RINGED, _RINGED_FROM = 8, 32
_LONGEST_NAME, _LONGEST_LABEL = 48, 28
_LONGEST_KEY, _LONGEST_VALUE, _MOST_INFO = 40, 120, 12
_MOST_PNG_BYTES = 72_000
_FIGURE_INCHES = (7.2, 6.0)
_MAP_INCHES = (0.85, 0.6, 3.84, 3.84)
_MISSING = "pictures need matplotlib and adjustText: pip install 'approxconv[notebooks]'"
_SCATTER_INCHES = 5.5
_MOST_NAMED = 60
_TALLEST_INCHES = 100
_WIDEST = 1000
_WIDELY = 30


def _name(multiplier: Multiplier, longest: int) -> str:
    return printable(multiplier.name, longest) or "unnamed"


def _error_by_value(multiplier: Multiplier, relative: bool = False) -> np.ndarray:
    """Error by ascending operand values, float64; or in percent of a·w, NaN where that is 0."""
    product = np.multiply.outer(*(np.sort(values) for values in multiplier.operand_values()))
    error = (multiplier.by_value().numpy() - product).astype(np.float64)
    if not relative:
        return error
    return 100 * np.divide(error, product, out=np.full(error.shape, np.nan), where=product != 0)


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of every row over its entries that are numbers; NaN where these weigh nothing."""
    valid = np.isfinite(values)
    total = valid @ weights
    return np.divide(np.where(valid, values, 0) @ weights, total, out=np.full(len(total), np.nan), where=total > 0)


def new_picture(**options: Any) -> Picture:
    """A figure that notebooks show without pyplot, or an ImportError that says how to get matplotlib."""
    try:
        from ._picture import Picture
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return Picture(**options)


def _error_axes() -> Axes:
    """The map's axes in a new figure with room for what is drawn around it.

    By hand, as the constrained layout needs many drawings to settle where much hangs outside the axes.
    """
    return new_picture(figsize=_FIGURE_INCHES).add_axes(np.divide(_MAP_INCHES, 2 * _FIGURE_INCHES))


def _check_axes(ax: Any) -> Axes:
    try:
        from matplotlib.axes import Axes
    except ImportError:
        Axes = ()  # noqa: N806
    if not isinstance(ax, Axes):
        raise ValueError(f"ax must be a matplotlib Axes or None, got {type(ax).__name__}")
    return ax


def colormap() -> Colormap:
    """From too small over exact, white, to too large."""
    from matplotlib.colors import LinearSegmentedColormap

    made = LinearSegmentedColormap.from_list("error", np.array(_COLORS) / 255)
    return made.with_extremes(bad="0.8")


def _limit(values: np.ndarray, relative: bool) -> float:
    """What the outermost colours stand for; 1 where all is exact."""
    magnitude = np.abs(values[np.isfinite(values)])
    if not magnitude.any():
        return 1.0
    # Relative errors have a few huge ones at small products, beside which nothing else would be seen.
    return (relative and float(np.percentile(magnitude, 99, method="higher"))) or float(magnitude.max())


def _ticks(low: int, high: int) -> list[int]:
    return [*range(low, high, max((high - low + 1) // 4, 1)), high]


def plot_error(
    multiplier: Multiplier, ax: Axes | None = None, *, a_hist: Any = None, w_hist: Any = None, relative: bool = False
) -> Figure:
    """What `Multiplier.plot` documents."""
    metrics = multiplier.metrics(a_hist, w_hist)
    orders = [np.argsort(values) for values in multiplier.operand_values()]
    shares_a, shares_w = (
        probabilities(name, histogram, len(order))[order]
        for name, histogram, order in zip(("a_hist", "w_hist"), (a_hist, w_hist), orders, strict=True)
    )
    ax = _error_axes() if ax is None else _check_axes(ax)
    values = _error_by_value(multiplier, relative)
    limit = _limit(values, relative)
    low, high = (float(f(values, where=np.isfinite(values), initial=0)) for f in (np.min, np.max))
    (a_low, a_high), (w_low, w_high) = multiplier.a_range, multiplier.w_range

    shown = ax.imshow(
        values,
        cmap=colormap(),
        vmin=-limit,
        vmax=limit,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(w_low - 0.5, w_high + 0.5, a_low - 0.5, a_high + 0.5),
    )
    ax.set_box_aspect(1)
    ax.grid(False)  # which some styles put over the map
    ax.set_xticks(_ticks(w_low, w_high))
    ax.set_yticks(_ticks(a_low, a_high))
    ax.set_xlabel(f"weight ({multiplier.w_format})")
    ax.set_ylabel(f"activation ({multiplier.a_format})")
    wrong = np.argwhere(np.nan_to_num(values) != 0)
    if 0 < len(wrong) <= _RINGED and max(values.shape) > _RINGED_FROM:
        ax.plot(wrong[:, 1] + w_low, wrong[:, 0] + a_low, "o", color="0.3", fillstyle="none", markersize=11)

    by_weight = ax.inset_axes((0, 1.04, 1, 0.22), sharex=ax)
    by_activation = ax.inset_axes((1.04, 0, 0.22, 1), sharey=ax)
    for margin, rows, shares, other, first, orientation in (
        (by_weight, values.T, shares_w, shares_a, w_low, "vertical"),
        (by_activation, values, shares_a, shares_w, a_low, "horizontal"),
    ):
        given = (w_hist if rows is not values else a_hist) is not None
        _draw_margin(margin, rows, other, first, orientation, signed=low < 0 < high, shares=shares if given else None)
    by_weight.tick_params(labelbottom=False)
    by_activation.tick_params(labelleft=False)
    by_activation.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.03), fontsize=7, frameon=False, borderpad=0, borderaxespad=0,
        handlelength=1.2,
    )  # fmt: skip

    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get((low < -limit, high > limit))
    bar = ax.figure.colorbar(shown, cax=ax.inset_axes((1.32, 0, 0.05, 1)), extend=extend or "neither", format="{x:.4g}")
    if min(low, 0) == max(high, 0):
        bar.set_ticks([0])
    elif not low < 0 < high:
        bar.ax.set_ylim(-limit if low < 0 else 0, limit if high > 0 else 0)
    bar.set_label("error in % of a·w" if relative else "error")

    for text, height, style in (
        (_name(multiplier, _LONGEST_NAME), 24, {"size": 12, "weight": "bold"}),
        ("   ".join(map(" ".join, printed_figures(metrics).items())), 8, {"size": 9}),
    ):
        title = by_weight.annotate(
            text, (0, 1), xytext=(0, height), xycoords="axes fraction", textcoords="offset points", parse_math=False,
            annotation_clip=False, **style,
        )  # fmt: skip
        room = 0.85 * ax.figure.bbox.width
        title.set_fontsize(title.get_fontsize() * min(1, room / max(title.get_window_extent().width, 1)))
    return ax.figure.figure


def _draw_margin(
    margin: Axes,
    rows: np.ndarray,
    weights: np.ndarray,
    first: int,
    orientation: str,
    *,
    signed: bool,
    shares: np.ndarray | None,
) -> None:
    """Draw the mean of every row as steps, that of its magnitude filled; and, if given, the shares of the rows."""
    edges = np.arange(len(rows) + 1) + first - 0.5
    magnitude = _weighted_mean(np.abs(rows), weights)
    margin.stairs(
        np.nan_to_num(magnitude), edges, orientation=orientation, fill=True, color="0.6", label="mean |error|"
    )
    if signed:
        mean = _weighted_mean(rows, weights)
        margin.stairs(
            mean,
            edges,
            baseline=None,
            orientation=orientation,
            color=np.divide(_MEAN_COLOR, 255),
            linewidth=1.0,
            label="mean error",
        )
    if shares is not None:
        height = np.nanmax(magnitude, initial=0) or 1
        margin.stairs(
            shares * height / shares.max(),
            edges,
            orientation=orientation,
            color=np.divide(_SHARE_COLOR, 255),
            label="how often",
        )
    line = margin.axhline if orientation == "vertical" else margin.axvline
    line(0, color="0.3", linewidth=0.8)
    _tidy_margin_axis(
        margin.yaxis if orientation == "vertical" else margin.xaxis, flat=not np.nan_to_num(magnitude).any()
    )
    margin.tick_params(labelsize=7)


def _tidy_margin_axis(axis: Axis, flat: bool) -> None:
    """Few ticks; none at the start of the horizontal axis, where the weights' last tick is; 0 to 1 if all is exact."""
    from matplotlib.ticker import MaxNLocator

    horizontal = axis.axis_name == "x"
    axis.set_major_formatter("{x:.4g}")
    if flat:
        axis.set_ticks([] if horizontal else [0])
        (axis.axes.set_xlim if horizontal else axis.axes.set_ylim)(-0.05, 1)
    else:
        axis.set_major_locator(MaxNLocator(2 if horizontal else 3, prune="lower" if horizontal else None))


def error_png(multiplier: Multiplier) -> bytes | None:
    """The plot as a small PNG; None where matplotlib is missing."""
    try:
        axes = _error_axes()
    except ImportError:
        return None
    plot_error(multiplier, axes)
    return axes.figure.small_png(_palette(), _MOST_PNG_BYTES)


def _palette() -> list[int]:
    """256 colours: those of the map, and greys and the lines' colours in every shade that smoothed edges take."""
    colors = [_ramp(_COLORS, 196), _ramp(((0, 0, 0), (255, 255, 255)), 40)]
    colors += [_ramp((color, (255, 255, 255)), 10) for color in (_MEAN_COLOR, _SHARE_COLOR)]
    return np.concatenate(colors).ravel().tolist()


def _ramp(anchors: Sequence[tuple[int, int, int]], count: int) -> np.ndarray:
    return _between(anchors, np.linspace(0, 1, count))


def _between(anchors: Sequence[tuple[int, int, int]], places: np.ndarray) -> np.ndarray:
    """Colours, ``places.shape + (3,)``, at places from 0 (the first anchor) to 1 (the last)."""
    at = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(places, at, channel) for channel in np.array(anchors).T], -1).round().astype(int)


def to_mimebundle(multiplier: Multiplier) -> dict[str, Any]:
    """What a notebook is offered of a multiplier, drawn once for all of it."""
    png = error_png(multiplier)
    picture = {} if png is None else {"image/png": png}
    return {"text/plain": repr(multiplier), "text/html": to_html(multiplier, png), **picture}


def to_html(multiplier: Multiplier, png: bytes | None) -> str:
    """What a notebook shows of a multiplier; every text in it is escaped, no colour of a text is set."""
    name = _name(multiplier, _LONGEST_NAME)
    rows = list(printed_figures(multiplier.metrics()).items())
    if multiplier.power is not None:
        rows.append(("power", f"{multiplier.power:.4g} mW"))
    for key, value in list(multiplier.info.items())[:_MOST_INFO]:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
        rows.append((printable(key, _LONGEST_KEY), printable(text, _LONGEST_VALUE)))
    if len(multiplier.info) > _MOST_INFO:
        rows.append(("…", f"and {len(multiplier.info) - _MOST_INFO} more"))
    picture = "" if png is None else image(png, f"error of {name} by operand values")
    formats = f"activation {multiplier.a_format} × weight {multiplier.w_format}"
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start;color:currentColor">'
        f'<div style="max-width:28em"><strong>{escape(name)}</strong><br>{escape(formats)}'
        f"{html_table(rows)}</div>{picture}</div>"
    )


def _check_multipliers(multipliers: Any) -> list[Multiplier]:
    wanted = "multipliers must be a sequence of Multipliers and zoo names"
    if isinstance(multipliers, (str, bytes, Multiplier)) or not isinstance(multipliers, Iterable):
        raise ValueError(f"{wanted}, got {multipliers!r:.100}")
    chosen = list(multipliers)
    for each in chosen:
        if not isinstance(each, (str, Multiplier)):
            raise ValueError(f"{wanted}, got {each!r:.100} in it")
    if not chosen:
        raise ValueError(f"{wanted}, got none")
    return [get_multiplier(each) if isinstance(each, str) else each for each in chosen]


def compare(multipliers: Iterable[Multiplier | str], *, figure: str = "MRE%") -> Figure:
    """Draw multipliers by error and power, with the Pareto front: those that none beats in both.

    Multipliers whose `Multiplier.power` is None are bars beneath. Of more than 60 points only those of the front are
    named. Needs matplotlib and adjustText, but no display; no pyplot figure is opened.

    Parameters
    ----------
    multipliers : iterable of Multiplier or str
        Multipliers, or names that `get_multiplier` takes.
    figure : str
        Which figure of `Multiplier.metrics` to show; its magnitude, if it has a sign. The axis is logarithmic where
        values differ widely.

    Returns
    -------
    matplotlib.figure.Figure
        ``.savefig(path)`` writes it.

    Raises
    ------
    ValueError
        No multipliers, something else among them, or an unknown name or figure.
    ImportError
        matplotlib or adjustText is missing.

    Examples
    --------
    >>> compare(list_multipliers("drum*_8u")).savefig("drum.png")  # doctest: +SKIP
    """
    chosen = _check_multipliers(multipliers)
    metrics = [multiplier.metrics() for multiplier in chosen]
    if not isinstance(figure, str) or figure not in metrics[0]:
        raise ValueError(f"figure must be one of {', '.join(metrics[0])}, got {figure!r:.60}")
    errors = np.array([abs(each[figure]) for each in metrics])
    names = [_name(multiplier, _LONGEST_LABEL) for multiplier in chosen]
    known = np.array([multiplier.power is not None for multiplier in chosen])
    signed = any(each[figure] < 0 for each in metrics)
    label = f"|{figure}|" if signed else f"{figure.removesuffix('%')} (%)" if figure.endswith("%") else figure
    heights = [_SCATTER_INCHES] * bool(known.any())
    if not known.all():
        heights.append(np.clip(1.2 + 0.24 * (~known).sum(), 2.2, _TALLEST_INCHES))
    drawn = new_picture(figsize=(8, sum(heights)), layout="constrained")
    axes = drawn.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    if known.any():
        power = np.array([multiplier.power for multiplier in chosen if multiplier.power is not None])
        _draw_scatter(axes[0], power, errors[known], _pick(names, known), label)
    if not known.all():
        _draw_bars(axes[-1], errors[~known], _pick(names, ~known), label)
        if known.any():
            axes[-1].set_title("no power given", fontsize=9, loc="left")
    return drawn


def _draw_scatter(ax: Axes, power: np.ndarray, errors: np.ndarray, names: list[str], label: str) -> None:
    try:
        from adjustText import adjust_text
    except ImportError as error:
        raise ImportError(_MISSING) from error
    front = pareto_front(power, errors)
    _scale(ax, "y", errors, _WIDELY)
    _scale(ax, "x", power, _WIDELY**2)
    ax.step(power[front], errors[front], where="post", color="0.6", linewidth=1, zorder=1, label="Pareto front")
    ax.plot(power, errors, "o", color="tab:blue", markersize=5, zorder=2)
    ax.plot(power[front], errors[front], "o", color="tab:red", markersize=6, zorder=3)
    ax.set_xlabel("power (mW)")
    ax.set_ylabel(label)
    ax.grid(alpha=0.3)
    ax.legend(loc="upper right", fontsize=8)
    named = np.arange(len(names)) if len(names) <= _MOST_NAMED else front
    texts = [
        ax.text(power[i], errors[i], names[i], fontsize=8 if len(named) <= 30 else 6, parse_math=False) for i in named
    ]
    ax.figure.draw_without_rendering()  # only now it is known how large everything is
    line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.5}
    adjust_text(texts, power, errors, ax=ax, expand=(1.25, 1.6), iter_lim=500, arrowprops=line)


def _pick(names: Sequence[str], chosen: np.ndarray) -> list[str]:
    return [name for name, wanted in zip(names, chosen, strict=True) if wanted]


def pareto_front(cost: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Indices, by rising cost, of the points that no other one undercuts in one and equals or undercuts in both."""
    front: list[int] = []
    for index in np.lexsort((error, cost)):
        if not front or error[index] < error[front[-1]] or (error[index], cost[index]) == (
            error[front[-1]], cost[front[-1]],
        ):  # fmt: skip
            front.append(int(index))
    return np.array(front, dtype=int)


def _scale(ax: Axes, axis: str, values: np.ndarray, widely: float) -> None:
    """From a little below the smallest to above the largest value, logarithmic if positive ones differ `widely`."""
    set_scale, set_limits = (ax.set_xscale, ax.set_xlim) if axis == "x" else (ax.set_yscale, ax.set_ylim)
    positive = values[values > 0]
    if not len(positive) or positive.max() < widely * positive.min():
        room = 0.08 * (np.ptp(values) or values.max() or 1)
        set_limits(values.min() - room, values.max() + 1.5 * room)
        return
    first, last = int(np.floor(np.log10(positive.min()))), int(np.ceil(np.log10(positive.max())))
    room = (positive.max() / positive.min()) ** 0.08
    if len(positive) == len(values):
        set_scale("log")
        set_limits(positive.min() / room, positive.max() * room**1.5)
        return
    set_scale("symlog", linthresh=10.0**first)
    # Its own ticks crowd around 0 and go below.
    ticks = [0, *(10.0**decade for decade in range(first, last + 1, max((last - first) // 8, 1)))]
    (ax.set_xticks if axis == "x" else ax.set_yticks)(ticks)
    set_limits(-0.4 * 10.0**first, positive.max() * room**1.5)


def _draw_bars(ax: Axes, errors: np.ndarray, names: list[str], label: str) -> None:
    order = np.argsort(errors, kind="stable")
    _scale(ax, "x", errors, _WIDELY)
    ax.set_xlim(left=ax.get_xlim()[0] if ax.get_xscale() == "log" else 0)
    bars = ax.barh(np.arange(len(errors)), errors[order], color="tab:blue", height=0.7)
    ax.bar_label(bars, [f"{value:.4g}" for value in errors[order]], padding=3, fontsize=7)
    ax.set_yticks(np.arange(len(errors)))
    ax.set_yticklabels([names[index] for index in order], fontsize=8, parse_math=False)
    ax.set_ylim(len(errors) - 0.4, -0.6)
    ax.set_xlabel(label)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)


def _pool(values: np.ndarray, rows: int, columns: int, pooling: str) -> np.ndarray:
    """``(rows, columns)`` cells of `values`: their means or largest magnitudes; entries repeat if there are too few."""
    if pooling == "max":
        low, high = (_pool_by(ufunc, values, rows, columns) for ufunc in (np.minimum, np.maximum))
        return np.where(-low > high, low, high)
    total, count = (_pool_by(np.add, v, rows, columns) for v in (values, np.ones(values.shape)))
    return total / count


def _pool_by(ufunc: np.ufunc, values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    for axis, cells in enumerate((rows, columns)):
        size = values.shape[axis]
        if cells > size:
            values = np.take(values, np.arange(cells) * size // cells, axis)
        else:
            values = ufunc.reduceat(values, np.arange(cells) * size // cells, axis)
    return values


def heat_map_text(
    multiplier: Multiplier,
    width: int = 64,
    height: int | None = None,
    *,
    pooling: str = "mean",
    color: bool = True,
) -> Text:
    """Draw the error over the operand values for a terminal.

    As in `Multiplier.plot`, activations rise upwards and weights to the right; red is too large, blue too small.

    Parameters
    ----------
    multiplier : Multiplier
        Any.
    width, height : int
        Characters, 1 to 1000, the legend not counted; the width at most the console's, which would wrap it. Height is
        half the width if not given, which looks square.
    pooling : {"mean", "max"}
        What stands for the pairs of a cell: their mean error, or the one of the largest magnitude.
    color : bool
        Half-blocks in 24-bit colour, two cells a character; else ASCII from space, exact, to ``@``, by magnitude.

    Returns
    -------
    rich.text.Text
        ``height`` lines and two of legend.

    Raises
    ------
    ValueError
        An argument that is none of these.
    """
    from rich.text import Text

    if not isinstance(multiplier, Multiplier):
        raise ValueError(f"multiplier must be a Multiplier, got {multiplier!r:.60}")
    height = (width + 1) // 2 if height is None and isinstance(width, int) else height
    for argument, value in (("width", width), ("height", height)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _WIDEST:
            raise ValueError(f"{argument} must be an int from 1 to {_WIDEST}, got {value!r:.60}")
    if pooling not in ("mean", "max"):
        raise ValueError(f"pooling must be 'mean' or 'max', got {pooling!r:.60}")
    color = check_flag("color", color)
    error = _error_by_value(multiplier)
    text = Text()
    if color:
        cells = _pool(error, 2 * height, width, pooling)[::-1]
        scale = _append_blocks(text, cells)
    else:
        cells = _pool(np.abs(error), height, width, pooling)[::-1]
        scale = _append_shades(text, cells)
    if error.any():
        text.append_text(scale)
        text.append(f"  {'mean' if pooling == 'mean' else 'largest'} {'error' if color else '|error|'}\n")
    else:
        text.append("exact everywhere\n")
    (a_low, a_high), (w_low, w_high) = multiplier.a_range, multiplier.w_range
    text.append(
        f"up: activation {multiplier.a_format}, {a_low} to {a_high}; "
        f"right: weight {multiplier.w_format}, {w_low} to {w_high}"
    )
    return text


def _append_blocks(text: Text, cells: np.ndarray) -> Text:
    """Append two rows of cells a line, in colour; return the scale."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    def append(to: Text, upper: Iterable[int], lower: Iterable[int]) -> None:
        to.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))

    limit = float(np.abs(cells).max())
    pixels = _between(_COLORS, (cells / (limit or 1.0) + 1) / 2)
    for upper_row, lower_row in zip(pixels[::2], pixels[1::2], strict=True):
        for upper, lower in zip(upper_row.tolist(), lower_row.tolist(), strict=True):
            append(text, upper, lower)
        text.append("\n")
    scale = Text(f"{0 - limit:.4g} ")
    for shade in _ramp(_COLORS, 17).tolist():
        append(scale, shade, shade)
    return scale.append(f" {limit:.4g}")


def _append_shades(text: Text, cells: np.ndarray) -> Text:
    """Append a row of magnitudes a line, as ASCII; return the scale."""
    from rich.text import Text

    limit = float(cells.max())
    # Anything but exact is seen: what is not 0 is never a space.
    steps = np.ceil(cells / (limit or 1.0) * (len(_SHADES) - 1)).astype(int)
    for row in steps:
        text.append("".join(_SHADES[step] for step in row) + "\n")
    return Text(f'0 "{_SHADES}" {limit:.4g}')
