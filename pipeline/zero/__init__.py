"""The one door to DeepSpeed. Callers see losses, steps, checkpoints and plain dicts; nothing in here knows audio."""

from pipeline.zero.engine import Engine, ParameterGroup, rate_factor
from pipeline.zero.processes import init_process_group, is_lost_peer, on_gpu
from pipeline.zero.rendering import ADAM_EPSILON, POLICIES, render, zero_stage
from pipeline.zero.state import trained_weights

__all__ = [
    "ADAM_EPSILON",
    "POLICIES",
    "Engine",
    "ParameterGroup",
    "init_process_group",
    "is_lost_peer",
    "on_gpu",
    "rate_factor",
    "render",
    "trained_weights",
    "zero_stage",
]
