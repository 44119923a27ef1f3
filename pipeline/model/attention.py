"""What transformers calls in every layer: our attention function, and the hook that puts flamingo blocks before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from pipeline.model.attention_inputs import AttentionInputs
from pipeline.model.attention_ops import KeysValues, attend, attention_weights
from pipeline.model.packing import PackedQuestions

# No mask builder is registered under this name, so transformers makes no mask of its own.
ATTENTION_NAME = "pal"


def pal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pal: AttentionInputs,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,  # transformers adds keywords of its own from version to version
) -> tuple[Tensor, None]:
    """Attention of text (and PLITS) queries over the sequence's keys and, at an audio layer, over LAL's.

    Args:
        query: (B, heads, Nq, head_dim); key and value: (B, kv_heads, Nk, head_dim), rotated already.
        attention_mask: None; masks come from `pal`.
        pal: the attention_inputs of this forward pass.

    Returns:
        (B, Nq, heads, head_dim), and no weights.
    """
    layer: Any = module.layer_idx
    window = pal.effective_window(sliding_window)
    active = pal.audio.clips.lal[layer]
    blocks, nothing = [(key, value)], None
    if active and pal.audio.dummy_clip:
        # Every rank runs every trainable module in every step, or a collective operation would wait for ever.
        k, v = pal.audio.clips.lal_keys_values(layer)
        active, nothing = (), (k.sum() + v.sum()) * 0
    elif active:
        blocks.insert(0, pal.audio.lal(layer))
    settings: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "softcap": softcap}
    if pal.hook is not None:
        mask = pal.mask(active, window, query, flex=False)
        assert not isinstance(mask, BlockMask)
        pal.hook(layer, attention_weights(query, blocks, mask, scaling=scaling, softcap=softcap))
    flex = dropout == 0 and pal.prefers_flex(active, query)
    if pal.packed_questions is not None and not flex:
        out = _attend_unpacked(pal, pal.packed_questions, active, query, blocks, window, settings)
    else:
        out = attend(query, blocks, pal.mask(active, window, query, flex=flex), **settings)
    out = out.transpose(1, 2)
    return (out if nothing is None else out + nothing), None


def _attend_unpacked(
    pal: AttentionInputs,
    packed_questions: PackedQuestions,
    active: tuple[int, ...],
    query: Tensor,
    blocks: Sequence[KeysValues],
    window: int | None,
    settings: dict[str, Any],
) -> Tensor:
    """Prefixes as rows, and each packed question as another: no pair of two questions is computed."""
    *beside, (key, value) = blocks
    prefix = (packed_questions.prefix_of(key), packed_questions.prefix_of(value))
    out_prefix = None
    if packed_questions.prefix:
        q = packed_questions.prefix_of(query)
        out_prefix = attend(q, [*beside, prefix], pal.prefixes.mask(active, window, q, flex=False), **settings)
    q = packed_questions.own(query)
    keys = [
        *map(packed_questions.of_rows, beside),
        packed_questions.of_rows(prefix),
        (packed_questions.own(key), packed_questions.own(value)),
    ]
    out_own = attend(q, keys, pal.questions.mask(active, window, q, flex=False), **settings)
    return packed_questions.pack(out_prefix, out_own, query)


def flamingo_hook(decoder_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a decoder layer: the gated cross-attention blocks of its flamingo streams (a forward-pre-hook)."""
    pal: AttentionInputs = kwargs["pal"]
    attention: Any = decoder_layer.self_attn
    layer: int = attention.layer_idx
    hidden, *rest = args
    for stream in pal.audio.clips.flamingo[layer]:
        block = pal.audio.clips.streams[stream].layer_blocks[str(layer)]
        k, v = (x.expand(len(hidden), -1, -1, -1) for x in pal.audio.flamingo(layer, stream))
        hidden = block(hidden, (k, v), pal.flamingo_seen(stream))
    return (hidden, *rest), kwargs


AttentionInterface.register(ATTENTION_NAME, pal_attention)
