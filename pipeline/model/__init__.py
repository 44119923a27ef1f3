"""The integrations of audio into a language model, in torch and transformers; peft is imported for LoRA adapters only.

Read `modeling` (the forward pass and the loss) and `base` (its inputs), then `layout` and `positions` (where tokens
go), `mask` (which query attends to which key), `attention` and `audio_kv` (what a layer computes), `generation`.

Tensor names may end in a suffix of their axes, as in `x_BTD`; docstrings use the same letters for shapes:

    B  rows of a batch
    T  entries of a row's sequence: text, PLITS tokens, padding (T_in: columns of `input_ids`)
    S  audio tokens beside a row's sequence (LAL, flamingo), padded
    P  entries of the longest prefix of packed rows
    J  packed questions of a batch
    U  entries of the longest packed question
    N  tokens or frames of a batch, flat: one after the other, without padding
    M  tokens of a batch that carry loss, flat
    C  clips of a batch
    F  frames of a clip, padded
    G  cells of the query grid of the `lfst` connector, flat
    Q  queries of an attention
    K  keys of an attention
    H  attention heads (of keys and values: key/value heads)
    E  width of one head (head_dim)
    D  width of hidden states: of the language model or, inside a connector, of its layers
    W  width of features and of audio tokens: what a module reads that is no hidden state
    I  inner width of a module: of an MLP between its layers, of all heads together
    L  layers of the language model
    1  an axis of size one, for broadcasting
"""

from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.attention_probe import PATHWAYS, AttentionMass, probe_attention
from pipeline.model.configuration import PalConfig
from pipeline.model.lora import add_lora, lora_parameters, merge_lora
from pipeline.model.modeling import PalForCausalLM
from pipeline.model.parameters import TrainableSet, count_parameters, set_trainable
from pipeline.model.prefix_cache import PrefixCache
from pipeline.model.streaming_audio import StreamingAudio

AutoConfig.register(PalConfig.model_type, PalConfig)
AutoModelForCausalLM.register(PalConfig, PalForCausalLM)

__all__ = [
    "PATHWAYS",
    "AttentionMass",
    "PalConfig",
    "PalForCausalLM",
    "PrefixCache",
    "StreamingAudio",
    "TrainableSet",
    "add_lora",
    "count_parameters",
    "lora_parameters",
    "merge_lora",
    "probe_attention",
    "set_trainable",
]
