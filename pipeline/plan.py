"""`pal plan CONFIG`: memory, step time and cost of a run that was not started, and the cheapest way to run it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.console import format_table
from pipeline.core.errors import UserError, run_command

if TYPE_CHECKING:  # the planner imports torch, which `--help` must not
    from pipeline.config import ExperimentConfig
    from pipeline.config.cluster import ClusterConfig, WorkloadConfig
    from pipeline.cost.predict import Prediction

OPENAQA = "openaqa_workload"
TABLE_MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b")
TABLE_CLUSTERS = ("a100_80", "h100_80")
TABLE_GPUS = (8, 64, 256, 1024)
TABLE_BATCH = 6144  # questions: divides over 1,024 GPUs, packed by six as well
PACKED = 6
VARIANTS = (("plits", 1), ("lal", 1), ("lal", PACKED), ("pal_v3", 1))  # integration, questions per sequence
TABLE_POLICIES = ("zero1", "zero2", "zero3", "zero3_offload")
ASSUMPTIONS = """Assumed: {efficiency:.0%} of the data sheet's peak in matrix products, all else in the passes and Adam
bound by memory; ring collectives over the slowest link at {bandwidth_efficiency:.0%} of its bandwidth, {overlap:.0%} of
them hidden; {usable_memory:.0%} of the memory usable; rows of mean length (N_a {audio}, N_t {text} of which {answer}
carry loss)."""


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    from pipeline.config import ExperimentConfig, choose_stages, load_config
    from pipeline.config.cluster import ClusterConfig, WorkloadConfig
    from pipeline.cost.workload import measure_workload

    if arguments.table:
        if arguments.config is not None:
            raise UserError("CONFIG", "has no effect on --table", "leave one out")
        results: dict[str, Any] = {"openaqa": openaqa_epoch(), "rows": []}
        print(_text(results["openaqa"]), flush=True)
        results["rows"] = size_table()
        print(f"\n{_text(results['rows'])}")
    else:
        if arguments.config is None:
            raise UserError("CONFIG", "is missing", "give an experiment's YAML file, or --table")
        config = load_config(ExperimentConfig, arguments.config, arguments.overrides)
        cluster = load_config(
            ClusterConfig, arguments.cluster, [] if arguments.nodes is None else [f"nodes={arguments.nodes}"]
        )
        given = load_config(WorkloadConfig, arguments.workload) if arguments.workload else None
        stages = {}
        for name, stage in choose_stages(config, arguments.stage).items():
            stages[name] = plan(stage, cluster, given or measure_workload(stage))
            _print_plan(name, stages[name], stage, cluster)
        results = _whole(stages)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal plan", description="Predict memory, step time and cost of a run, and find the cheapest way to run it."
    )
    parser.add_argument("config", nargs="?", help="an experiment's YAML file, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the config")
    parser.add_argument(
        "--cluster", default="a100_80", metavar="FILE", help="machines: a YAML file, a100_80, a100_40, h100_80 or cpu"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="machines, instead of those in the file")
    parser.add_argument(
        "--workload", metavar="FILE", help=f"size of the data: a YAML file or {OPENAQA} (default: read data.train)"
    )
    parser.add_argument("--stage", metavar="NAME", help="plan this stage of the config alone (default: all)")
    parser.add_argument("--table", action="store_true", help="OpenAQA on 8 to 1,024 GPUs for 1B, 3B, 8B and 70B")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser


def plan(config: ExperimentConfig, cluster: ClusterConfig, workload: WorkloadConfig) -> dict[str, Any]:
    """The figures of `pal plan`: of the config as it is written, of the cheapest way to run it, and why not others."""
    from pipeline.cost.extraction import extraction
    from pipeline.cost.predict import predict
    from pipeline.cost.search import cheapest, search, verdicts
    from pipeline.cost.workload import model_size, total_steps

    written = predict(config, cluster, workload)
    predictions = search(config, cluster, workload)
    best = cheapest(predictions)
    steps, size = total_steps(config, workload), model_size(config, workload)
    return {
        **_figures(written, steps, cluster),
        "parameters_total": size.total,
        "parameters_trained": size.trained,
        "cheapest": None if best is None else _figures(best, steps, cluster),
        "alternatives": verdicts(predictions),
        "extraction": extraction(cluster, workload, config.model.encoders),
        "workload": workload.model_dump(mode="json"),
    }


def _whole(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run: of its only stage, or of the one that needs most memory, with the time of all."""
    if len(stages) == 1:
        return next(iter(stages.values()))
    most = max(stages.values(), key=lambda stage: stage["memory_gib_per_gpu"]["total"])
    sums = {key: sum(stage[key] for stage in stages.values()) for key in ("steps", "days", "cost")}
    return {**most, **sums, "fits": all(stage["fits"] for stage in stages.values()), "stages": stages}


def _figures(prediction: Prediction, steps: int, cluster: ClusterConfig) -> dict[str, Any]:
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
    print(f"{f'stage {stage}: ' if stage else ''}{config.model.language_model}, {config.model.integration}: "
          f"{results['parameters_total']:,} parameters, {results['parameters_trained']:,} trained; "
          f"{cluster.gpus} x {cluster.gpu.name}\n")  # fmt: skip
    rows = []
    for name, figures in (("as written", results), ("cheapest", results["cheapest"])):
        if figures is not None:
            how = f"{figures['zero']}, micro-batch {figures['micro_batch_size']}"
            how += ", checkpointing" if figures["gradient_checkpointing"] else ""
            memory = {f"{part} GiB": value for part, value in figures["memory_gib_per_gpu"].items()}
            shown = ("step_time_s", "mfu", "tokens_per_s", "days", "cost")
            rows.append({"": name, "how": how, **memory, **{key: figures[key] for key in shown}})
    print(_text(rows))
    print("\n" + "\n".join(results["alternatives"]))
    made = results["extraction"]
    print(f"\n{_prepared(made)}")
    workload = results["workload"]
    frames = sum(workload["encoders"][name]["frame_rate_hz"] for name in config.model.encoders) * workload["clip_s"]
    assumed = {"audio": round(frames), "text": workload["question_tokens"], "answer": workload["answer_tokens"]}
    print("\n" + ASSUMPTIONS.format(**cluster.model_dump(), **assumed))
    if results["does_not_fit"]:
        print(f"\nas written it does not fit: {results['does_not_fit']}")


def openaqa_epoch() -> list[dict[str, Any]]:
    """One epoch of OpenAQA with Llama-3.2-1B on a node of 8 A100: by operations alone, and by the whole model."""
    from pipeline.config import load_config
    from pipeline.config.cluster import ClusterConfig, WorkloadConfig
    from pipeline.cost.extraction import extraction
    from pipeline.cost.search import cheapest, search
    from pipeline.cost.workload import total_steps

    workload, cluster = load_config(WorkloadConfig, OPENAQA), load_config(ClusterConfig, "a100_80")
    rows = []
    for integration, packed in VARIANTS:
        config = _table_config(TABLE_MODELS[0], integration, packed)
        best = cheapest(search(config, cluster, workload, TABLE_POLICIES))
        assert best is not None  # one billion parameters fit into 80 GiB
        hours = total_steps(config, workload) * best.step_s / 3600
        by_operations = hours * best.mfu / cluster.efficiency
        rows.append(
            {
                "integration": _name(integration, packed),
                "h by FLOPs alone": by_operations,
                "h": hours,
                "zero": best.zero,
                "micro-batch": best.micro_batch_size,
                **{f"{part} s": value for part, value in best.seconds.items()},
                "step s": best.step_s,
                "mfu": best.mfu,
                "cost": hours * cluster.gpus * cluster.price_per_gpu_hour,
            }
        )
    made = extraction(cluster, workload, ["sslam"])
    print(f"OpenAQA on {cluster.gpus} x {cluster.gpu.name}: {_prepared(made)}; an epoch with {TABLE_MODELS[0]}:")
    return rows


def size_table() -> list[dict[str, Any]]:
    """An epoch of OpenAQA for each model, cluster and integration, run in the cheapest way that fits."""
    from pipeline.config import load_config
    from pipeline.config.cluster import ClusterConfig, WorkloadConfig
    from pipeline.cost.search import cheapest, search
    from pipeline.cost.workload import total_steps

    workload, rows = load_config(WorkloadConfig, OPENAQA), []
    for model in TABLE_MODELS:
        for integration, packed in VARIANTS:
            config = _table_config(model, integration, packed)
            for cluster_name in TABLE_CLUSTERS:
                for gpus in TABLE_GPUS:
                    cluster = load_config(ClusterConfig, cluster_name, [f"nodes={gpus // 8}"])
                    best = cheapest(search(config, cluster, workload, TABLE_POLICIES))
                    row: dict[str, Any] = {"model": model, "integration": _name(integration, packed),
                                           "GPU": cluster.gpu.name, "GPUs": gpus}  # fmt: skip
                    if best is not None:
                        hours = total_steps(config, workload) * best.step_s / 3600
                        how = f"{best.zero}{'+ckpt' if best.gradient_checkpointing else ''} x{best.micro_batch_size}"
                        row |= {"how": how, "GiB": best.memory_gib["total"], "step s": best.step_s, "mfu": best.mfu,
                                "h": hours, "cost": hours * gpus * cluster.price_per_gpu_hour}  # fmt: skip
                    rows.append(row)
    return rows


def _table_config(model: str, integration: str, packed: int) -> ExperimentConfig:
    from pipeline.config import ExperimentConfig, validate_config

    values = {
        "output": "unused",
        "model": {"language_model": model, "integration": integration, "encoders": ["sslam"]},
        "data": {"train": "unused", "questions_per_sequence": packed},
        "train": {"epochs": 1, "global_batch_size": TABLE_BATCH, "micro_batch_size": 1},
    }
    return validate_config(ExperimentConfig, values, "the table")


def _prepared(made: dict[str, float]) -> str:
    return (f"features {made['storage_gib']:,.1f} GiB, {made['hours']:.2f} h to prepare "
            f"(encoders {made['encoder_hours']:.2f} h, decoding {made['decoding_hours']:.2f} h)")  # fmt: skip


def _name(integration: str, packed: int) -> str:
    return integration if packed == 1 else f"{integration}, {packed} packed"


def _text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows under the keys of all, format_table; `-` where a row has no value."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return format_table([keys, *([_cell(row[key]) if key in row else "-" for key in keys] for row in rows)])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
