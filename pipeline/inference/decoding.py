"""Settings of decoding, the same for every model."""

from __future__ import annotations

from typing import Any

from pipeline.core.console import logger


def greedy_decoding(max_new_tokens: int) -> dict[str, Any]:
    """Returns all settings of decoding that differ from, or are stated beside, transformers' global defaults.

    Nothing is taken from the language model's `generation_config.json` (Qwen 2.5 penalises repetition there, others
    bound the length or search with beams), so that models of all families are decoded in the same way.
    """
    return {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": max_new_tokens}


def log_decoding(max_new_tokens: int) -> None:
    """Logs how answers are decoded."""
    settings = ", ".join(f"{name} {value}" for name, value in greedy_decoding(max_new_tokens).items())
    logger.info(f"greedy decoding ({settings}); the language model's generation_config.json is not used")
