"""What a plan is made from besides the experiment: the machines, and the size of the data. Types only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.fields import NonNegativeInt, PositiveInt
from pipeline.config.loading import Strict

PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class GpuConfig(Strict):
    """One accelerator, by its data sheet.

    Attributes:
        device: where the run computes; on `cpu` a "GPU" is one rank's share of a machine.
        peak_tflops: of dense matrix products, by precision.
        memory_gb_s: that the memory is read and written at, together.
    """

    name: str
    device: Literal["cuda", "cpu"] = "cuda"
    memory_gib: PositiveFloat
    memory_gb_s: PositiveFloat
    peak_tflops: dict[Literal["fp32", "bf16", "fp16"], PositiveFloat]


class ClusterConfig(Strict):
    """Machines, and how much of their data sheets a run gets.

    Attributes:
        within_node_gb_s, between_nodes_gb_s: one direction; of one GPU to its neighbour, of a whole node to the next.
        host_link_gb_s, host_memory_gb_s, host_memory_gib: what offloading goes through and into; of a GPU, of a node.
        disk_gb_s: at which a node reads features.
        efficiency: share of the peak that the passes reach.
        bandwidth_efficiency: share of the bandwidths that collectives reach.
        overlap: share of the communication that hides behind the passes.
        collective_latency_s: that a collective takes however little it moves.
        layer_launch_s: that the host needs to start the operations of one layer, forward and backward.
        usable_memory: share of the memory that tensors may take; the rest is the context and fragments.
        audio_s_per_core_s: seconds of audio that a core decodes and turns into spectra in a second.
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
    """An encoder's features, and the operations that make those of one second of audio."""

    frame_rate_hz: PositiveFloat
    width: PositiveInt
    grid: tuple[int, int] | None = None
    gflop_per_audio_s: Annotated[float, Field(ge=0)] = 0.0


class WorkloadConfig(Strict):
    """How much there is to train on; token counts are means.

    Attributes:
        system_tokens: text before the clip.
        question_tokens: of a question with its answer; of these, answer_tokens carry loss.
    """

    clips: PositiveInt
    questions: PositiveInt
    clip_s: PositiveFloat
    encoders: dict[str, EncoderCost]
    system_tokens: NonNegativeInt
    question_tokens: PositiveInt
    answer_tokens: PositiveInt
