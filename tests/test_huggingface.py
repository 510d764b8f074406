"""examples/huggingface.py: what the stages train is Hugging Face's own model, and it has what they have learnt."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn

import dnipipe

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[huggingface]'")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports' own
        return SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "huggingface.py"), run_name="example"))


def small(example: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return example.LlamaForCausalLM(example.LlamaConfig(**{**example.CONFIG.to_dict(), **settings}))


def batches(example: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(torch.utils.data.DataLoader(example.samples()[:12], 4))


def trained(example: Any, llama: Any, run: Path) -> nn.Module:
    """Three batches under exact backprop, in the laboratory."""
    here: dict[str, Any] = {"transport": {"kind": "local"}, "output": {"run": str(run), "quiet": True}}
    made = dnipipe.Run(
        example.layers_of(llama),
        4,
        loss=example.loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
        rule="wait",
        **here,
    )
    made.fit(batches(example))
    return made.model()


def test_the_layers_are_the_model(example: Any) -> None:
    llama = small(example).eval()
    (x, y), *_ = batches(example)
    assert x.shape == (4, example.CONTEXT) and torch.equal(x[:, 1:], y[:, :-1])
    with torch.no_grad():
        torch.testing.assert_close(example.layers_of(llama)(x), llama(x).logits)


def test_after_training_the_model_has_what_plain_autograd_gives_it(example: Any, tmp_path: Path) -> None:
    llama, plain = small(example), small(example)
    trained(example, llama, tmp_path / "run")
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for x, y in batches(example):
        optimizer.zero_grad()
        example.loss(plain(x).logits, y).backward()
        optimizer.step()
    for (name, ours), theirs in zip(llama.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_a_head_that_is_the_embedding_needs_a_copy_of_its_own(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = small(example, tie_word_embeddings=True)
    with pytest.raises(SystemExit):
        trained(example, llama, tmp_path / "refused")
    assert "stages 0 and 3 share a parameter" in capsys.readouterr().err
    llama.lm_head.weight = nn.Parameter(llama.lm_head.weight.detach().clone())
    trained(example, llama, tmp_path / "run")
    assert not torch.equal(llama.lm_head.weight, llama.model.embed_tokens.weight)
