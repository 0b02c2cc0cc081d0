"""The judge: a small classifier of real images, whose verdicts and features score the generated ones.

It is trained once on the real training split and carries its own accuracy on the held-out split, so that a prompt
accuracy can be read against what the judge itself gets right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Judge(nn.Module):
    """images in [-1, 1] -> class logits, with `features` (B, 64) before the last layer.

    Args:
        channels, image_size: of the images.
        num_classes: of the data set.
    """

    FEATURES = 64

    def __init__(self, channels: int, image_size: int, num_classes: int):
        super().__init__()
        side = -(-image_size // 8)  # three halvings, rounded up
        self.trunk = nn.Sequential(
            *_halve(channels, 32, kernel=5),
            *_halve(32, 64, kernel=3),
            *_halve(64, 64, kernel=3),
            nn.Flatten(),
            nn.Linear(64 * side**2, self.FEATURES),
            nn.BatchNorm1d(self.FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.FEATURES, num_classes)

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        return self.trunk(images)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.head(self.features(images))


def _halve(width_in: int, width_out: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(width_in, width_out, kernel, stride=2, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(width_out), nn.ReLU(inplace=True)]


def train_judge(
    images: Callable[[Tensor], Tensor],
    labels: Int[Tensor, " N"],
    num_classes: int,
    *,
    steps: int = 500,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Judge:
    """A judge of these images, in evaluation mode on the CPU; a few seconds on two cores.

    Args:
        images: indices (B,) of the training split -> (B, C, H, W) in [-1, 1].
        labels: classes in [0, num_classes).
        steps, batch_size, learning_rate: of AdamW with a one-cycle schedule; images are shifted by up to two pixels.
        seed: of weights, order and shifts.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, channels, _, size = images(torch.zeros(1, dtype=torch.long)).shape
        judge = Judge(channels, size, num_classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=0.05)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(labels), (batch_size,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = torch.roll(images(index), shift, dims=(2, 3))
        loss = F.cross_entropy(judge(batch), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        one_cycle.step()
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(judge: Judge, images: Float[Tensor, "N C H W"], labels: Int[Tensor, " N"]) -> float:
    """Share of images whose most likely class is the label, in [0, 1]."""
    hits = [judge(x).argmax(1).eq(y).sum() for x, y in zip(images.split(512), labels.split(512))]
    return float(torch.stack(hits).sum() / len(labels))


@torch.no_grad()
def judge_features(judge: Judge, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D"]:
    """Features of many images, in blocks."""
    return torch.cat([judge.features(x) for x in images.split(512)])
