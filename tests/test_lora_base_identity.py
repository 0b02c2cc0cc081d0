"""Which weights a LoRA was trained on: files of years ago hold these samples, so their places stay."""

import pytest
import torch

from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.lora.base_identity import check_base, sample_of
from xdiffusion.lora.settings import LoRAError


def test_a_sample_is_taken_in_the_middle_of_each_quarter():
    matrix, kernel = torch.arange(24.0).view(4, 6), torch.arange(32.0).view(2, 4, 2, 2)
    weights = {"matrix": matrix, "kernel": kernel.to(memory_format=torch.channels_last), "number": torch.ones(1, 1) / 3}
    assert sample_of(weights) == {"matrix": [3, 9, 15, 21], "kernel": [4, 12, 20, 28], "number": [0.33333] * 4}


def test_without_a_hash_the_sample_tells_where_there_are_values():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    lora = LoRAFile({}, base_hash="abc", base_sample=sample_of({"a": weight}))
    for same in (weight, weight.bfloat16(), (40 * weight).to(torch.int8), weight.to("meta")):
        assert check_base(lora, None, {"a": same}, "x") is None
    with pytest.raises(LoRAError, match="with other weights in the layers that it adapts"):
        check_base(lora, None, {"a": -weight}, "x")
