"""The diagrams of the lessons are those of the models as they are built."""

import runpy

import pytest
import torch
from conftest import ROOT

DIAGRAMS = runpy.run_path(str(ROOT / "docs/diagrams.py"))


@pytest.mark.parametrize("name", DIAGRAMS["DRAWN"])
def test_a_diagram_is_of_the_model_as_it_is_built(name):
    """Else `python docs/diagrams.py` draws it again."""
    assert (ROOT / "docs/pictures" / name).read_text() == DIAGRAMS["DRAWN"][name]()


def test_each_skip_goes_where_its_arrow_does():
    tensors = DIAGRAMS["seen"](DIAGRAMS["digits_model"]())
    written = [DIAGRAMS["ends"](tensors, writer)[1] for writer, _ in DIAGRAMS["SKIPS"]]
    read = [DIAGRAMS["ends"](tensors, reader)[0] for _, reader in DIAGRAMS["SKIPS"]]
    for own, joined in zip(written, read):
        skips = joined[:, joined.shape[1] - own.shape[1] :]
        assert [torch.equal(skips, other) for other in written] == [own is other for other in written]
