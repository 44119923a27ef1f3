"""How far an untrained model is from its language model, and how it trains from there, for several starts of LAL.

    python -m tests.real.start untrained OUT.jsonl FEATURES_TRAIN FEATURES_TEST LANGUAGE_MODEL
    python -m tests.real.start train OUT.jsonl ... --steps 45 --seeds 0 1 2 --variants lal lal_gain_0.1
    python -m tests.real.start_page PAGE.md OUT.jsonl...

Each result is one line of OUT.jsonl; results that are there are not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ExperimentConfig
from pipeline.core.console import configure_logging, logger
from pipeline.core.ranks import Ranks
from pipeline.data.chat_template import build_chat_template
from pipeline.data.feature_set import open_feature_set
from pipeline.data.loader import evaluation_batches
from pipeline.model import PalForCausalLM, attention
from pipeline.model.attention_ops import attend
from pipeline.training.batches import count_answer_tokens, model_inputs
from pipeline.training.build import build_loader, build_model
from pipeline.training.validation import validation_questions

RANKS = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)
LAL, PAL_V3 = {"integration": "lal"}, {"integration": "pal_v3"}
LONG = 8  # variants `:long` repeat each clip so often
THIRD = {"num_audio_layers": "1/3"}


def _gain(start: float, target: str = "keys_values") -> dict[str, Any]:
    return {"gain": {"start": start, "target": target}}


# Name -> settings of `model`. Names with a suffix change the model or the training further; see `_change_start`.
VARIANTS: dict[str, dict[str, Any]] = {
    "plits": {"integration": "plits"},
    "plits:embedding_scale": {"integration": "plits"},
    "lal": LAL,
    "lal_no_norm": {**LAL, "norm_audio_tokens": False},
    "lal_no_norm:small_projections": {**LAL, "norm_audio_tokens": False},
    "lal_third": {**LAL, **THIRD},
    **{f"lal_gain_{start}": {**LAL, **_gain(start)} for start in (0.0, 0.03, 0.1, 0.3)},
    **{f"lal_values_{start}": {**LAL, **_gain(start, "values")} for start in (0.0, 0.03, 0.1, 0.3)},
    "lal_third_gain_0.1": {**LAL, **THIRD, **_gain(0.1)},
    "lal_third_no_norm": {**LAL, **THIRD, "norm_audio_tokens": False},
    "pal_v3": PAL_V3,
    "pal_v3_no_norm": {**PAL_V3, "norm_audio_tokens": False},
    "pal_v3_gain_0.1": {**PAL_V3, **_gain(0.1)},
    "pal_v3_gain_0.3": {**PAL_V3, **_gain(0.3)},
    "pal_v3:embedding_scale": PAL_V3,
    "pal_v3_gain_0.1:embedding_scale": {**PAL_V3, **_gain(0.1)},
    **{f"lal_gain_0.1:score_bias_{b}{long}": {**LAL, **_gain(0.1)} for b in (3, 6) for long in ("", ":long")},
    "gap": LAL,
    "gap:long": LAL,
    "plits:long": {"integration": "plits"},
    "lal:long": LAL,
    "lal_gain_0.1:long": {**LAL, **_gain(0.1)},
    "lal_values_0.1:long": {**LAL, **_gain(0.1, "values")},
    "lal_third:long": {**LAL, **THIRD},
    "lal_third_gain_0.1:long": {**LAL, **THIRD, **_gain(0.1)},
    "pal_v3:long": PAL_V3,
    "pal_v3_gain_0.1:long": {**PAL_V3, **_gain(0.1)},
}


def main(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    done = {_key(row) for row in map(json.loads, out.read_text().splitlines())} if out.exists() else set()
    out.parent.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(arguments)
    for seed in arguments.seeds:
        for name in arguments.variants or ["text", *VARIANTS]:
            row = {"measured": arguments.measure, "variant": name, "seed": seed}
            if arguments.measure == "train":
                row |= {"steps": arguments.steps, "batch": arguments.batch, "rate": arguments.rate,
                        "gain_rate": arguments.gain_rate, "warmup": arguments.warmup}  # fmt: skip
            if _key(row) in done:
                continue
            started = time.monotonic()
            measure = experiment.train if arguments.measure == "train" else experiment.untrained
            row |= measure(name, seed)
            row["seconds"] = round(time.monotonic() - started, 1)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            logger.info("%s", {key: value for key, value in row.items() if key != "losses"})


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("measured", "variant", "seed", "steps", "batch", "rate", "gain_rate", "warmup")
    return tuple(row.get(name) for name in names)


class Experiment:
    """The data and the language model of all variants."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        config = self.config("plits", 0)
        self._plain: list[Tensor] = []
        self.features = open_feature_set(config.data.train, config.model.encoders, config.data)
        self.test = open_feature_set(str(config.data.validation), config.model.encoders, config.data)
        _, self.template = build_chat_template(config.model.language_model, config.data, config.train.loss_on)

    def config(self, variant: str, seed: int) -> ExperimentConfig:
        """Returns the config of a variant: connector stage, float32."""
        a = self.arguments
        return ExperimentConfig.model_validate(
            {
                "output": "unused",
                "model": {"language_model": a.language_model, "encoders": ["whisper"], **VARIANTS[variant]},
                "data": {"train": a.train, "validation": a.test, "validation_questions": a.questions},
                "train": {
                    "trainable": "connector",
                    "precision": "fp32",
                    "steps": a.steps,
                    "global_batch_size": a.batch,
                    "micro_batch_size": 8,
                    "learning_rate": a.rate,
                    "seed": seed,
                },
            }
        )

    def model(self, variant: str, config: ExperimentConfig) -> PalForCausalLM:
        torch.manual_seed(config.train.seed)
        model = build_model(config, self.features.contract, self.template.audio_token_id)
        _change_start(model, variant.partition(":")[2], self.batches(config))
        return model

    def batches(self, config: ExperimentConfig) -> Iterator[dict[str, Any]]:
        """Yields batches of the held-out questions."""
        questions = validation_questions(self.test, config.data)
        return iter(evaluation_batches(self.test, self.template, questions, config.train, RANKS, None))

    @torch.inference_mode()
    def untrained(self, variant: str, seed: int) -> dict[str, float]:
        """Returns the held-out loss per answer token, and the distance from the plain language model.

        The plain language model reads the same text without audio and without a gap in its positions. The distance is
        the mean KL divergence of the predictions of answer tokens, in nats. `gap` hides all audio and keeps its
        positions.
        """
        name = "plits" if variant == "text" else variant
        config = self.config(name, seed)
        model = self.model(name, config)
        if variant.startswith("gap"):
            _hide_audio(model)
        loss, distance, tokens = 0.0, 0.0, 0
        if not self._plain:
            texts = (without_audio(batch, self.template.audio_token_id) for batch in self.batches(config))
            self._plain = [_answer_log_probabilities(model, batch) for batch in texts]
        for batch, plain in zip(self.batches(config), self._plain, strict=True):
            if variant.endswith(":long"):
                _repeat_clips(batch)
            audio = plain if variant == "text" else _answer_log_probabilities(model, batch)
            targets = batch["labels"][batch["labels"] != -100]
            loss -= float(audio.gather(1, targets[:, None]).sum())
            distance += float((plain.exp() * (plain - audio)).sum())
            tokens += len(targets)
        return {"loss": loss / tokens, "kl": distance / tokens}

    def train(self, variant: str, seed: int) -> dict[str, Any]:
        """Trains the connector stage; returns held-out losses, and norms of the gradient before clipping."""
        a, config = self.arguments, self.config(variant, seed)
        model = self.model(variant, config)
        gains = [p for name, p in model.named_parameters() if "layer_gains" in name]
        others = [p for name, p in model.named_parameters() if p.requires_grad and "layer_gains" not in name]
        groups = [{"params": others, "lr": a.rate}, {"params": gains, "lr": a.rate * a.gain_rate}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(a.warmup, a.steps))
        loader = iter(build_loader(config, self.features, self.template, RANKS, lambda seconds: 0))
        losses, norms = [], []
        for step in range(a.steps):
            micro_batches = next(loader)
            count = sum(count_answer_tokens(batch) for batch in micro_batches)
            total = 0.0
            for batch in micro_batches:
                loss = model(**model_inputs(batch, count, torch.device("cpu"))).loss
                loss.backward()
                total += float(loss.detach())
            norms.append(float(torch.nn.utils.clip_grad_norm_([*others, *gains], 1.0)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(round(total, 4))
            if step % 10 == 0:
                logger.info("%s seed %d step %d/%d loss %.3f", variant, seed, step, a.steps, total)
        return {
            "loss": self.held_out_loss(model, config),
            "swapped_loss": self.held_out_loss(model, config, swap=True),
            "largest_gradient": max(norms),
            "median_gradient": float(np.median(norms)),
            "gains": [round(g.item(), 3) for g in gains],
            "losses": losses,
        }

    @torch.inference_mode()
    def held_out_loss(self, model: PalForCausalLM, config: ExperimentConfig, swap: bool = False) -> float:
        """Returns the held-out loss per answer token; `swap` reverses the clips of each batch."""
        loss, tokens = 0.0, 0
        for batch in self.batches(config):
            inputs = model_inputs(batch, 1.0, torch.device("cpu"))
            if swap:
                lengths = inputs["audio_lengths"]
                frames = {n: x.split(lengths[n].tolist())[::-1] for n, x in inputs["audio_features"].items()}
                inputs["audio_features"] = {name: torch.cat(parts) for name, parts in frames.items()}
                inputs["audio_lengths"] = {name: n.flip(0) for name, n in lengths.items()}
            loss += float(model(**inputs).loss)
            tokens += count_answer_tokens(batch)
        return loss / tokens


def without_audio(batch: dict[str, Any], audio_token_id: int) -> dict[str, Any]:
    """Returns the batch without its placeholders, and so without clips."""
    keep = batch["input_ids"] != audio_token_id
    rows = [torch.nonzero(row)[:, 0] for row in keep & (batch["attention_mask"] > 0)]
    columns = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    texts = {name: batch[name].gather(1, columns.clamp(min=0)) for name in ("input_ids", "labels")}
    texts["labels"][columns < 0] = -100
    return {**batch, **texts, "attention_mask": (columns >= 0).long(), "segment_ids": None,
            "audio_features": {}, "audio_lengths": {}}  # fmt: skip


def _answer_log_probabilities(model: PalForCausalLM, batch: dict[str, Any]) -> Tensor:
    """Returns the (answer tokens, vocabulary) log-probabilities."""
    inputs = model_inputs(batch, 1.0, torch.device("cpu"))
    labels = inputs.pop("labels")
    inputs.pop("num_items_in_batch")
    predictors = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    return model(**inputs).logits[predictors].log_softmax(-1)


def _hide_audio(model: PalForCausalLM) -> None:
    """Marks every audio key as padding; positions stay."""
    layout = model.layout

    def hidden(*arguments: Any, **settings: Any) -> Any:
        visible = layout(*arguments, **settings)
        return replace(visible, audio_layouts={key: audio.hide() for key, audio in visible.audio_layouts.items()})

    model.layout = hidden  # type: ignore[method-assign]


def _biased_attend(score_bias: float, query: Tensor, blocks: Any, mask: Any, **settings: Any) -> Tensor:
    if len(blocks) == 2 and mask is not None:  # audio keys come first
        bias = torch.zeros(mask.shape[-1], dtype=mask.dtype)
        bias[: blocks[0][0].shape[2]] = -score_bias
        mask = mask + bias
    return attend(query, blocks, mask, **settings)


def _repeat_clips(batch: dict[str, Any]) -> None:
    """Repeats the features of each clip `LONG` times."""
    for name, lengths in batch["audio_lengths"].items():
        clips = batch["audio_features"][name].split(lengths.tolist())
        batch["audio_features"][name] = torch.cat([clip.repeat(LONG, 1) for clip in clips])
    batch["audio_lengths"] = {name: LONG * lengths for name, lengths in batch["audio_lengths"].items()}


@torch.no_grad()
def _change_start(model: PalForCausalLM, change: str, batches: Iterator[dict[str, Any]]) -> None:
    """Applies what is no setting of the software.

    `small_projections` divides the output of P_l by ten; `embedding_scale` scales the tokens of PLITS to the root mean
    square of the text embeddings; `score_bias_B` subtracts B from the scores of audio keys.
    """
    bias = re.search(r"score_bias_(\d+)", change)
    attention.attend = attend if bias is None else partial(_biased_attend, int(bias[1]))  # type: ignore[attr-defined]
    if change == "small_projections":
        for stream in model.audio_streams:
            for projection in stream.layer_projections.values():
                projection.output.weight.mul_(0.1)
                projection.output.bias.mul_(0.1)
    if change == "embedding_scale":
        batch = next(batches)
        is_text = (batch["attention_mask"] > 0) & (batch["input_ids"] != model.config.audio_token_id)
        text = model.get_input_embeddings()(batch["input_ids"][is_text])
        for stream in model.audio_streams:
            if stream.spec.integration == "plits":
                lengths = [batch["audio_lengths"]["whisper"]]
                tokens = stream.connector([batch["audio_features"]["whisper"].float()], lengths)
                factor = float(text.square().mean().sqrt() / tokens.square().mean().sqrt())
                logger.info("tokens of PLITS are scaled by %.3f to the text embeddings", factor)
                stream.connector.project.output.weight.mul_(factor)
                stream.connector.project.output.bias.mul_(factor)


def _cosine(warmup: int, steps: int) -> Callable[[int], float]:
    return lambda step: min((step + 1) / max(warmup, 1), 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / steps))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["untrained", "train"])
    parser.add_argument("out", type=Path)
    for name in ("train", "test", "language_model"):
        parser.add_argument(name)
    parser.add_argument("--variants", nargs="*", choices=["text", *VARIANTS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--gain-rate", type=float, default=1.0)
    parser.add_argument("--warmup", type=int, default=10)
    return parser


if __name__ == "__main__":
    configure_logging()
    main(parser().parse_args())
