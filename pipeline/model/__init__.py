"""The integrations of audio into a language model. Needs torch and transformers only."""

from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.attention_probe import KINDS, AttentionMass, probe_attention
from pipeline.model.configuration import PalConfig
from pipeline.model.lora import add_lora, lora_parameters, merge_lora
from pipeline.model.modeling import PalForCausalLM
from pipeline.model.parameters import TrainableSet, count_parameters, set_trainable
from pipeline.model.prefix_cache import PrefixCache
from pipeline.model.streaming_audio import StreamingAudio

AutoConfig.register(PalConfig.model_type, PalConfig)
AutoModelForCausalLM.register(PalConfig, PalForCausalLM)

__all__ = [
    "KINDS",
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
