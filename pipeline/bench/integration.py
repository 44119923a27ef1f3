"""`pal bench integration`: measures speed and memory of the integrations, and counts their operations.

Needs only torch and transformers. Every measurement runs in a process of its own, so that no variant's memory counts
for another."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from pipeline.bench.case import DTYPES, SHAPES, Case, Shape, model_config, run
from pipeline.core.arguments import add_dry_run, add_json, write_results
from pipeline.core.console import format_table, logger
from pipeline.core.errors import UserError, run_command
from pipeline.core.units import GIB, GIGA

VARIANTS = ("text_only", "plits", "lal", "pal_v2", "pal_v3", "flamingo")
MODES = ("train", "decode")
BASELINE = ("plits", 1)  # variant and questions per clip that ratios refer to: the usual way to train
PLOT_AUDIO_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)


def main(argv: Sequence[str]) -> int:
    """Measures every case, prints the tables and writes the results.

    Raises:
        UserError: sizes that do not fit each other, or a device that does not exist.
    """
    args = _parser().parse_args(argv)
    cases = [
        _case(args, variant, mode, audio, questions)
        for mode in args.modes
        for audio in args.audio_tokens
        for questions in (args.questions if mode == "train" else [1])
        for variant in args.variants
    ]
    if args.plot is not None:
        known = set(cases)
        curve = [_case(args, v, "train", n, 1) for n in PLOT_AUDIO_TOKENS for v in args.variants]
        cases += [case for case in curve if case not in known]
    _check(cases)

    rows = []
    for case in cases:
        row = describe(case)
        rows.append(row)
        if not args.dry_run:
            row.update(measure(case))
            speed = "out of memory" if row["samples_per_s"] is None else f"{row['samples_per_s']:.3g} samples/s"
            logger.info(f"{case.mode} {case.variant} N_a={case.num_audio_tokens} x{case.questions_per_clip}: {speed}")
    counted = [describe(replace(case, shape=SHAPES["llama-3.2-1b"])) for case in cases if case.mode == "train"]
    add_ratios(rows)
    add_ratios(counted)
    print(table(rows))
    print("\nBy counted operations alone, at the shape of Llama-3.2-1B:\n" + table(counted))
    if args.json is not None:
        import torch

        results = {
            "rows": rows,
            "device": _device_name(args.device),
            "torch": torch.__version__,
            "threads": args.threads or torch.get_num_threads(),
            "counted_llama_3_2_1b": counted,
        }
        write_results(results, args.json)
    if args.plot is not None and not args.dry_run:
        from pipeline.plots import plot_cost

        plot_cost(
            [r for r in rows if r["mode"] == "train" and r["questions_per_clip"] == 1],
            f"Cost of a training sample ({args.text_tokens} text tokens)",
        ).savefig(args.plot)
    return 0


def describe(case: Case) -> dict[str, Any]:
    """Returns the row of a case before it is measured, with `flops_per_sample`."""
    from pipeline.cost.flops import RowShape, forward_flops, training_flops

    packed = case.questions_per_clip if case.frames else 1
    row = RowShape(
        system_tokens=0,
        question_tokens=[case.num_text_tokens] * packed,
        loss_tokens=case.answer_tokens * packed,
        frames=case.frames,
    )
    flops = (training_flops if case.mode == "train" else forward_flops)(model_config(case), row)
    return {
        "variant": case.variant,
        "mode": case.mode,
        "num_audio_tokens": case.num_audio_tokens,
        "num_text_tokens": case.num_text_tokens,
        "answer_tokens": case.answer_tokens,
        "questions_per_clip": case.questions_per_clip,
        "batch": case.batch,
        **asdict(case.shape),
        "dtype": case.dtype,
        "flops_per_sample": flops / packed,
        "samples_per_s": None,
        "peak_memory_gib": None,
    }


def measure(case: Case) -> dict[str, float | None]:
    """Measures `samples_per_s`, `step_s` and `peak_memory_gib` of a case in a new process; None if it does not fit."""
    import torch

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            step_s, peak_bytes = pool.submit(run, case).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            return {"samples_per_s": None, "step_s": None, "peak_memory_gib": None}
    samples = case.batch * case.questions_per_clip
    return {"samples_per_s": samples / step_s, "step_s": step_s, "peak_memory_gib": peak_bytes / GIB}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its ratios to PLITS with one question a clip: `speed_ratio`, `flop_ratio`, `memory_ratio`."""
    baselines = {
        (row["mode"], row["num_audio_tokens"]): row
        for row in reversed(rows)
        if (row["variant"], row["questions_per_clip"]) == BASELINE
    }
    for row in rows:
        base = baselines.get((row["mode"], row["num_audio_tokens"]))
        row["flop_ratio"] = base and base["flops_per_sample"] / row["flops_per_sample"]
        measured = base is not None and base["samples_per_s"] is not None and row["samples_per_s"] is not None
        row["speed_ratio"] = row["samples_per_s"] / base["samples_per_s"] if base and measured else None
        row["memory_ratio"] = row["peak_memory_gib"] / base["peak_memory_gib"] if base and measured else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as text. `bound` is the measured speed-up over the counted one."""
    headings = (
        "mode",
        "variant",
        "N_a",
        "questions",
        "samples/s",
        "GiB",
        "GFLOP",
        "x speed",
        "x FLOP",
        "bound",
        "x GiB",
    )
    lines = [headings]
    for r in rows:
        bound = r["speed_ratio"] / r["flop_ratio"] if r["speed_ratio"] is not None else None
        costs = (r["samples_per_s"], r["peak_memory_gib"], r["flops_per_sample"] / GIGA)
        ratios = (r["speed_ratio"], r["flop_ratio"], bound, r["memory_ratio"])
        audio = "-" if r["variant"] == "text_only" else str(r["num_audio_tokens"])
        lines.append((r["mode"], r["variant"], audio, str(r["questions_per_clip"]), *map(_cell, (*costs, *ratios))))
    return format_table(lines, right=True)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


DESCRIPTION = """Measure speed and memory of the integrations, and count their operations. Every measurement runs in a
process of its own."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pal bench integration", description=DESCRIPTION)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="sizes of the language model (default: small)")
    for name in ("layers", "hidden", "ffn", "heads", "kv-heads", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, help="this size of the language model, instead of the shape's")
    parser.add_argument("--feature-width", type=int, default=768, help="width of audio features (default: %(default)s)")
    parser.add_argument("--text-tokens", type=int, default=100, help="N_t: text tokens of a question with its answer")
    parser.add_argument("--answer-tokens", type=int, default=20, help="how many of them carry loss, or are generated")
    parser.add_argument("--audio-tokens", type=int, nargs="+", default=[512], help="N_a: audio tokens of a clip")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 6], help="questions packed behind a clip")
    parser.add_argument("--batch", type=int, default=4, help="number of clips (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--steps", type=int, default=5, help="number of timed steps, whose median is reported")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    add_json(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also measure N_a 64 to 4096, and plot the cost over N_a"
    )
    add_dry_run(parser, "count operations, measure nothing")
    return parser


def _case(args: argparse.Namespace, variant: str, mode: str, num_audio_tokens: int, questions: int) -> Case:
    sizes = {f.name: getattr(args, f.name) for f in fields(Shape) if getattr(args, f.name) is not None}
    return Case(
        variant=variant,
        mode=mode,
        shape=replace(SHAPES[args.shape], **sizes),
        num_audio_tokens=num_audio_tokens,
        num_text_tokens=args.text_tokens,
        answer_tokens=args.answer_tokens,
        questions_per_clip=questions,
        batch=args.batch,
        feature_width=args.feature_width,
        device=args.device,
        dtype=args.dtype,
        steps=args.steps,
        threads=args.threads,
    )


def _check(cases: Sequence[Case]) -> None:
    for case in cases:
        sizes = {**asdict(case.shape), **{f.name: getattr(case, f.name) for f in fields(Case) if f.type == "int"}}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"--{name.replace('_', '-')}", f"{size} is not a size", "give at least 1")
        if case.answer_tokens >= case.num_text_tokens:
            raise UserError(
                "--answer-tokens",
                f"{case.answer_tokens} leave no tokens for the question",
                f"give fewer than {case.num_text_tokens}",
            )
        if case.shape.hidden % case.shape.heads or case.shape.heads % case.shape.kv_heads:
            raise UserError("--heads", "do not divide --hidden, or --kv-heads do not divide --heads", "change one")
        if case.variant == "pal_v2" and case.num_audio_tokens < 2:
            raise UserError("--audio-tokens", "pal_v2 splits them between two encoders", "give at least 2")
    if cases[0].device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device", "torch finds no CUDA device on this machine", "leave it out")


def _device_name(device: str) -> str:
    import platform

    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"cpu: {platform.processor() or platform.machine()}"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
