"""What transformers calls in every layer: the attention function "pal", and the hook that runs flamingo blocks.

Both read `AttentionInputs`: audio KV from `audio_kv`, masks from `mask`; the softmax is in `attention_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from pipeline.model.attention_inputs import AttentionInputs, LayerKind
from pipeline.model.attention_ops import KeysValues, attend, attention_weights

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
    """Attends from text (and PLITS) queries to the sequence's keys and, at an audio layer, to LAL's.

    Args:
        query: (B, H, Q, E); key and value: (B, kv_heads, K, E), rotated already.
        attention_mask: None; masks come from `pal`.
        pal: the attention inputs of this forward pass.

    Returns:
        (B, Q, H, E), and no weights.
    """
    layer: Any = module.layer_idx
    window = pal.effective_window(sliding_window)
    lal_streams = pal.audio.clips.lal[layer]
    blocks, dummy = [(key, value)], None
    if lal_streams and pal.audio.dummy_clip:
        # Every rank runs every trainable module in every step, or a collective operation would wait for ever.
        k, v = pal.audio.clips.lal_keys_values(layer)
        lal_streams, dummy = (), (k.sum() + v.sum()) * 0
    elif lal_streams:
        blocks.insert(0, pal.audio.lal(layer))
    kind = LayerKind(lal_streams, window)
    settings: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "softcap": softcap}
    if pal.hook is not None:
        mask = pal.mask(kind, query, flex=False)
        assert not isinstance(mask, BlockMask)
        pal.hook(layer, attention_weights(query, blocks, mask, scaling=scaling, softcap=softcap))
    flex = dropout == 0 and pal.prefers_flex(kind, query)
    if pal.packed_questions is not None and not flex:
        out = _attend_packed(pal, kind, query, blocks, settings)
    else:
        out = attend(query, blocks, pal.mask(kind, query, flex=flex), **settings)
    out = out.transpose(1, 2)
    return (out if dummy is None else out + dummy), None


def _attend_packed(
    pal: AttentionInputs, kind: LayerKind, query: Tensor, blocks: Sequence[KeysValues], settings: dict[str, Any]
) -> Tensor:
    """Attends with prefixes as rows and each packed question as another row: no pair of two questions is computed."""
    packed = pal.packed_questions
    assert packed is not None
    *audio, (key, value) = blocks
    prefix = (packed.prefix_heads(key), packed.prefix_heads(value))
    out_prefix = None
    if packed.prefix_length:
        q = packed.prefix_heads(query)
        out_prefix = attend(q, [*audio, prefix], pal.prefix_inputs.mask(kind, q, flex=False), **settings)
    q = packed.question_heads(query)
    keys_values = [
        *map(packed.repeat_for_questions, audio),
        packed.repeat_for_questions(prefix),
        (packed.question_heads(key), packed.question_heads(value)),
    ]
    out_question = attend(q, keys_values, pal.question_inputs.mask(kind, q, flex=False), **settings)
    return packed.pack(out_prefix, out_question, query)


def flamingo_hook(decoder_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs the gated cross-attention blocks of a decoder layer's flamingo streams before it (a forward-pre-hook)."""
    pal: AttentionInputs = kwargs["pal"]
    attention: Any = decoder_layer.self_attn
    layer: int = attention.layer_idx
    hidden, *remaining = args
    for stream in pal.audio.clips.flamingo[layer]:
        block = pal.audio.clips.streams[stream].layer_blocks[str(layer)]
        k, v = (x.expand(len(hidden), -1, -1, -1) for x in pal.audio.flamingo(layer, stream))
        hidden = block(hidden, (k, v), pal.flamingo_mask(stream))
    return (hidden, *remaining), kwargs


AttentionInterface.register(ATTENTION_NAME, pal_attention)
