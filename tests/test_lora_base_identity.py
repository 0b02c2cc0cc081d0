"""Which weights a LoRA was trained on: files of years ago hold these samples, so their places stay."""

import torch

from xdiffusion.lora.base_identity import sample_of


def test_a_sample_is_taken_in_the_middle_of_each_quarter():
    matrix, kernel = torch.arange(24.0).view(4, 6), torch.arange(32.0).view(2, 4, 2, 2)
    weights = {"matrix": matrix, "kernel": kernel.to(memory_format=torch.channels_last), "number": torch.ones(1, 1) / 3}
    assert sample_of(weights) == {"matrix": [3, 9, 15, 21], "kernel": [4, 12, 20, 28], "number": [0.33333] * 4}
