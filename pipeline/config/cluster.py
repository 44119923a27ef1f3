"""Configs that `pal plan` reads besides the experiment: the machines, and the size of the data. Types only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.fields import NonNegativeInt, PositiveInt
from pipeline.core.records import Strict

PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class GpuConfig(Strict):
    """One accelerator, by its data sheet.

    Attributes:
        device: kind of device that the run computes on; on `cpu` a "GPU" is one rank's share of a machine.
        memory_gib: memory of the device.
        memory_gb_s: bandwidth of that memory, reads and writes together.
        peak_tflops: peak rate of dense matrix products, by precision.
    """

    name: str
    device: Literal["cuda", "cpu"] = "cuda"
    memory_gib: PositiveFloat
    memory_gb_s: PositiveFloat
    peak_tflops: dict[Literal["fp32", "bf16", "fp16"], PositiveFloat]


class ClusterConfig(Strict):
    """Machines, and the share of their data sheets that a run reaches.

    Attributes:
        within_node_gb_s: bandwidth in one direction from one GPU to its neighbour in the node.
        between_nodes_gb_s: bandwidth in one direction from a whole node to the next.
        host_link_gb_s: bandwidth between one GPU and its host, which offloading goes through.
        host_memory_gib: memory of a node's host.
        host_memory_gb_s: bandwidth of that memory.
        disk_gb_s: rate at which a node reads features.
        price_per_gpu_hour: price in any currency; costs are reported in the same.
        efficiency: share of the peak that the passes reach.
        bandwidth_efficiency: share of the bandwidths that collectives reach.
        overlap: share of the communication that overlaps with the passes.
        usable_memory: share of the memory that tensors may take; the remainder is the device's context and fragments.
        collective_latency_s: duration of a collective that moves nothing.
        layer_launch_s: time that the host needs to launch the operations of one layer, forward and backward.
        audio_s_per_core_s: seconds of audio that a core decodes and turns into spectra in one second.
    """

    gpu: GpuConfig
    gpus_per_node: PositiveInt
    nodes: PositiveInt = 1
    within_node_gb_s: PositiveFloat
    between_nodes_gb_s: PositiveFloat
    host_link_gb_s: PositiveFloat
    host_memory_gib: PositiveFloat
    host_memory_gb_s: PositiveFloat
    disk_gb_s: PositiveFloat
    cores_per_node: PositiveInt
    price_per_gpu_hour: Annotated[float, Field(ge=0)]
    efficiency: Share = 0.45
    bandwidth_efficiency: Share = 0.8
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.7
    usable_memory: Share = 0.92
    collective_latency_s: Annotated[float, Field(ge=0)] = 3e-5
    layer_launch_s: Annotated[float, Field(ge=0)] = 0.001
    audio_s_per_core_s: PositiveFloat = 200.0

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes


class EncoderCost(Strict):
    """The features of an encoder, and what computing them costs.

    Attributes:
        frame_rate_hz, width: frames per second, and values of one frame.
        grid: (time, frequency) cells per window for encoders with a two-dimensional output, else None.
        window_s: length that clips are padded to a multiple of, in seconds; None for no padding.
        gflop_per_encoded_s: billions of floating-point operations per second of audio, padding included; None means
            unknown.
    """

    frame_rate_hz: PositiveFloat
    width: PositiveInt
    grid: tuple[int, int] | None = None
    window_s: PositiveFloat | None = None
    gflop_per_encoded_s: Annotated[float, Field(ge=0)] | None = None


class TaskWorkload(Strict):
    """Questions of one or several tasks that are counted together.

    Attributes:
        tasks: names of the tasks.
        clips, questions: as of `WorkloadConfig`.
        question_tokens, answer_tokens: as of `WorkloadConfig`; None means the means of the whole workload.
    """

    tasks: list[str] = Field(min_length=1)
    clips: PositiveInt
    questions: PositiveInt
    question_tokens: PositiveInt | None = None
    answer_tokens: PositiveInt | None = None


class WorkloadConfig(Strict):
    """Size of the training data; durations and token counts are means.

    Attributes:
        clip_s: duration of a clip; 0 for text alone.
        encoders: features by encoder.
        system_tokens: text tokens before the clip.
        question_tokens: text tokens of a question with its answer.
        answer_tokens: how many of the question tokens carry loss.
        tasks: questions that a config can select by `data.tasks`; the others are counted in the whole alone.
    """

    clips: PositiveInt
    questions: PositiveInt
    clip_s: Annotated[float, Field(ge=0)]
    encoders: dict[str, EncoderCost]
    system_tokens: NonNegativeInt
    question_tokens: PositiveInt
    answer_tokens: PositiveInt
    tasks: list[TaskWorkload] = []
