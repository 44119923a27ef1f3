"""A tiny model under DeepSpeed, its batches, and a minimal training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.config import TrainConfig
from pipeline.core.ranks import read_ranks
from pipeline.core.streams import Connector, Stream
from pipeline.engine import Engine, ParameterGroup, build_ds_config, init_process_group
from pipeline.model import PalForCausalLM
from pipeline.model.configuration import PalConfig
from pipeline.training.lr_schedule import lr_multiplier

STEPS, ROWS, TOKENS, WIDTH, AUDIO = 4, 8, 12, 6, 63
CLIPPING = 0.5
LANGUAGE_MODEL = "language_model"
Batch = dict[str, Any]
Curve = list[tuple[float, float]]  # loss, gradient norm


def tiny_model() -> PalForCausalLM:
    from transformers import AutoConfig

    torch.manual_seed(0)
    language_model = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    streams = (
        Stream(("log_mel",), "lal", Connector("mlp"), (0, 1)),
        Stream(("log_mel",), "plits", Connector("conv", summary_stride=2), summary_of=0),
    )
    return PalForCausalLM(PalConfig(language_model, streams, {"log_mel": WIDTH}, AUDIO))


def rows(step: int) -> list[Batch]:
    """Returns the global batch of a step as single rows of different lengths and numbers of answer tokens."""
    random = torch.Generator().manual_seed(step)
    batch = []
    for row in range(ROWS):
        length, answer = TOKENS - row % 4, 1 + row % 5
        ids = torch.randint(0, AUDIO, (1, length), generator=random)
        ids[0, 2] = AUDIO
        labels = ids.clone()
        labels[0, : length - answer] = -100
        frames = 3 + row % 3
        features = torch.randn(frames, WIDTH, generator=random)
        batch.append({"input_ids": ids, "labels": labels, "features": features, "frames": frames})
    return batch


def collate(chosen: list[Batch], text_only: bool = False) -> Batch:
    longest = max(row["input_ids"].shape[1] for row in chosen)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.cat(
            [torch.nn.functional.pad(r[name], (0, longest - r[name].shape[1]), value=value) for r in chosen]
        )

    ids = pad("input_ids", 0)
    mask = torch.cat([(torch.arange(longest) < r["input_ids"].shape[1]).long()[None] for r in chosen])
    if text_only:
        ids = ids.masked_fill(ids == AUDIO, 1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": pad("labels", -100),
        "audio_features": {
            "log_mel": torch.empty(0, WIDTH) if text_only else torch.cat([r["features"] for r in chosen])
        },
        "audio_lengths": {
            "log_mel": torch.tensor([] if text_only else [r["frames"] for r in chosen], dtype=torch.long)
        },
    }


def settings(policy: str, micro_batch: int, precision: str = "fp32") -> TrainConfig:
    return TrainConfig(
        steps=STEPS,
        global_batch_size=ROWS,
        micro_batch_size=micro_batch,
        learning_rate=1e-2,
        gradient_clipping=CLIPPING,
        precision=precision,
        zero=policy,
    )


def build(train: TrainConfig, frozen: str = "none", policy: str | None = None) -> Engine:
    ranks = read_ranks()
    if not torch.distributed.is_initialized():
        init_process_group(ranks, 120)
    accumulation = ROWS // train.micro_batch_size // ranks.world_size
    ds_config = build_ds_config(
        policy or train.zero, train, world_size=ranks.world_size, accumulation=accumulation, on_gpu=False
    )
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        ParameterGroup("matrices", [p for p in trained if p.ndim > 1], 1e-2, 0.1),
        ParameterGroup("vectors", [p for p in trained if p.ndim <= 1], 2e-2, 0.0),
    ]
    return Engine(model, groups, ds_config)


def train_steps(
    engine: Engine, steps: range, micro_batch: int | Sequence[int], text_only_rank: int | None = None
) -> Curve:
    """Trains with micro-batches of this size, or of these sizes in turn, one for each step."""
    ranks, curve = read_ranks(), []
    sizes = [micro_batch] if isinstance(micro_batch, int) else micro_batch
    for step in steps:
        rank_rows, size = rows(step)[ranks.rank :: ranks.world_size], sizes[step % len(sizes)]
        micro = [collate(rank_rows[i : i + size], ranks.rank == text_only_rank) for i in range(0, len(rank_rows), size)]
        (tokens,) = engine.sum_over_ranks([sum(int((m["labels"] != -100).sum()) for m in micro)])
        loss = 0.0
        for number, batch in enumerate(micro, start=1):
            inputs = {**batch, "num_items_in_batch": tokens * engine.loss_share}
            loss += float(engine.backward(inputs, last=number == len(micro)))
        engine.step(lr_multiplier(step + 1, STEPS, 0.25, 0.1))
        (mean,) = engine.sum_over_ranks([loss * engine.loss_share])
        curve.append((mean, float(engine.gradient_norm)))
    return curve


def weights(engine: Engine) -> dict[str, torch.Tensor] | None:
    state = engine.gathered_state()
    return None if state is None else {name: tensor.clone() for name, tensor in state.items()}
