"""A decoder of Hugging Face's in stages, and whole again: a small Llama learns from Python's own sources, byte by byte.

    pip install transformers
    python examples/huggingface.py                                        starts its four stages itself
    torchrun --standalone --nproc-per-node 4 examples/huggingface.py      the same under torchrun

Its layers are taken as they are, each by a module that gives one tensor to the next. They stay the model's own, so when
training is over it has the trained weights, and `generate` writes with them. A pretrained one is cut the same way; if
its embedding and its head share a weight, which cannot be in two stages, give the head a copy of its own first:

    llama.lm_head.weight = nn.Parameter(llama.lm_head.weight.detach().clone())
"""

import asyncio
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import dnipipe

CONTEXT = 64  # bytes
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=6,
    num_attention_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
)


class Block(nn.Module):
    """One of its layers; each turns the places in the sequence into angles for itself. Without a mask it is causal."""

    def __init__(self, layer: LlamaDecoderLayer, config: LlamaConfig) -> None:
        super().__init__()
        self.layer, self.angles = layer, LlamaRotaryEmbedding(config)

    def forward(self, h: Tensor) -> Tensor:
        places = torch.arange(h.shape[1], device=h.device).unsqueeze(0)
        out = self.layer(h, position_embeddings=self.angles(h, places))
        return out if isinstance(out, Tensor) else out[0]  # older versions give a tuple


def layers_of(llama: LlamaForCausalLM) -> nn.Sequential:
    """Tokens (B, T) ──► scores (B, T, vocabulary), out of the model's own modules."""
    blocks = [Block(layer, llama.config) for layer in llama.model.layers]
    return nn.Sequential(llama.model.embed_tokens, *blocks, llama.model.norm, llama.lm_head)


def loss(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), y.flatten())


def samples() -> list[tuple[Tensor, Tensor]]:
    """Pieces of asyncio's sources, and the same one byte on."""
    files = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    return [(piece[:-1], piece[1:]) for piece in text.unfold(0, CONTEXT + 1, CONTEXT)]


if __name__ == "__main__":
    torch.manual_seed(0)
    llama = LlamaForCausalLM(CONFIG)
    pieces = samples()
    held_out = len(pieces) // 10
    run = dnipipe.Run(
        layers_of(llama),
        stages=4,
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 2e-3),
        predictor={"hidden": 1},
    )
    done = run.fit(DataLoader(pieces[held_out:], 16, shuffle=True), DataLoader(pieces[:held_out], 16), epochs=3)
    print(f"held-out loss {done['eval']['loss']:.3f} nats a byte")
    run.model()  # its layers are llama's
    prompt = torch.tensor([list(b"    def ")])
    with torch.no_grad():
        out = llama.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False)
    print(bytes(out[0].tolist()).decode(errors="replace"))
