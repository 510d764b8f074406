"""Texts of different lengths: which package of the standard library does a line of code come from?

    python examples/padded.py                                       starts its three stages itself
    torchrun --standalone --nproc-per-node 3 examples/padded.py     the same under torchrun

A batch is as long as its longest line, so shapes change from batch to batch, and every stage must know which bytes are
padding: Embed gives a pair, (h, padding), and each layer behind it is given one.
"""

import asyncio
import email
import random
import unittest
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import dnipipe

PACKAGES = (asyncio, email, unittest)
LONGEST, WIDTH = 64, 48  # bytes of a line, features

Pair = tuple[Tensor, Tensor]


class Embed(nn.Module):
    """Bytes (B, T), 0 where there is none ──► their features (B, T, WIDTH), and where the padding is (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LONGEST, WIDTH)

    def forward(self, x: Tensor) -> Pair:
        return self.bytes(x) + self.places.weight[: x.shape[1]], x == 0


class Block(nn.Module):
    """Attention to what is no padding, and a layer for each byte by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.each = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, pair: Pair) -> Pair:
        h, padding = pair
        a = self.before(h)
        h = h + self.attend(a, a, a, key_padding_mask=padding, need_weights=False)[0]
        return h + self.each(self.behind(h)), padding


class Classify(nn.Module):
    """The mean over what is no padding ──► a score a package (B, len(PACKAGES))."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(WIDTH, len(PACKAGES))

    def forward(self, pair: Pair) -> Tensor:
        h, padding = pair
        there = (~padding).unsqueeze(-1).to(h.dtype)
        return self.scores((h * there).sum(1) / there.sum(1))


def lines() -> list[tuple[bytes, int]]:
    """(line, which package's): as many of each package, none twice."""
    found = []
    for number, package in enumerate(PACKAGES):
        files = sorted(Path(package.__file__).parent.glob("*.py"))
        mine = {line.strip() for file in files for line in file.read_bytes().splitlines()}
        found.append([(line[:LONGEST], number) for line in sorted(mine) if len(line) > 15])
    count = min(map(len, found))
    return [each for mine in found for each in random.Random(0).sample(mine, count)]


def padded(samples: list[tuple[bytes, int]]) -> Pair:
    """A batch: x (B, T), as long as the longest, and y (B,)."""
    texts = [torch.tensor(list(line)) for line, _ in samples]
    return nn.utils.rnn.pad_sequence(texts, batch_first=True), torch.tensor([number for _, number in samples])


if __name__ == "__main__":
    samples = lines()
    random.Random(0).shuffle(samples)
    held_out = len(samples) // 10
    train = DataLoader(samples[held_out:], 32, shuffle=True, collate_fn=padded)
    validation = DataLoader(samples[:held_out], 32, collate_fn=padded)
    run = dnipipe.Run(
        nn.Sequential(Embed(), *(Block() for _ in range(4)), Classify()),
        stages=3,
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 2e-3),
        eval={"every": 200},
    )
    done = run.fit(train, validation, epochs=6)
    print(f"{done['eval']['accuracy']:.1%} of lines that it has not seen; by chance {1 / len(PACKAGES):.0%}")
