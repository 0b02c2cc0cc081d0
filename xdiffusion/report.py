"""An evaluation as one self-contained page: pictures as data URIs, curves as inline SVG, nothing fetched from anywhere.

The page follows the reader's light or dark setting, and fits a phone. A content security policy in it forbids scripts
and requests, so a strange caption or path in it stays text.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from xdiffusion.checkpoints.writing import write_text
from xdiffusion.evaluation.loss_curve import LossCurve
from xdiffusion.pictures import as_picture
from xdiffusion.scoring import Evaluation

ROWS_OF_SAMPLES = 10
LARGE = 64  # pixels, from which on a picture is smoothed where it is scaled
COLUMNS = 6  # of samples that have no columns of their own
# key, label, better, what it says
SCORES = (
    ("prompt_accuracy", "prompt accuracy", "higher", "share of samples in which the judge sees the prompted class"),
    (
        "frechet_distance",
        "Frechet distance",
        "lower",
        "between features of samples and of real images, a judge's or a CLIP's",
    ),
    ("precision", "precision", "higher", "share of samples that lie among the real images"),
    ("recall", "recall", "higher", "share of real images that lie among the samples"),
    ("density", "density", "higher", "how many real neighbourhoods a sample lies in, over k"),
    ("coverage", "coverage", "higher", "share of real neighbourhoods that hold a sample"),
    (
        "diversity",
        "diversity",
        "near 1",
        "distance between samples, of a class where there are any, over that of real images",
    ),
    ("clip_score", "CLIP score", "higher", "100 times the cosine of image and prompt"),
    ("bits_per_dim", "bits per dimension", "lower", "variational bound on held-out images"),
    (
        "data_copying",
        "data copying",
        "0.5 or less",
        "chance that a sample is nearer to the training set than a new image",
    ),
    ("copies", "copies", "0", "share of samples three times nearer to one training image than to any other"),
    ("nearest_distance", "nearest distance", "-", "median difference in brightness to the nearest training image"),
    ("gap_closed", "gap closed", "1", "the LoRA's share of the way to the base's loss on its own images"),
    ("background", "background", "-", "mean brightness where the data has no strokes"),
    ("judge_accuracy", "judge accuracy", "-", "of the judge itself, on held-out images"),
    ("seconds_per_image", "seconds per image", "lower", "of sampling"),
)
REAL = {"frechet_distance": "frechet_floor", "prompt_accuracy": "judge_accuracy"}  # the rest: key + _real
TILES = ("prompt_accuracy", "clip_score", "frechet_distance", "gap_closed", "coverage", "data_copying", "copies")
CURVES = {"model": "the model", "base": "without the LoRA", "base_on_normal": "without the LoRA, on its own images"}
STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #fff; --ink: #1d1f22; --soft: #62666d; --line: #dfe0dc;
  --c0: #1f6feb; --c1: #c2410c; --c2: #15803d; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1d2024; --ink: #e8e9ea; --soft: #9da3ab;
  --line: #33373d; --c0: #6ea8fe; --c1: #fb923c; --c2: #4ade80; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { margin: .3rem 0; color: var(--soft) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin-top: 1.2rem }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: .82rem; display: block }
img { display: block; width: 100%; border-radius: 2px } .pixels { image-rendering: pixelated }
.samples { display: grid; gap: 3px; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .6rem }
.samples div { min-width: 0 }
.samples span { display: block; font-size: .75rem; text-align: center; color: var(--soft); overflow: hidden;
  white-space: nowrap; text-overflow: ellipsis }
.suspects { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .7rem }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem }
.trio { display: grid; gap: 4px; font-size: .68rem; color: var(--soft);
  text-align: center }
figcaption { font-size: .78rem; color: var(--soft); margin-top: .35rem }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal }
th, td { padding: .4rem .7rem; text-align: left; border-top: 1px solid var(--line); vertical-align: top }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: .8rem }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap } td small { color: var(--soft); display: block }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 12px }
.grid { stroke: var(--line) } .key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .82rem }
.key i { display: inline-block; width: 1.1rem; height: 3px; vertical-align: middle; margin-right: .4rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .85rem; margin: 0 }
dt { color: var(--soft) } dd { margin: 0 } pre { font-size: .78rem; overflow-x: auto; margin: .5rem 0; white-space: pre }
@media (max-width: 30rem) { .about { display: none } dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .4rem }
  .suspects { grid-template-columns: 1fr 1fr } .plot { overflow-x: auto } .plot svg { width: 34rem }
  th, td { padding: .35rem .4rem } table { font-size: .8rem } }
"""


def write_report(path: Path, evaluation: Evaluation, config: str, provenance: Mapping[str, str]) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the page.
        evaluation: of a full depth; without suspects or curves their sections are left out.
        config: the resolved config as YAML.
        provenance: where from the numbers are, shown as it stands.
    """
    scores = evaluation.scores
    count = f"{scores['real_images']:,} training images" if "real_images" in scores else "real images"
    judged = "; of the accuracy, of all held-out images" if scores.get("judge_accuracy") is not None else ""
    title = f"{scores['dataset']}: {scores['num_samples']} samples"
    tiles = [_tile(key, label, scores) for key in TILES for k, label, *_ in SCORES if k == key]
    sections = [
        f"<h1>{_text(title)}</h1><p>{_text(evaluation.about)}</p>",
        f"<p>Brackets: intervals of 95%. Real: the same score of {count}{judged}.</p>",
        f'<div class="tiles">{"".join(tiles)}</div>',
        f"<h2>Samples</h2><p>Not chosen: the first{' of each class, in columns' if evaluation.columns else ''}.</p>",
        _samples(evaluation),
        "<h2>Scores</h2>" + _score_table(scores),
    ]
    if evaluation.reasons:
        labels = {key: label for key, label, *_ in SCORES}
        names = {key: labels.get(key, key.replace("_", " ")) for key in evaluation.reasons}
        rows = "".join(f"<dt>{_text(names[k])}</dt><dd>{_text(v)}</dd>" for k, v in evaluation.reasons.items())
        sections += [f"<h2>Not measured</h2><dl>{rows}</dl>"]
    if evaluation.curves:
        sections += ["<h2>Loss by noise level</h2>", _curve_figure(evaluation.curves)]
    if evaluation.suspects:
        sections += ["<h2>Nearest images</h2>", _suspects(evaluation)]
    rows = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in provenance.items())
    sections += [f"<h2>Provenance</h2><dl>{rows}</dl>", "<h2>Config</h2><details><summary>resolved config</summary>"]
    sections += [f"<pre>{_text(config)}</pre></details>"]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    write_text(path, page)


# --- scores ---


def _tile(key: str, label: str, scores: Mapping) -> str:
    if scores.get(key) is None:
        return ""
    between = _interval(scores, key) or "&nbsp;"
    return f'<div class="tile"><span>{_text(label)}</span><b>{_number(scores[key])}</b><span>{between}</span></div>'


def _score_table(scores: Mapping) -> str:
    rows = []
    for key, label, better, about in SCORES:
        if scores.get(key) is None:
            continue
        real = scores.get(REAL.get(key, f"{key}_real"))
        cells = [_number(scores[key]), _interval(scores, key), "" if real is None else _number(real)]
        rows.append(
            f"<tr><td>{_text(label)}<small class=about>{_text(about)}</small></td>"
            + "".join(f'<td class="n">{cell}</td>' for cell in cells)
            + f"<td>{_text(better)}</td></tr>"
        )
    heads = "".join(f"<th>{head}</th>" for head in ("score", "value", "interval", "real", "better"))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _interval(scores: Mapping, key: str) -> str:
    bounds = scores.get(f"{key}_interval")
    return "" if bounds is None else f"[{_number(bounds[0])}, {_number(bounds[1])}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


# --- pictures ---


def _samples(evaluation: Evaluation) -> str:
    """The first rows of samples; those of classes come in turn, so that a column is a class."""
    heads = [f"<span>{_text(name)}</span>" for name in evaluation.columns]
    columns = len(heads) or COLUMNS
    shown = list(zip(evaluation.images, evaluation.prompts))[: columns * ROWS_OF_SAMPLES]
    below = (lambda prompt: "") if heads else (lambda prompt: f"<span>{_text(prompt)}</span>")
    pictures = [f"<div>{_picture(image, prompt)}{below(prompt)}</div>" for image, prompt in shown]
    return f'<div class="samples" style="grid-template-columns: repeat({columns}, 1fr)">{"".join(heads + pictures)}</div>'


def _suspects(evaluation: Evaluation) -> str:
    """Samples beside the images that they come closest to."""
    figures = []
    for suspect in evaluation.suspects:
        names = ["sample", "nearest", "second"][: 1 + len(suspect.near)]
        trio = [_picture(image, name) for image, name in zip([suspect.image, *suspect.near], names)]
        trio += [f"<span>{name}</span>" for name in names]
        distances = " and ".join(f"{distance:.3f}" for distance in suspect.distance)
        caption = f"<figcaption>{_text(suspect.prompt)}: {distances}</figcaption>"
        columns = f"grid-template-columns: repeat({len(names)}, 1fr)"
        figures.append(f'<figure><div class="trio" style="{columns}">{"".join(trio)}</div>{caption}</figure>')
    about = f"The {len(figures)} samples, of {evaluation.scores['num_samples']}, that come closest to {evaluation.nearest_to}"
    return f"<p>{_text(about)}; differences in brightness, root mean square.</p><div class=suspects>{''.join(figures)}</div>"


def _picture(image: Float[Tensor, "C H W"], about: str) -> str:
    """An image in [-1, 1] as an <img> with the picture in it."""
    file = io.BytesIO()
    as_picture(image).save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    pixels = " class=pixels" if max(image.shape[1:]) < LARGE else ""
    return f'<img{pixels} src="data:image/png;base64,{encoded}" alt="{_text(about)}" title="{_text(about)}">'


# --- curves ---

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 330, 52, 42, 12


def _curve_figure(curves: Mapping[str, LossCurve]) -> str:
    """Losses on a logarithmic scale against log-SNR: noise at the left, data at the right."""
    values = [v for c in curves.values() for v in (*c.loss, *c.low, *c.high) if v > 0] or [1.0]
    lowest, highest = math.log10(min(values)) - 0.1, max(0.0, math.log10(max(values))) + 0.1
    snrs = [x for c in curves.values() for x in c.logsnr]
    left, right = min(snrs), max(snrs)

    def x(logsnr: float) -> float:
        return LEFT + (logsnr - left) / max(right - left, 1e-9) * (WIDTH - LEFT - 12)

    def y(loss: float) -> float:
        exponent = max(math.log10(loss), lowest) if loss > 0 else lowest
        return TOP + (highest - exponent) / (highest - lowest) * (HEIGHT - TOP - BOTTOM)

    exponents = range(math.ceil(lowest), math.floor(highest) + 1)
    parts = [_axes(x, y, exponents, range(math.ceil(left), math.floor(right) + 1, 2))]
    keys = []
    for i, (name, curve) in enumerate(curves.items()):
        colour = f"var(--c{i})"
        points = [(x(a), y(b)) for a, b in zip(curve.logsnr, curve.loss)]
        if curve.low:
            upper, lower = ([(x(a), y(b)) for a, b in zip(curve.logsnr, edge)] for edge in (curve.high, curve.low))
            parts.append(f'<polygon points="{_points([*upper, *lower[::-1]])}" fill="{colour}" opacity=".2"/>')
        line = f'<polyline points="{_points(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        parts += [line, *(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in points)]
        keys.append(f'<span><i style="background:{colour}"></i>{_text(CURVES.get(name, name))}</span>')
    label = "Loss of the noise estimate against log-SNR"
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"'
    return (
        f'<figure><div class="plot"><svg {view}>{"".join(parts)}</svg></div>'
        f'<div class="key">{"".join(keys)}</div><figcaption>Mean squared error of eps per number, on fixed images '
        "and noise; 1 is an estimate of zero. Left: almost noise, where the noise is easily told. Bands: intervals of 95%."
        "</figcaption></figure>"
    )


def _axes(x, y, exponents: Sequence[int], snrs: Iterable[int]) -> str:
    """Grid lines and labels at powers of ten and at whole log-SNRs."""
    parts = []
    for e in exponents:
        height = y(10.0**e)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{10.0**e if e > -4 else f"1e{e}"}</text>')
    for snr in snrs:
        at = f"{x(snr):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{snr}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">log-SNR</text>')
    return "".join(parts)


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
