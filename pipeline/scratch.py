"""`pal scratch CONFIG OUT MANIFEST...`: writes a small language model with random weights, and trains its tokenizer on
the questions of manifests. The demo and the scaling experiments use it in place of a pretrained language model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.config import DataConfig, load_config
from pipeline.config.fields import PositiveInt
from pipeline.core.arguments import add_json, write_results
from pipeline.core.errors import UserError, run_command
from pipeline.core.records import Strict


class ScratchConfig(Strict):
    """Size and seed of the model; see `pipeline.model.random_lm.RandomLanguageModel`."""

    model_type: str = "llama"
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_key_value_heads: PositiveInt
    vocab_size: PositiveInt
    initializer_range: Annotated[float, Field(gt=0)] | None = None
    seed: int = 0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pal scratch", description="Write a small language model with random weights."
    )
    parser.add_argument("config", help="a YAML file, or the name of a shipped config (demo_language_model)")
    parser.add_argument("out", type=Path, help="folder to write, in the Hugging Face format")
    parser.add_argument(
        "manifests",
        nargs="+",
        type=Path,
        metavar="MANIFEST",
        help="JSON lines with the questions to train the tokenizer on",
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="config overrides")
    add_json(parser)
    arguments = parser.parse_args(argv)
    config = load_config(ScratchConfig, arguments.config, arguments.set)
    texts = [DataConfig.model_fields["system_prompt"].default]
    for manifest in arguments.manifests:
        texts += _texts(manifest)

    from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model

    save_random_language_model(arguments.out, texts, RandomLanguageModel(**config.model_dump()))
    parameters = _count_parameters(arguments.out / "model.safetensors")
    write_results({"parameters": parameters}, arguments.json)
    print(f"{arguments.out} holds a {config.model_type} with {parameters / 1e6:.2f} million parameters")
    return 0


def _count_parameters(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _texts(manifest: Path) -> Iterator[str]:
    """Yields the texts of a manifest, on which the tokenizer is trained: system texts, questions, answers and turns.

    Raises:
        UserError: the manifest cannot be read, or is not one.
    """
    try:
        with manifest.open(encoding="utf-8") as lines:
            for line in lines:  # not `splitlines`, which splits at characters that JSON allows within a text
                if line.strip():
                    for question in json.loads(line)["questions"]:
                        yield from _texts_of(question)
    except OSError as error:
        raise UserError(
            manifest, f"cannot be read ({error})", "give a manifest, for example one of `pal synth`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            manifest, f"is not a manifest of our own format ({error!r})", "give JSON lines with `questions`"
        ) from error


def _texts_of(question: dict[str, Any]) -> Iterator[str]:
    if question.get("system"):
        yield question["system"]
    if "turns" not in question:
        yield question["question"]
        yield question["answer"]
    for turn in question.get("turns") or ():
        content = turn["content"]
        yield from (part for part in ([content] if isinstance(content, str) else content) if isinstance(part, str))


if __name__ == "__main__":
    sys.exit(run_command(main))
