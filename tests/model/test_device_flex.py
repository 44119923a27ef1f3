"""Tests how often FlexAttention is compiled, and that it never falls back to dense scores, on CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from pipeline.model import attention_ops, mask
from pipeline.model.attention_ops import attend
from pipeline.model.mask import MaskRule, block_mask
from pipeline.model.positions import TokenMetadata

ENTRIES = 6


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Compiles as on a GPU, with a backend that generates no code; counts the compiled entries."""
    entries: Counter[str] = Counter()
    original = torch.compile

    def compile_without_code(function: Any, **settings: Any) -> Any:
        def backend(graph: Any, _: Any) -> Callable[..., Any]:
            entries[function.__name__] += 1
            forward: Callable[..., Any] = graph.forward
            return forward

        return original(function, backend=backend, **settings)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_without_code)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)  # refuses gradients on CPU
    monkeypatch.setattr(attention_ops, "flex_attention", attention_ops.compiled_flex.__wrapped__())
    monkeypatch.setattr(mask, "create_block_mask", mask.compiled_create_block_mask.__wrapped__())
    return entries


def metadata(rows: int, entries: int, *, audio: bool = False) -> TokenMetadata:
    position = torch.arange(entries).repeat(rows, 1)
    valid = torch.ones(rows, entries, dtype=torch.bool)
    return TokenMetadata(position, torch.zeros_like(position), valid, valid if audio else ~valid)


def attend_to(rows: int, text: int, audio: int) -> Tensor:
    """Attends from packed text, to audio in front of it where there is any, as a layer does."""
    query = metadata(rows, text)
    heads = torch.randn(rows, text, 4, 16, requires_grad=torch.is_grad_enabled()).transpose(1, 2)
    sequence = torch.randn(2, rows, text, 2, 16, requires_grad=torch.is_grad_enabled()).transpose(2, 3)
    blocks, key = [(sequence[0], sequence[1])], query
    if audio:
        beside = torch.randn(2, rows, audio, 2, 16).transpose(2, 3)
        blocks.insert(0, (beside[0], beside[1]))
        key = TokenMetadata.concat([metadata(rows, audio, audio=True), query])
    return attend(heads, blocks, block_mask(MaskRule(), query, key), scaling=0.25)


def test_training_validation_and_any_number_of_rows_share_few_compiled_entries(traced: Counter[str]) -> None:
    for rows in (3, 4, 2, 1):
        for training in (True, False):
            with torch.set_grad_enabled(training):
                for text, audio in ((140, 150), (150, 0), (260, 300)):
                    assert attend_to(rows, text, audio).shape == (rows, 4, text, 16)
    assert 0 < traced["flex_attention"] <= ENTRIES, traced
    assert 0 < traced["create_block_mask"] <= ENTRIES, traced


@pytest.mark.usefixtures("traced")
def test_the_limit_of_recompilations_is_an_error_and_no_fall_back_to_dense_scores() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        attend_to(2, 140, 150)
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"would compute dense scores.*attention_path"):
            attend_to(2, 140, 150)
