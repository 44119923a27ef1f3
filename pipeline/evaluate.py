"""`pal evaluate MODEL BENCHMARK...`: generates and scores an exported model's answers, with controls, and computes the
perplexity of a text file before and after the training.

Neither the number of processes nor an interruption changes the results; the batch size changes the last bits of the
logits, and so an answer only where two tokens are almost equally likely.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.arguments import add_encoder_option, add_json, require_positive, write_results
from pipeline.core.console import logger
from pipeline.core.errors import EXIT_FAILURE, UserError, run_command

TEXT = "text"  # kind of `text=FILE`

if TYPE_CHECKING:  # torch and streaming take seconds to import, which `--help` must not
    from pipeline.config import ExperimentConfig
    from pipeline.evaluation.evaluate_benchmark import BenchmarkResult


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    locations = _benchmark_names(arguments.benchmarks)
    require_positive(arguments, "limit", "batch_size", "nproc")
    output = arguments.predictions or arguments.json
    if arguments.share and not output:
        raise UserError(
            "--share", "would lose its answers", "give --predictions FILE in a folder that all nodes can write to"
        )

    texts = {
        name: Path(location.partition("=")[2])
        for name, location in locations.items()
        if location.startswith(f"{TEXT}=")
    }
    if texts and arguments.share:
        raise UserError(
            "--share", "applies to questions, not to text=FILE", "evaluate the text in a command of its own"
        )
    perplexities = {name: _evaluate_text(arguments, file) for name, file in texts.items()}
    locations = {name: location for name, location in locations.items() if name not in texts}
    if not locations and not (arguments.model / "config.yaml").is_file():  # a plain language model
        write_results(perplexities, arguments.json)
        return 0

    from pipeline.inference.responder import load_config_of

    config, _ = load_config_of(arguments.model)
    with tempfile.TemporaryDirectory(prefix="pal-evaluate-") as temporary:
        journal = output.with_name(f"{output.name}.partial") if output else Path(temporary)
        try:
            results = _evaluate(arguments, locations, journal) if locations else {}
        except BrokenProcessPool:
            logger.error("a process was killed (out of memory?); the same command resumes the evaluation")
            return EXIT_FAILURE
    if arguments.share:
        logger.info(f"answers are in {journal}; after all shares, the same command without --share computes the scores")
        return 0
    _log_to_run(config, results, perplexities)
    if arguments.predictions:
        _write_predictions(arguments.predictions, results)
    write_results({**perplexities, **{name: result.scores for name, result in results.items()}}, arguments.json)
    if output and locations:
        shutil.rmtree(journal)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal evaluate",
        description="Generate answers on held-out clips and score them. With --predictions or --json, the same command "
        "resumes an evaluation that was killed.",
    )
    parser.add_argument("model", type=Path, help="exported folder (`pal export`)")
    parser.add_argument(
        "benchmarks",
        nargs="+",
        metavar="BENCHMARK",
        help="prepared feature set: a folder or a URL; or mmau=FOLDER (mmar, mmsu, esc50, dcase2017, "
        "vocalsound, fsd50k, gtzan, audiocaps, clotho, librispeech); or text=FILE for the perplexity of held-out text, "
        "for which MODEL may also be a plain language model",
    )
    parser.add_argument("--swap-audio", action="store_true", help="control: also answer with other clips' audio")
    parser.add_argument(
        "--majority-from", metavar="SET", help="baseline: also score the most frequent answers of this training set"
    )
    parser.add_argument(
        "--wer",
        action="append",
        default=[],
        metavar="TASK",
        help="also compute word error rates of this task; tasks named transcription, transcribe, asr, ... have them",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only N clips of each benchmark, evenly spaced")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="questions per batch (default: 64)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="maximum new tokens per answer (default: 64)"
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes, one on each GPU (default: 1)")
    parser.add_argument(
        "--share",
        type=_share,
        metavar="I/N",
        help="answer shard I of N (from 0) without scoring: one on each node, all with the same --predictions",
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder for local copies of remote sets")
    add_encoder_option(parser)
    add_json(parser)
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="write every answer to this file as JSON lines, and files for official scorers beside it",
    )
    return parser


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError("--share", f"'{text}' is not I/N with I below N", "give 0/4, 1/4, 2/4 and 3/4 to four nodes")
    return int(index), int(count)


def _benchmark_names(locations: Sequence[str]) -> dict[str, str]:
    """Returns name -> location: a published benchmark has its own name, a feature set the name of its folder."""
    names = {}
    for location in locations:
        kind, separator, _ = location.partition("=")
        name = Path(location).name if "://" in location else Path(location).resolve().name
        names[kind if separator else name] = location
    if len(names) < len(locations):
        raise UserError("BENCHMARK", "two have the same name", "evaluate them one by one, or rename one")
    return names


def _evaluate(arguments: argparse.Namespace, locations: Mapping[str, str], journal: Path) -> dict[str, BenchmarkResult]:
    """Evaluates every benchmark and prints its scores; with --share, answers a part and returns nothing."""
    from pipeline.evaluation.evaluate_benchmark import EvaluationOptions, answer_partition, evaluate_benchmark
    from pipeline.evaluation.generate_answers import GenerationSettings, Partition, open_answer_generator
    from pipeline.evaluation.question_sets import QuestionSource

    settings = GenerationSettings(
        model=arguments.model,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        journal=journal,
        nproc=arguments.nproc,
        partition=Partition(*arguments.share or (0, 1)),
    )
    options = EvaluationOptions(
        limit=arguments.limit,
        swap_audio=arguments.swap_audio,
        majority_from=arguments.majority_from,
        writes_predictions=arguments.predictions is not None,
        transcription_tasks=arguments.wer,
    )
    results = {}
    with open_answer_generator(settings) as generator:
        for name, location in locations.items():
            source = QuestionSource(location, arguments.cache, dict(arguments.encoder))
            if arguments.share:
                answer_partition(generator, source, options)
                continue
            results[name] = evaluate_benchmark(generator, source, options)
            _print_summary(name, results[name].scores)
    return results


def _evaluate_text(arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Computes and prints the perplexity of a text file, beside that of the language model before the training."""
    from pipeline.evaluation.perplexity import evaluate_text

    scores = evaluate_text(arguments.model, file, arguments.limit)
    low, high = scores["perplexity_ci95"]
    line = f"{file}: perplexity {scores['perplexity']:.4g} ({low:.4g} to {high:.4g})"
    if "base" in scores:
        increase = scores["increase"]
        line += f", before the training {scores['base']['perplexity']:.4g}; "
        line += "{:+.3f} nats per token ({:+.3f} to {:+.3f})".format(increase["nats_per_token"], *increase["ci95"])
    print(f"{line}, {scores['tokens']:,} tokens in {scores['documents']:,} documents")
    return scores


def _write_predictions(file: Path, results: Mapping[str, BenchmarkResult]) -> None:
    """Writes all predictions to one file, and the files for official scorers beside it."""
    lines = [{"benchmark": name, **line} for name, result in results.items() for line in result.predictions]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    for result in results.values():
        for name, text in result.official_files.items():
            file.with_name(f"{file.stem}.{name}").write_text(text, encoding="utf-8")


def _log_to_run(
    config: ExperimentConfig, results: Mapping[str, BenchmarkResult], perplexities: Mapping[str, dict[str, Any]]
) -> None:
    """Adds scores and correctness per question to the MLflow run that trained the model, if that run is known.

    Correctness per question lets runs be compared question by question."""
    from pipeline.evaluation.evaluate_benchmark import OWN_AUDIO
    from pipeline.tracking import writer
    from pipeline.training import run_dir

    run = run_dir.read_run(config.output)
    if run is None or run.run_id is None:
        logger.info(f"not logged to MLflow: {config.output} does not name the run that trained this model")
        return
    metrics: dict[str, float] = {}
    artifacts = {}
    for name, scores in perplexities.items():
        artifacts[f"{writer.EVALUATIONS}/{name}.json"] = json.dumps(scores, indent=2)
        metrics |= {f"eval/{name}/{metric}": value for metric, value in _scalar_metrics(scores).items()}
        if "increase" in scores:
            metrics[f"eval/{name}/increase"] = scores["increase"]["nats_per_token"]
    for name, result in results.items():
        scores = result.scores
        artifacts[f"{writer.EVALUATIONS}/{name}.json"] = json.dumps(scores, indent=2)
        lines = [line for line in result.predictions if line["audio"] == OWN_AUDIO]
        correctness = {key: [line[key] for line in lines] for key in ("question_id", "clip_id", "correct")}
        artifacts[f"{writer.CORRECTNESS}/{name}.json"] = json.dumps(correctness)
        metrics |= {f"eval/{name}/{metric}": value for metric, value in _scalar_metrics(scores).items()}
        for domain, group in scores.get("by_domain", {}).items():
            metrics[f"eval/{name}/accuracy_{domain}"] = group["accuracy"]
        for control in ("swapped_audio", "majority_baseline"):
            if control in scores:
                metrics[f"eval/{name}/{control}_accuracy"] = scores[control]["accuracy"]
    try:
        writer.log_evaluation(config.tracking, config.output, run.run_id, metrics, artifacts)
    except Exception as error:  # MLflow raises errors of many libraries; the scores are printed and in --json
        logger.warning(f"not logged to MLflow ({type(error).__name__}: {error})")


def _print_summary(benchmark: str, scores: Mapping[str, Any]) -> None:
    if "accuracy" not in scores:
        print(f"{benchmark}: {scores['unscored']} questions about {scores['clips']} clips answered, none scored")
        return
    low, high = scores["ci95"]
    line = f"{benchmark}: accuracy {scores['accuracy']:.1%} ({low:.1%} to {high:.1%})"
    for key in ("swapped_audio", "majority_baseline"):
        if key in scores:
            line += f", {key.replace('_', ' ')} {scores[key]['accuracy']:.1%}"
    line += "".join(f", {name} {value:.3g}" for name, value in _scalar_metrics(scores).items() if name != "accuracy")
    line += f", {scores['unscored']} without a reference answer" if "unscored" in scores else ""
    print(f"{line}, {scores['questions']} questions about {scores['clips']} clips")


def _scalar_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """Returns `accuracy`, and the metrics that a published benchmark adds."""
    return {name: value for name, value in scores.items() if isinstance(value, float)}


if __name__ == "__main__":
    sys.exit(run_command(main))
