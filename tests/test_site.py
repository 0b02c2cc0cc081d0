"""The documents as a site: all of them, in order, and no link that leads nowhere."""

import re
import shutil

import pytest
import yaml
from conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def pages(nav):
    """The paths of a nav, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [path for entry in (nav.values() if isinstance(nav, dict) else nav) for path in pages(entry)]


def test_every_document_has_its_place():
    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in DOCUMENTS)
    lessons = [path for path in listed if "lessons" in path]
    assert listed[:5] == ["README.md", *sorted(lessons)]


@pytest.mark.parametrize("lesson", sorted((ROOT / "docs/lessons").glob("*.md")), ids=lambda path: path.stem[:2])
def test_equations_are_numbered_in_order_and_fit_a_laptop_s_page(lesson):
    """Of 1,280 pixels; a number that one would have to scroll to is not seen."""
    equations = re.findall(r"^    \S.*?\((\d+)\)$", lesson.read_text(), re.MULTILINE)
    assert [int(number) for number in equations] == [*range(1, len(equations) + 1)] != []
    lines = [line for line in lesson.read_text().splitlines() if re.fullmatch(r"    \S.*\(\d+\)", line)]
    assert max(map(len, lines)) <= 92


@pytest.fixture
def build(tmp_path):
    """build(): the site of a copy of the repository's documents; returns its folder."""
    pytest.importorskip("material", reason="needs the extra docs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    for name in ("mkdocs.yml", "README.md", "LICENSE", "docs", "configs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)

    def build_site():
        build(load_config(str(tmp_path / "mkdocs.yml")))
        return tmp_path / "output/site"

    return build_site


def test_the_site_is_whole_and_fetches_nothing(build):
    site = build()
    assert len([*site.rglob("index.html")]) == len(DOCUMENTS)
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r'(?:src|<link[^>]* href)="?(?:https?:)?//', text), page
        for shown in re.findall(r'<img[^>]* src="([^"]+)"', text):
            assert (page.parent / shown).is_file(), shown
    lesson = (site / "docs/lessons/01-ddpm-and-v-prediction/index.html").read_text()
    assert "xt = alpha(t) * x0 + sigma(t) * eps" in lesson
    assert (site / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml").is_file()  # the lesson links to it


@pytest.mark.parametrize("link", ["nowhere.md", "docs/results.md#nothing", "/docs/results.md"])
def test_a_link_that_leads_nowhere_fails(link, build, tmp_path):
    from mkdocs.exceptions import Abort

    with (tmp_path / "README.md").open("a") as readme:
        readme.write(f"\n[somewhere]({link})\n")
    with pytest.raises(Abort):
        build()
