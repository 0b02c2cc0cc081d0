"""The report: self-contained, whatever stands in it is text, and a real browser shows it."""

import html
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from commands import EVALUATE, run_script
from tiny import tiny_images

from xdiffusion import scoring
from xdiffusion.data.image_set import invert
from xdiffusion.evaluation.judge import train_judge
from xdiffusion.evaluation.loss_curve import LossCurve
from xdiffusion.report import write_report
from xdiffusion.scoring import Evaluation, Suspect

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
STRANGE = "<script>alert('\"&')</script>"


@pytest.fixture
def page(tmp_path):
    """A report of an inverted set with everything in it, and strange texts wherever texts may be."""
    data = invert(tiny_images())
    images = data.test.floats(slice(20))
    curve = LossCurve([1.0, 0.0, -1.0], [2.0, 0.1, 0.0], [1.0, 0.05, 0.0], [3.0, 0.2, 0.0])
    scores = {"dataset": data.name, "num_samples": 20, "prompt_accuracy": 0.95, "prompt_accuracy_interval": [0.9, 0.98],
              "frechet_distance": 123.456, "frechet_floor": 1.5, "gap_closed": None, "data_copying": 0.5}  # fmt: skip
    evaluation = Evaluation(
        scores, images, [STRANGE] * 20, {"gap_closed": f"no LoRA {STRANGE}"}, f"Compared. {STRANGE}",
        columns=tuple(map(str, range(10))), suspects=[Suspect(images[0], STRANGE, images[1:3], [0.1, 0.2])] * 12,
        curves={"model": curve, "base": curve},
    )  # fmt: skip
    path = tmp_path / "out.html"
    write_report(path, evaluation, f"a: {STRANGE}", {"command": STRANGE})
    return path


def test_what_the_page_says(page):
    text = page.read_text()
    assert "image/digits_inverted: 20 samples" in text
    for words in (
        "0.950",
        "[0.900, 0.980]",
        "123.5",
        "1.500",
        "closest to the training images",
        "without the LoRA",
        "no LoRA",
    ):
        assert words in text, words
    assert text.count("gap closed") == 1  # among what is not measured
    assert text.count("<img ") == 20 + 12 * 3
    assert text.count("<polyline") == text.count("<polygon") == 2
    assert not re.search(r"\b(nan|inf)\b", text)


def test_a_band_runs_along_its_upper_edge_and_back_along_the_lower(page):
    points = re.search(r'<polygon points="([^"]*)"', page.read_text())[1].split()
    upper, lower = ([tuple(map(float, point.split(","))) for point in edge] for edge in (points[:3], points[:2:-1]))
    assert all(a == b and high <= low for (a, high), (b, low) in zip(upper, lower))  # y grows downwards
    assert upper[0][1] < lower[0][1]


def test_nothing_is_fetched_and_nothing_runs(page):
    text = page.read_text()
    assert "<script" not in text
    assert html.escape(STRANGE) in text
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)', text))
    assert not re.search(r"https?://|url\(|@import|<link|<iframe", text)
    assert "default-src 'none'" in text


def test_an_evaluation_of_pictures_alone(tmp_path):
    """Large ones in colour, without classes, and a curve of a loss that is 0 everywhere."""
    scores = {"dataset": "d", "num_samples": 2, "nearest_distance": 0.1, "gap_closed": -12.34}
    curve = {"model": LossCurve([1.0], [0.0], [], [])}
    evaluation = Evaluation(scores, torch.zeros(2, 3, 80, 80), ["a fox", "b"], nearest_to="the folder", curves=curve)
    write_report(tmp_path / "plain.html", evaluation, "", {})
    text = (tmp_path / "plain.html").read_text()
    assert text.count("<img ") == 2 and "class=pixels" not in text
    assert "<span>a fox</span>" in text and "<b>-12.3</b>" in text
    assert "Nearest images" not in text and "Not measured" not in text and "<svg" in text


def test_the_command_writes_it(tiny_run, work_folder, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "train_judge", lambda *arguments: train_judge(*arguments, steps=5))
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 20, "--intervals", 5, "--report", "a/out.html"]
    assert run_script(EVALUATE, *words, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["resamples"] == 5
    assert len(scores["loss_curve"]["model"]["loss"]) == 16
    text = (work_folder / "a/out.html").read_text()
    assert f"[{scores['coverage_interval'][0]:.3f}, {scores['coverage_interval'][1]:.3f}]" in text
    assert "--report a/out.html" in text  # the command line
    assert "ancestral" in text  # the config


MEASURE = """
addEventListener('load', () => {
  const frame = document.querySelector('iframe'), page = frame.contentDocument;
  const images = [...page.images], text = page.querySelector('td'), body = getComputedStyle(page.body);
  document.body.innerHTML = '<pre>' + JSON.stringify({
    decoded: images.filter(i => i.complete && i.naturalWidth > 0).length, images: images.length,
    wide: page.documentElement.scrollWidth, plot: page.querySelector('svg').getBoundingClientRect().height,
    font: parseFloat(getComputedStyle(text).fontSize), paper: body.backgroundColor, ink: body.color,
    fetched: frame.contentWindow.performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:')),
  }) + '</pre>';
})
"""


@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium-headless-shell has one")
@pytest.mark.parametrize("width", [1000, 360])
def test_a_browser_shows_it(page, width, tmp_path):
    """In a frame of a phone's and of a desk's width: every picture decodes, nothing overflows or is fetched."""
    frame = f'<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{html.escape(page.read_text())}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{frame}<script>{MEASURE}</script></body>")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update"]  # fmt: skip
    command = [BROWSER, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2000", "--dump-dom"]
    shown = subprocess.run([*command, str(tmp_path / "frame.html")], capture_output=True, text=True, timeout=60)
    found = SimpleNamespace(**json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", shown.stdout, re.DOTALL)[1])))
    assert found.images == found.decoded == 20 + 12 * 3
    assert found.wide <= width
    assert found.plot > 150
    assert found.font >= 12
    assert found.paper != found.ink
    assert found.fetched == []
