"""DeepSpeed's config: every policy, one owner for each number; the learning-rate schedule."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TrainConfig
from pipeline.core.errors import UserError
from pipeline.engine import POLICIES, build_ds_config, policy_names, zero_stage
from pipeline.training.lr_schedule import lr_multiplier

SHIPPED = policy_names()


def train(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 10, "global_batch_size": 64, "micro_batch_size": 4, **changes})


def leaves(values: dict[str, Any]) -> list[Any]:
    return [leaf for v in values.values() for leaf in (leaves(v) if isinstance(v, dict) else [v])]


@pytest.mark.parametrize("policy", SHIPPED)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_accepts_every_policy(policy: str, precision: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    ds_config = build_ds_config(policy, train(precision=precision), world_size=1, accumulation=16, on_gpu=True)
    read = DeepSpeedConfig(ds_config)
    assert read.zero_optimization_stage == zero_stage(ds_config)
    assert (read.float16_config.enabled, read.bfloat16_config.enabled) == (precision == "fp16", precision == "bf16")
    assert read.gradient_clipping == 1.0
    assert "auto" not in leaves(ds_config)


@pytest.mark.parametrize("policy", SHIPPED)
def test_policy_files_do_not_rely_on_deepspeeds_defaults(policy: str) -> None:
    """DeepSpeed's defaults change between releases; a change of these keys would alter memory, speed or results."""
    zero = json.loads((POLICIES / f"{policy}.json").read_text())["zero_optimization"]
    expected = {"reduce_bucket_size", "overlap_comm", "contiguous_gradients", "load_from_fp32_weights"}
    if zero["stage"] == 3:
        expected |= {"stage3_gather_16bit_weights_on_model_save", "stage3_param_persistence_threshold"}
    assert zero["stage"] == 0 or expected <= zero.keys()


def test_batch_arithmetic() -> None:
    ds_config = build_ds_config("zero2", train(), world_size=2, accumulation=8, on_gpu=False)
    assert ds_config["train_batch_size"] == 64
    assert ds_config["train_micro_batch_size_per_gpu"] == 4
    assert ds_config["gradient_accumulation_steps"] == 8


def test_optimizer_follows_the_device() -> None:
    def optimizer(policy: str, on_gpu: bool) -> dict[str, Any]:
        return build_ds_config(policy, train(), world_size=1, accumulation=1, on_gpu=on_gpu)["optimizer"]["params"]

    assert optimizer("zero2", on_gpu=False)["torch_adam"] and not optimizer("zero2", on_gpu=False)["fused"]
    assert optimizer("zero2", on_gpu=True)["fused"]
    assert not optimizer("zero3_offload", on_gpu=True)["torch_adam"]


def test_clipping_off_is_written_as_zero() -> None:
    assert (
        build_ds_config("zero2", train(gradient_clipping=0), world_size=1, accumulation=1, on_gpu=False)[
            "gradient_clipping"
        ]
        == 0
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', "reduce_bucket_size"),
        ('{"zero_optimization": {"stage": 2}, "train_batch_size": 8}', "train_batch_size"),
        ('{"zero_optimization": {"stage": 4}}', "stage"),
        ("[1]", "stage"),
        ("{", "JSON"),
    ],
)
def test_a_bad_policy_is_a_user_error(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match=fault):
        build_ds_config(str(tmp_path / "mine.json"), train(), world_size=1, accumulation=1, on_gpu=False)


def test_an_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'zero2'"):
        build_ds_config("zeor2", train(), world_size=1, accumulation=1, on_gpu=False)


def test_an_installation_without_policies_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.ds_config.POLICIES", tmp_path)
    with pytest.raises(UserError, match=r"holds no ZeRO policy .*reinstall pal-pipeline"):
        build_ds_config("zero2", train(), world_size=1, accumulation=1, on_gpu=False)
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(UserError, match="choose from mine"):
        build_ds_config("zero2", train(), world_size=1, accumulation=1, on_gpu=False)


def test_policies_lie_in_the_package_that_a_wheel_installs() -> None:
    """`pipeline` finds them beside itself, which is where both a checkout and a wheel have `ds_configs`."""
    package = resources.files("ds_configs")
    assert {f"{name}.json" for name in SHIPPED} == {f.name for f in package.iterdir() if f.name.endswith(".json")}
    assert Path(str(package)).resolve() == POLICIES.resolve()
    assert sorted(re.findall(r"^\| `(\w+)\.json`", (POLICIES / "README.md").read_text(), re.MULTILINE)) == SHIPPED


def test_the_rate_warms_up_then_falls_to_its_final_fraction() -> None:
    factors = [lr_multiplier(step, 100, 0.1, 0.2) for step in range(1, 101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.2)
    assert lr_multiplier(1, 10, 0.0, 0.1) < 1.0  # no warm-up starts on the cosine


def test_compiled_layers_and_partitioned_parameters_exclude_each_other() -> None:
    assert build_ds_config("zero2", train(compile=True), world_size=1, accumulation=1, on_gpu=False)
    with pytest.raises(UserError, match=r"train\.compile: does not work with ZeRO-3"):
        build_ds_config("zero3", train(compile=True), world_size=1, accumulation=1, on_gpu=False)
