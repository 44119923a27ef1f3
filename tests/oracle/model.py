"""The oracle: one conversation through a language model and its streams, in the terms of the formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracle import language_model as llm
from tests.oracle.connectors import Connector, audio_tokens, frames_covered
from tests.oracle.cross_attention import flamingo_block, mlp
from tests.oracle.language_model import LanguageModel, Weights

Clip = Mapping[str, Tensor]  # encoder -> features (frames, width)


@dataclass(frozen=True)
class Stream:
    encoders: tuple[str, ...]
    integration: str
    connector: Connector
    audio_layers: tuple[int, ...] = ()
    summary_of: int | None = None
    gain: str | None = None  # what the weight `layer_gains.<layer>` scales: "keys_values" or "values"


@dataclass(frozen=True)
class Method:
    """A language model plus streams, and the switches.

    Attributes:
        position_gap: text after a clip continues after the clip's positions; False is a mistake, planted by a test.
        audio_delay: positions by which audio comes late; anything but 0 is a planted mistake.
    """

    language_model: LanguageModel
    streams: tuple[Stream, ...]
    norm_audio_tokens: bool = True
    system_text_sees_audio: bool = False
    audio_queries: bool = False
    position_gap: bool = True
    audio_delay: int = 0


@dataclass
class Member:
    """An entry of the sequence, which passes every layer: a text token, or an audio token by PLITS."""

    x: Tensor
    position: int
    is_audio: bool = False


@dataclass
class AudioToken:
    """A token beside the sequence; `carried` is the attention output of its own queries (audio_queries)."""

    a: Tensor
    position: int
    stream: int
    clip: int
    carried: Tensor | float = 0.0


@dataclass
class Key:
    position: int
    is_audio: bool
    k: list[Tensor]
    v: list[Tensor]


@dataclass
class LaidOutConversation:
    """A conversation with positions. `text` maps an item of the conversation to its member."""

    members: list[Member] = field(default_factory=list)
    audio: list[AudioToken] = field(default_factory=list)
    text: dict[int, int] = field(default_factory=dict)


def lay_out(method: Method, weights: Weights, items: Sequence[int | Clip]) -> LaidOutConversation:
    """Assigns positions to a conversation, whose items are token ids and clips."""
    conversation = LaidOutConversation()
    position = 0
    clip_number = 0
    for number, item in enumerate(items):
        if isinstance(item, int):
            conversation.text[number] = len(conversation.members)
            conversation.members.append(
                Member(llm.embed(method.language_model, under(weights, "language_model"), item), position)
            )
            position += 1
            continue
        tokens = [
            audio_tokens(stream.connector, under(weights, f"streams.{index}.connector"), item, stream.encoders)
            for index, stream in enumerate(method.streams)
        ]
        order = clip_order(method.streams, item, [len(stream_tokens) for stream_tokens in tokens])
        for offset, (index, token) in enumerate(order):
            at = position + offset + method.audio_delay
            if method.streams[index].integration == "plits":
                conversation.members.append(Member(tokens[index][token], at, is_audio=True))
            else:
                conversation.audio.append(AudioToken(tokens[index][token], at, index, clip_number))
        for index, stream in enumerate(method.streams):
            if stream.integration == "flamingo":  # takes no positions: all its tokens are at the position of the clip
                at = position + method.audio_delay
                conversation.audio.extend(AudioToken(a, at, index, clip_number) for a in tokens[index])
        if method.position_gap:
            position += len(order)
        clip_number += 1
    return conversation


def clip_order(streams: Sequence[Stream], clip: Clip, counts: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (stream, token) in order of position: streams one after the other, a summary inside its full stream."""
    order: list[tuple[int, int]] = []
    for index, stream in enumerate(streams):
        if stream.summary_of is not None or stream.integration == "flamingo":
            continue
        frames = len(clip[stream.encoders[0]])
        waiting = [
            (i, token) for i, other in enumerate(streams) if other.summary_of == index for token in range(counts[i])
        ]
        for token in range(counts[index]):
            order.append((index, token))
            covered = frames_covered(stream.connector, token, frames)
            for summary in list(waiting):
                if frames_covered(streams[summary[0]].connector, summary[1], frames) <= covered:
                    order.append(summary)
                    waiting.remove(summary)
    return order


def under(weights: Weights, prefix: str) -> Weights:
    return {name[len(prefix) + 1 :]: weight for name, weight in weights.items() if name.startswith(f"{prefix}.")}


def not_after(method: Method, query_position: int, query_is_audio: bool, key_position: int, key_is_audio: bool) -> bool:
    """Returns whether a key is not after the query, or a switch lets text attend to audio anyway."""
    lifted = method.system_text_sees_audio and key_is_audio and not query_is_audio
    return lifted or key_position <= query_position


def attends(method: Method, layer: int, query_position: int, query_is_audio: bool, key: Key) -> bool:
    """Applies the mask rule to a query and a key of the same conversation."""
    window = method.language_model.windows[layer]
    near = window is None or query_position - key.position < window
    return near and not_after(method, query_position, query_is_audio, key.position, key.is_audio)


def run(method: Method, weights: Weights, items: Sequence[int | Clip]) -> tuple[LaidOutConversation, list[Tensor]]:
    """Returns the laid out conversation and the logits of every member, in order."""
    lm = method.language_model
    lm_weights = under(weights, "language_model")
    conversation = lay_out(method, weights, items)
    for layer in range(lm.num_layers):
        audio = [token for token in conversation.audio if layer in method.streams[token.stream].audio_layers]
        for index, stream in enumerate(method.streams):
            if stream.integration == "flamingo" and layer in stream.audio_layers:
                block = under(weights, f"streams.{index}.layer_blocks.{layer}")
                for member in conversation.members:
                    visible = [
                        token.a
                        for token in audio
                        if token.stream == index
                        and not_after(method, member.position, member.is_audio, token.position, True)
                    ]
                    member.x = flamingo_block(block, lm.num_heads, member.x, visible)
        lal = [token for token in audio if method.streams[token.stream].integration == "lal"]
        lal_keys = lal_attention_keys(method, weights, layer, lal)
        decoder_layer(method, lm_weights, layer, conversation.members, [key for _, _, key in lal_keys])
        if method.audio_queries:
            query_audio(method, lm_weights, layer, lal_keys)
    return conversation, [llm.logits(lm, lm_weights, member.x) for member in conversation.members]


def lal_attention_keys(
    method: Method, weights: Weights, layer: int, tokens: list[AudioToken]
) -> list[tuple[AudioToken, Tensor, Key]]:
    """Returns n_l(A_l) and K, V of LAL tokens: A_l = P_l(A), plus the attention output of their earlier queries."""
    lm, lm_weights = method.language_model, under(weights, "language_model")
    keys = []
    for token in tokens:
        h = mlp(weights, f"streams.{token.stream}.layer_projections.{layer}", token.a) + token.carried
        if method.norm_audio_tokens:
            h = llm.input_norm(lm, lm_weights, layer, h)
        key = make_key(lm, lm_weights, layer, h, token.position, is_audio=True)
        target = method.streams[token.stream].gain
        if target is not None:
            gain = weights[f"streams.{token.stream}.layer_gains.{layer}.weight"]
            key.v = [gain * head for head in key.v]
            key.k = [gain * head for head in key.k] if target == "keys_values" else key.k
        keys.append((token, h, key))
    return keys


def make_key(lm: LanguageModel, lm_weights: Weights, layer: int, h: Tensor, position: int, is_audio: bool) -> Key:
    k = [llm.rotate(lm, layer, head, position) for head in llm.heads(lm, lm_weights, layer, "k", h)]
    return Key(position, is_audio, k, llm.heads(lm, lm_weights, layer, "v", h))


def make_query(lm: LanguageModel, lm_weights: Weights, layer: int, h: Tensor, position: int) -> list[Tensor]:
    return [llm.rotate(lm, layer, head, position) for head in llm.heads(lm, lm_weights, layer, "q", h)]


def decoder_layer(method: Method, lm_weights: Weights, layer: int, members: list[Member], audio_kv: list[Key]) -> None:
    """Runs one layer of the language model over the sequence, with the LAL keys beside the sequence's keys."""
    lm = method.language_model
    normed = [llm.input_norm(lm, lm_weights, layer, member.x) for member in members]
    keys = [
        make_key(lm, lm_weights, layer, h, member.position, member.is_audio)
        for member, h in zip(members, normed, strict=True)
    ]
    for member, h in zip(members, normed, strict=True):
        query = make_query(lm, lm_weights, layer, h, member.position)
        visible = [key for key in keys + audio_kv if attends(method, layer, member.position, member.is_audio, key)]
        output = llm.attention_output(
            lm, lm_weights, layer, query, [key.k for key in visible], [key.v for key in visible]
        )
        member.x = llm.add_attention(lm, lm_weights, layer, member.x, output)
        member.x = llm.add_ffn(lm, lm_weights, layer, member.x)


def query_audio(
    method: Method, lm_weights: Weights, layer: int, lal_keys: list[tuple[AudioToken, Tensor, Key]]
) -> None:
    """Carries D_l = W_O Attention(n(A_l)), over the LAL keys of the token's own clip, to later audio layers."""
    lm = method.language_model
    for token, h, _ in lal_keys:
        query = make_query(lm, lm_weights, layer, h, token.position)
        visible = [
            key
            for other, _, key in lal_keys
            if other.clip == token.clip and attends(method, layer, token.position, True, key)
        ]
        output = llm.attention_output(
            lm, lm_weights, layer, query, [key.k for key in visible], [key.v for key in visible]
        )
        token.carried = token.carried + output


def loss_sum(conversation: LaidOutConversation, scores: Sequence[Tensor], labels: Sequence[int]) -> Tensor:
    """Returns the summed cross-entropy of a conversation's labels; each is predicted by the member before it.

    Args:
        conversation, scores: results of `run`.
        labels: one for each item; -100 where there is no loss, and always for a clip.
    """
    total = torch.zeros((), dtype=torch.float64)
    for item, label in enumerate(labels):
        if label != -100:
            total = total - torch.log(llm.softmax(scores[conversation.text[item] - 1])[label])
    return total
