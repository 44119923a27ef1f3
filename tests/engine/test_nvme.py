"""Offload to NVMe: the losses equal those of offload to the host, and a resumed run equals the uninterrupted one."""

import json
import signal
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from safetensors.torch import load_file

from pipeline.core.errors import EXIT_STOPPED
from pipeline.engine import POLICIES
from pipeline.tracking.writer import read_metrics
from tests.helpers.jobs import end_of, start_job, wait_for_step, write_experiment

HIDDEN = 256  # large enough for the states of matrices to be swapped; those of norms and connectors are not


def nvme_policy(folder: Path) -> Path:
    policy = json.loads((POLICIES / "zero3_nvme.json").read_text())
    for offload in ("offload_optimizer", "offload_param"):
        policy["zero_optimization"][offload]["nvme_path"] = str(folder)
    policy["zero_optimization"]["offload_param"]["buffer_size"] = 1_000_000
    file = folder / "nvme.json"
    file.write_text(json.dumps(policy))
    return file


def losses(output: Path) -> dict[int, float]:
    return {step: metrics["train/loss"] for step, metrics in read_metrics(output) if "train/loss" in metrics}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not AsyncIOBuilder().is_compatible(), reason="DeepSpeed compiles its access to files with libaio's headers"
)
def test_swapped_states_are_restored(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, hidden_size=HIDDEN)
    on_host, straight, resumed = (tmp_path / name for name in ("on_host", "straight", "resumed"))
    swapped = ("--nproc", 2, f"train.zero={nvme_policy(tmp_path)}")
    for output, policy in ((on_host, ("--nproc", 2, "train.zero=zero3_offload")), (straight, swapped)):
        assert end_of(start_job(config, *policy, f"output={output}"), output)[0] == 0
    job = start_job(config, *swapped, f"output={resumed}")
    wait_for_step(job, resumed, 5)
    job.send_signal(signal.SIGTERM)
    assert end_of(job, resumed)[0] == EXIT_STOPPED
    code, out, _ = end_of(start_job(config, *swapped, f"output={resumed}"), resumed)

    assert code == 0 and "resumed from" in out
    assert losses(straight) == losses(on_host) and len(losses(straight)) == 12
    # Not bit for bit: the states have another alignment in memory, on which the rounding of kernels depends.
    assert losses(resumed) == pytest.approx(losses(straight), abs=1e-6)
    weights, resumed_weights = (load_file(output / "model" / "model.safetensors") for output in (straight, resumed))
    assert weights.keys() == resumed_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(resumed_weights[name], tensor, rtol=0, atol=1e-5, msg=name)
