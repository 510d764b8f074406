"""A large vocabulary: a small language model over words, of which the predictors score a sample only.

    python examples/words.py FILE                  four stages, a link of one batch a hop, in this process
    python examples/words.py FILE --sampled 0      predictors score all words: dearer than the layers
    python examples/words.py FILE --stages 1       backprop

FILE is any text of some size; 800 batches of 16 × 32 words, and the loss on its last tenth.
"""

import argparse
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import dnipipe

BATCH, CONTEXT, WIDTH = 16, 32, 64

Batches = list[tuple[Tensor, Tensor]]


class Embed(nn.Module):
    """Words (B, T) ──► (B, T, WIDTH)."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, WIDTH), nn.Embedding(CONTEXT, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x) + self.places.weight[: x.shape[1]]


class Block(nn.Module):
    """Attention to what came before, and a layer for each word by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.each = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        a, later = self.before(h), nn.Transformer.generate_square_subsequent_mask(h.shape[1], device=h.device)
        h = h + self.attend(a, a, a, attn_mask=later, need_weights=False)[0]
        return h + self.each(self.behind(h))


def loss(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), y.flatten())


def numbered(text: str) -> tuple[Tensor, int]:
    """Each word's and sign's number, frequent ones first; and how many there are."""
    words = re.findall(r"\w+|[^\w\s]|\n", text.lower())
    numbers = {word: number for number, (word, _) in enumerate(Counter(words).most_common())}
    return torch.tensor([numbers[word] for word in words]), len(numbers)


def drawn(words: Tensor, count: int, seed: int) -> Batches:
    """So many batches from anywhere in it: x, and the same one word on."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        begins = torch.randint(len(words) - CONTEXT, (BATCH, 1), generator=generator)
        piece = words[begins + torch.arange(CONTEXT + 1)]
        batches.append((piece[:, :-1].contiguous(), piece[:, 1:].contiguous()))
    return batches


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--sampled", type=int, default=64, help="words that a predictor scores besides a batch's own")
    parser.add_argument("--stages", type=int, choices=(1, 4), default=4)
    parser.add_argument("--batches", type=int, default=800)
    options = parser.parse_args()
    words, count = numbered(options.file.read_text(encoding="utf-8"))
    train, held_out = words[: len(words) * 9 // 10], words[len(words) * 9 // 10 :]
    torch.manual_seed(0)
    run = dnipipe.Run(
        nn.Sequential(Embed(count), *(Block() for _ in range(4)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, count)),
        stages=[2, 3, 4] if options.stages == 4 else 1,
        loss=loss,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 2e-3),
        predictor={"hidden": 1, "sampled": options.sampled},
        transport={"kind": "local", "delay": int(options.stages > 1)},
        output={"quiet": True},
    )
    began = time.monotonic()
    done = run.fit(drawn(train, options.batches, 1), drawn(held_out, 40, 2))
    took = time.monotonic() - began
    print(f"{count} words: held-out loss {done['eval']['loss']:.3f} nats a word, {took:.0f} s")


if __name__ == "__main__":
    main()
