"""What DeepSpeed computes for us does not depend on how the work is cut: stage, micro-batch, ranks, precision of
bookkeeping. A plain torch loop is the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from pipeline import zero
from pipeline.config import TrainConfig
from pipeline.distributed import read_ranks
from pipeline.model import PalForCausalLM
from pipeline.model.configuration import PalConfig
from pipeline.streams import Connector, Stream

STEPS, ROWS, TOKENS, WIDTH, AUDIO = 4, 8, 12, 6, 63
CLIPPING = 0.5
LANGUAGE_MODEL = "language_model"
WAYS_TO_SAVE = [
    ("zero0", LANGUAGE_MODEL),
    ("zero1", "none"),
    ("zero2", "none"),
    ("zero2", LANGUAGE_MODEL),
    ("zero3", "none"),
    ("zero3", LANGUAGE_MODEL),
]
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
    """The global batch of a step as single rows: different lengths and numbers of answer tokens."""
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


def build(train: TrainConfig, frozen: str = "none", policy: str | None = None) -> zero.Engine:
    ranks = read_ranks()
    if not torch.distributed.is_initialized():
        zero.init_process_group(ranks, 120)
    accumulation = ROWS // train.micro_batch_size // ranks.world_size
    rendered = zero.render(
        policy or train.zero, train, world_size=ranks.world_size, accumulation=accumulation, on_gpu=False
    )
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        zero.ParameterGroup("matrices", [p for p in trained if p.ndim > 1], 1e-2, 0.1),
        zero.ParameterGroup("vectors", [p for p in trained if p.ndim <= 1], 2e-2, 0.0),
    ]
    return zero.Engine(model, groups, rendered)


def train_steps(engine: zero.Engine, steps: range, micro_batch: int, text_only_rank: int | None = None) -> Curve:
    ranks, curve = read_ranks(), []
    for step in steps:
        mine = rows(step)[ranks.rank :: ranks.world_size]
        micro = [
            collate(mine[i : i + micro_batch], ranks.rank == text_only_rank) for i in range(0, len(mine), micro_batch)
        ]
        (tokens,) = engine.sum_over_ranks([sum(int((m["labels"] != -100).sum()) for m in micro)])
        loss = 0.0
        for number, batch in enumerate(micro, start=1):
            loss += float(engine.backward({**batch, "num_items_in_batch": tokens * engine.loss_share}))
            if number < len(micro):
                engine.micro_step()
        engine.step(zero.rate_factor(step + 1, STEPS, 0.25, 0.1))
        (mean,) = engine.sum_over_ranks([loss * engine.loss_share])
        curve.append((mean, float(engine.gradient_norm)))
    return curve


def weights(engine: zero.Engine) -> dict[str, torch.Tensor] | None:
    state = engine.gathered_state()
    return None if state is None else {name: tensor.clone() for name, tensor in state.items()}


def reference() -> tuple[Curve, dict[str, torch.Tensor]]:
    """The same training in plain torch, the whole global batch at once."""
    model = tiny_model()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=zero.ADAM_EPSILON)
    curve = []
    for step in range(STEPS):
        for group, peak in zip(optimizer.param_groups, (1e-2, 2e-2), strict=True):
            group["lr"] = peak * zero.rate_factor(step + 1, STEPS, 0.25, 0.1)
        loss = model(**collate(rows(step))).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve, model.state_dict()


def all_ways() -> dict[str, Any]:
    """Every stage, and at stage 2 every micro-batch, in one set of processes: starting them is what takes time."""
    found: dict[str, Any] = {}
    for policy, micro_batch in [("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero2", 1), ("zero2", 4)]:
        if micro_batch * read_ranks().world_size > ROWS:
            continue
        engine = build(settings(policy, micro_batch))
        found[f"{policy} micro-batch {micro_batch}"] = (train_steps(engine, range(STEPS), micro_batch), weights(engine))
    return found


@pytest.fixture(scope="module")
def expected() -> tuple[Curve, dict[str, torch.Tensor]]:
    return reference()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_way_work_is_cut_does_not_matter(world_size: int, expected: tuple[Curve, dict[str, torch.Tensor]]) -> None:
    """fp32: only the order of sums differs, so losses agree to 1e-6. Adam divides small gradients by their own size,
    so weights agree to a small part of a step (1e-2)."""
    curve, final = expected
    found = run_on_ranks(all_ways, world_size)
    assert len(found[0]) == 6
    for way, (losses, state) in found[0].items():
        for (loss, norm), (expected_loss, expected_norm) in zip(losses, curve, strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-6), way
            assert norm == pytest.approx(expected_norm, rel=1e-5), way
        for name, tensor in final.items():
            torch.testing.assert_close(
                state[name], tensor, rtol=0, atol=1e-4, msg=lambda m, w=way, n=name: f"{w} {n}: {m}"
            )


def one_rank_without_audio(policies: list[str]) -> dict[str, Curve]:
    return {policy: train_steps(build(settings(policy, 2)), range(2), 2, text_only_rank=1) for policy in policies}


def test_a_rank_with_text_only_does_not_hang_the_others() -> None:
    found = run_on_ranks(one_rank_without_audio, 2, ["zero1", "zero2", "zero3"], limit_s=120)
    assert found[0] == found[1]
    curves = list(found[0].values())
    for other in curves[1:]:
        assert [loss for loss, _ in other] == pytest.approx([loss for loss, _ in curves[0]], abs=1e-6)


def save_and_go_on(folder: Path, policy: str, frozen: str) -> tuple[Curve, Any]:
    engine = build(settings(policy, 2), frozen)
    first = train_steps(engine, range(2), 2)
    engine.save(folder)
    return first + train_steps(engine, range(2, STEPS), 2), weights(engine)


def load_and_go_on(folder: Path, policy: str, frozen: str) -> tuple[Curve, Any]:
    engine = build(settings(policy, 2), frozen)
    engine.load(folder)
    return train_steps(engine, range(2, STEPS), 2), weights(engine)


def saved_and_loaded(folder: Path) -> dict[str, Any]:
    found = {}
    for policy, frozen in WAYS_TO_SAVE:
        place = folder / f"{policy}-{frozen}"
        found[place.name] = (save_and_go_on(place, policy, frozen), load_and_go_on(place, policy, frozen))
    return found


def test_a_loaded_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """And what is frozen is not in the files, which therefore stay small."""
    found = run_on_ranks(saved_and_loaded, 2, tmp_path)
    for way, ((straight, final), (resumed, final_resumed)) in found[0].items():
        assert resumed == straight[2:], way
        for name, tensor in final.items():
            assert torch.equal(final_resumed[name], tensor), f"{way} {name}"
        exported = zero.trained_weights(tmp_path / way)
        frozen = way.endswith(LANGUAGE_MODEL)
        assert any(name.startswith("language_model") for name in exported) != frozen
        assert any(name.startswith("streams") for name in exported)


def meet_not_a_number(policies: list[str]) -> dict[str, Any]:
    found = {}
    for policy in policies:
        engine = build(settings(policy, 4))
        before = weights(engine)
        batch = collate(rows(0)[read_ranks().rank :: 2])
        # Divided by not-a-number on one rank only: loss and gradients of that rank are not finite.
        engine.backward({**batch, "num_items_in_batch": 1.0 if read_ranks().rank == 0 else float("nan")})
        applied = engine.step(1.0)
        after = weights(engine)
        unchanged = before is None or all(torch.equal(before[name], after[name]) for name in before)
        found[policy] = (applied, engine.skipped_steps, unchanged, train_steps(engine, range(1), 4))
    return found


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    for result in run_on_ranks(meet_not_a_number, 2, ["zero0", "zero1", "zero2", "zero3"]):
        for policy, (applied, skipped, unchanged, curve) in result.items():
            assert (applied, skipped, unchanged) == (False, 1, True), policy
            assert curve[0][0] == pytest.approx(curve[0][0]), policy  # the next step is finite
