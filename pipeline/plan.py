"""`pal plan CONFIG`: predicts memory, step time and cost of a run before it starts, and finds the cheapest way to run
it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.core.arguments import add_config, add_json, write_results
from pipeline.core.console import format_table
from pipeline.core.errors import UserError, run_command

if TYPE_CHECKING:  # the planner imports torch, which `--help` must not
    from pipeline.config import ExperimentConfig
    from pipeline.config.cluster import ClusterConfig, WorkloadConfig
    from pipeline.cost.predict import Prediction

ASSUMPTIONS = """Assumed: {efficiency:.0%} of the data sheet's peak in matrix products, all else in the passes and Adam
bound by memory; ring collectives over the slowest link at {bandwidth_efficiency:.0%} of its bandwidth, {overlap:.0%} of
them hidden; {usable_memory:.0%} of the memory usable; rows of mean length ({frames} frames of audio, {text} tokens of
text of which {answer} carry loss)."""


NOTABLE_PADDING = 2.0  # seconds encoded for each second of audio


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.table and arguments.config is not None:
        raise UserError("CONFIG", "has no effect on --table", "leave one out")
    if not arguments.table and arguments.config is None:
        raise UserError("CONFIG", "is missing", "give an experiment's YAML file, or --table")
    write_results(_print_tables() if arguments.table else _plan_stages(arguments), arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal plan", description="Predict memory, step time and cost of a run, and find the cheapest way to run it."
    )
    add_config(parser, optional=True)
    parser.add_argument(
        "--cluster", default="a100_80", metavar="FILE", help="machines: a YAML file, a100_80, a100_40, h100_80 or cpu"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="number of machines, instead of the file's")
    parser.add_argument(
        "--workload",
        metavar="FILE",
        help="size of the data: a YAML file or openaqa_workload (default: read data.train)",
    )
    parser.add_argument("--stage", metavar="NAME", help="plan only this stage of the config (default: all)")
    parser.add_argument("--table", action="store_true", help="plan OpenAQA on 8 to 1,024 GPUs for 1B, 3B, 8B and 70B")
    add_json(parser)
    return parser


def _plan_stages(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plans and prints every requested stage of the config; returns the results of the run."""
    from pipeline.config import ExperimentConfig, choose_stages, load_config
    from pipeline.config.cluster import ClusterConfig, WorkloadConfig
    from pipeline.cost.workload import measure_workload, select_workload

    config = load_config(ExperimentConfig, arguments.config, arguments.overrides)
    nodes = [] if arguments.nodes is None else [f"nodes={arguments.nodes}"]
    cluster = load_config(ClusterConfig, arguments.cluster, nodes)
    workload = load_config(WorkloadConfig, arguments.workload) if arguments.workload else None
    stages = {}
    for name, stage in choose_stages(config, arguments.stage).items():
        size = select_workload(workload, stage.data) if workload else measure_workload(stage)
        stages[name] = plan(stage, cluster, size)
        _print_plan(name, stages[name], stage, cluster)
        print(f"\n{_assumptions(stage, cluster, size)}")
        if stages[name]["does_not_fit"]:
            print(f"\nas written it does not fit: {stages[name]['does_not_fit']}")
    return _whole_run(stages)


def plan(config: ExperimentConfig, cluster: ClusterConfig, workload: WorkloadConfig) -> dict[str, Any]:
    """Returns the results of `pal plan`: the config as written, the cheapest way to run it, and why not the others."""
    from pipeline.cost.extraction import extraction
    from pipeline.cost.predict import predict
    from pipeline.cost.search import cheapest, explain_alternatives, search
    from pipeline.cost.workload import model_size, total_steps

    as_written = predict(config, cluster, workload)
    predictions = search(config, cluster, workload)
    best = cheapest(predictions)
    steps, size = total_steps(config, workload), model_size(config, workload)
    return {
        **_results(as_written, steps, cluster),
        "parameters_total": size.total,
        "parameters_trained": size.trained,
        "cheapest": None if best is None else _results(best, steps, cluster),
        "alternatives": explain_alternatives(predictions),
        "extraction": asdict(extraction(cluster, workload, config.model.encoders)),
        "workload": workload.model_dump(mode="json"),
    }


def _whole_run(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the results of the only stage, or of the one that needs most memory with the time of all stages."""
    if len(stages) == 1:
        return next(iter(stages.values()))
    largest = max(stages.values(), key=lambda stage: stage["memory_gib_per_gpu"]["total"])
    sums = {key: sum(stage[key] for stage in stages.values()) for key in ("steps", "days", "cost")}
    return {**largest, **sums, "fits": all(stage["fits"] for stage in stages.values()), "stages": stages}


def _results(prediction: Prediction, steps: int, cluster: ClusterConfig) -> dict[str, Any]:
    hours = steps * prediction.step_s / 3600
    values = asdict(prediction)
    return {
        "memory_gib_per_gpu": values.pop("memory_gib"),
        "step_time_s": values.pop("step_s"),
        **values,
        "fits": not prediction.does_not_fit,
        "steps": steps,
        "days": hours / 24,
        "cost": hours * cluster.gpus * cluster.price_per_gpu_hour,
    }


def _print_plan(stage: str, results: dict[str, Any], config: ExperimentConfig, cluster: ClusterConfig) -> None:
    parameters = f"{results['parameters_total']:,} parameters, {results['parameters_trained']:,} trained"
    heading = f"{config.model.language_model}, {config.model.integration}: {parameters}"
    print(f"{f'stage {stage}: ' if stage else ''}{heading}; {cluster.gpus} x {cluster.gpu.name}\n")
    rows = []
    for name, prediction in (("as written", results), ("cheapest", results["cheapest"])):
        if prediction is not None:
            how = f"{prediction['zero']}, micro-batch {prediction['micro_batch_size']}"
            how += ", checkpointing" if prediction["gradient_checkpointing"] else ""
            memory = {f"{part} GiB": value for part, value in prediction["memory_gib_per_gpu"].items()}
            shown = ("step_time_s", "mfu", "tokens_per_s", "days", "cost")
            rows.append({"": name, "how": how, **memory, **{key: prediction[key] for key in shown}})
    print(_text(rows))
    print("\n" + "\n".join(results["alternatives"]))
    if config.model.encoders:
        print(f"\n{_preparation(results['extraction'])}")


def _assumptions(config: ExperimentConfig, cluster: ClusterConfig, workload: WorkloadConfig) -> str:
    from pipeline.cost.workload import mean_frames

    return ASSUMPTIONS.format(
        **cluster.model_dump(),
        frames=sum(mean_frames(workload, name) for name in config.model.encoders),
        text=workload.question_tokens,
        answer=workload.answer_tokens,
    )


def _print_tables() -> dict[str, Any]:
    """Prints an epoch of OpenAQA on one node by integration, then by model and cluster; returns the rows of both."""
    from pipeline.config import load_config
    from pipeline.config.cluster import ClusterConfig, WorkloadConfig
    from pipeline.cost import tables
    from pipeline.cost.extraction import extraction

    workload = load_config(WorkloadConfig, tables.OPENAQA)
    cluster = load_config(ClusterConfig, tables.CLUSTERS[0])
    preparation = _preparation(asdict(extraction(cluster, workload, [tables.ENCODER])))
    print(f"OpenAQA on {cluster.gpus} x {cluster.gpu.name}: {preparation}; an epoch with {tables.MODELS[0]}:")
    openaqa = tables.epoch_by_integration(cluster, workload)
    print(_text(openaqa), flush=True)
    rows = tables.epoch_by_cluster(workload)
    print(f"\n{_text(rows)}")
    return {"openaqa": openaqa, "rows": rows}


def _preparation(results: dict[str, Any]) -> str:
    """Returns storage and time of the features, and a warning where encoders compute mostly padding."""
    if results["hours"] is None:
        time = "time to prepare unknown: `gflop_per_encoded_s` of an encoder is only in workload files"
    else:
        hours = f"encoders {results['encoder_hours']:.2f} h, decoding {results['decoding_hours']:.2f} h"
        time = f"{results['hours']:.2f} h to prepare ({hours})"
    lines = [f"features {results['storage_gib']:,.1f} GiB, {time}"]
    lines += [
        f"{name} encodes {padding:.0f} s for each second of audio, since it pads every clip to whole windows"
        for name, padding in results["padding"].items()
        if padding >= NOTABLE_PADDING
    ]
    return "\n".join(lines)


def _text(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a table whose columns are the keys of all rows; `-` where a row has no value."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return format_table([keys, *([_cell(row[key]) if key in row else "-" for key in keys] for row in rows)])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
