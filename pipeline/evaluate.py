"""`pal evaluate MODEL BENCHMARK...`: answers of an exported model to prepared questions, scored, with controls.

The results are a function of model and features: not of the batch size, the number of processes, or an interruption.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.arguments import add_encoder_option, require_positive
from pipeline.core.errors import EXIT_FAILURE, UserError, run_command
from pipeline.evaluation.scoring import Prediction, bootstrap_ci95, score

if TYPE_CHECKING:  # torch and streaming take seconds to import, which `--help` must not
    from pipeline.config import ExperimentConfig
    from pipeline.evaluation.benchmarks import Benchmark
    from pipeline.evaluation.generate_answers import AnswerGenerator, Questions

OWN_AUDIO, SWAPPED_AUDIO = "own", "swapped"  # column `audio` of the predictions


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    names = _benchmark_names(arguments.benchmarks)
    require_positive(arguments, "limit", "batch_size", "nproc")

    from pipeline.evaluation.generate_answers import Share, open_answer_generator
    from pipeline.inference.responder import load_config_of

    config, _ = load_config_of(arguments.model)
    results, lines, official = {}, [], {}
    output = arguments.predictions or arguments.json
    if arguments.share and not output:
        raise UserError("--share", "leaves its answers nowhere", "give --predictions FILE in a folder that all share")
    common = {
        "cache": arguments.cache,
        "weights": dict(arguments.encoder),
        "limit": arguments.limit,
        "swap_audio": arguments.swap_audio,
    }
    with tempfile.TemporaryDirectory(prefix="pal-evaluate-") as scratch:
        journal = output.with_name(f"{output.name}.partial") if output else Path(scratch)
        try:
            with open_answer_generator(
                arguments.model,
                arguments.max_new_tokens,
                arguments.batch_size,
                journal,
                arguments.nproc,
                Share(*arguments.share or (0, 1)),
            ) as generator:
                for name, place in names.items():
                    if arguments.share:
                        answer_share(generator, place, **common)
                        continue
                    results[name], predictions, official[name] = evaluate(
                        generator,
                        place,
                        **common,
                        majority_from=arguments.majority_from,
                        answers_are_written=arguments.predictions is not None,
                    )
                    lines += [{"benchmark": name, **prediction} for prediction in predictions]
                    _print_summary(name, results[name])
        except BrokenProcessPool:
            print("pal: a process was killed (out of memory?); the same command goes on from here", file=sys.stderr)
            return EXIT_FAILURE
    if arguments.share:
        print(
            f"pal: answers are in {journal}; after all shares the same command without --share scores", file=sys.stderr
        )
        return 0
    _log_to_run(config, results, lines)
    if arguments.predictions:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        arguments.predictions.write_text(text, encoding="utf-8")
        for files in official.values():
            for name, text in files.items():
                file = arguments.predictions.with_name(f"{arguments.predictions.stem}.{name}")
                file.write_text(text, encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if output:
        shutil.rmtree(journal)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal evaluate",
        description="Generate answers on held-out clips, score them. With --predictions or --json the same command "
        "goes on where it was killed.",
    )
    parser.add_argument("model", type=Path, help="exported folder (`pal export`)")
    parser.add_argument(
        "benchmarks",
        nargs="+",
        metavar="BENCHMARK",
        help="prepared feature set: a folder or a URL; or mmau=FOLDER (mmar, mmsu, esc50, dcase2017, "
        "vocalsound, fsd50k, gtzan, audiocaps, clotho, librispeech)",
    )
    parser.add_argument("--swap-audio", action="store_true", help="also ask about other clips' audio, as a control")
    parser.add_argument("--majority-from", metavar="SET", help="training set: also score its commonest answers")
    parser.add_argument("--limit", type=int, metavar="N", help="only N clips of each benchmark, evenly_spaced evenly")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="questions at a time (default: 64)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes, one on each GPU (default: 1)")
    parser.add_argument(
        "--share",
        type=_share,
        metavar="I/N",
        help="answer part I of N (from 0) and score nothing: one on each node, all with the same --predictions",
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder for local copies of far sets")
    add_encoder_option(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores here")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="write every answer here, as JSON lines; beside it what official scorers read",
    )
    return parser


def _share(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError("--share", f"'{text}' is not I/N with I below N", "give 0/4, 1/4, 2/4 and 3/4 to four nodes")
    return int(number), int(count)


def _log_to_run(config: ExperimentConfig, results: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Adds the scores to the MLflow run that trained the model, if that is still known here, and which questions were
    answered right, so that runs can be compared question by question."""
    from pipeline.tracking import writer
    from pipeline.training import run_dir

    run = run_dir.read_run(config.output)
    if run is None or run.run_id is None:
        print(
            f"pal: not logged to MLflow: {config.output} does not name the run that trained this model", file=sys.stderr
        )
        return
    scores: dict[str, float] = {}
    artifacts = {}
    for name, result in results.items():
        artifacts[f"{writer.EVALUATIONS}/{name}.json"] = json.dumps(result, indent=2)
        own = [line for line in lines if line["benchmark"] == name and line["audio"] == OWN_AUDIO]
        verdicts = {key: [line[key] for line in own] for key in ("question_id", "clip_id", "correct")}
        artifacts[f"{writer.CORRECTNESS}/{name}.json"] = json.dumps(verdicts)
        scores |= {f"eval/{name}/{metric}": value for metric, value in _own_metrics(result).items()}
        for domain, group in result.get("by_domain", {}).items():
            scores[f"eval/{name}/accuracy_{domain}"] = group["accuracy"]
        for control in ("swapped_audio", "majority_baseline"):
            if control in result:
                scores[f"eval/{name}/{control}_accuracy"] = result[control]["accuracy"]
    try:
        writer.log_evaluation(config.tracking, config.output, run.run_id, scores, artifacts)
    except Exception as error:  # of many libraries; the scores are printed and in --json
        print(f"pal: not logged to MLflow ({type(error).__name__}: {error})", file=sys.stderr)


def _benchmark_names(places: Sequence[str]) -> dict[str, str]:
    """A published benchmark goes by its own name, a prepared set by the name of its folder."""
    names = {}
    for place in places:
        kind, mark, _ = place.partition("=")
        names[kind if mark else Path(place).name if "://" in place else Path(place).resolve().name] = place
    if len(names) < len(places):
        raise UserError("BENCHMARK", "two have the same name", "evaluate them one by one, or rename one")
    return names


def evaluate(
    generator: AnswerGenerator,
    place: str,
    *,
    cache: Path | None = None,
    weights: Mapping[str, str] | None = None,
    limit: int | None = None,
    swap_audio: bool = False,
    majority_from: str | None = None,
    answers_are_written: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, str]]:
    """Asks every question of one benchmark.

    Args:
        place, cache, weights: of the benchmark; see `asking.open_questions`.
        limit: only this many clips, evenly_spaced evenly over the set.
        swap_audio: ask again with another clip's audio.
        majority_from: the training set; its commonest answer to each wording is scored as well.
        answers_are_written: the caller keeps the answers, not the scores alone.

    Returns:
        the scores: those of `scoring.score`, with further ones under `swapped_audio` and `majority_baseline`, and a
        published benchmark's own (questions whose answers its publishers keep are counted as `unscored`; without any
        other there are no scores); the predictions as plain JSON, in storage order; and files for official scorers,
        name -> text.

    Raises:
        UserError: no benchmark, features of another encoder, audio that cannot be read, a swap of one clip, or
            questions without answers where answers are needed.
    """
    from pipeline.evaluation.baselines import majority_baseline
    from pipeline.evaluation.benchmark_clips import AudioClips
    from pipeline.evaluation.generate_answers import evenly_spaced, open_questions, open_set, predictions_of

    questions = open_questions(place, generator.model, cache, weights or {})
    clips = evenly_spaced(len(questions), limit)
    benchmark = questions.benchmark if isinstance(questions, AudioClips) else None

    def ask(heard: dict[int, int]) -> list[Prediction]:
        predictions = predictions_of(questions, generator(questions, place, heard, cache, weights or {}))
        return predictions if benchmark is None else apply_benchmark_rules(predictions, benchmark)

    if benchmark is not None and benchmark.remark:
        print(f"pal: {benchmark.name}: {benchmark.remark}", file=sys.stderr)
    if benchmark is not None and not any(item.answer for item in benchmark.items):
        if not answers_are_written:
            remedy = "give --predictions FILE; what their server reads is written beside it"
            raise UserError(place, "has no answers to score by: its publishers keep them", remedy)
        if swap_audio or majority_from:
            raise UserError(place, "has no answers to score controls by", "leave --swap-audio and --majority-from out")
    own = ask({clip: clip for clip in clips})
    scores = _scores(own)
    files: dict[str, str] = {}
    if benchmark is not None:
        scored = {p.question_id: p.prediction for p in own if p.answer}
        if scored:
            scores |= benchmark.extra_metrics(scored)
            clip_of = {p.question_id: p.clip_id for p in own}
            for metric, marks in benchmark.marks(scored).items():
                values = np.array(list(marks.values()))
                scores[metric] = float(values.mean())
                scores[f"{metric}_ci95"] = list(bootstrap_ci95(values, [clip_of[question] for question in marks]))
        official = benchmark.predictions_file({p.question_id: p.prediction for p in own})
        files = {} if official is None else dict([official])
    lines = [{"audio": OWN_AUDIO, **prediction.to_json()} for prediction in own]
    if swap_audio:
        swapped = ask(_swapped(questions, clips))
        scores["swapped_audio"] = _scores(swapped)
        lines += [{"audio": SWAPPED_AUDIO, **prediction.to_json()} for prediction in swapped]
    if majority_from is not None:
        guess = majority_baseline(open_set(majority_from, [], cache))
        guesses = [replace(p, prediction=guess(p.task, p.question)) for p in own]
        scores["majority_baseline"] = _scores(
            guesses if benchmark is None else apply_benchmark_rules(guesses, benchmark)
        )
    return scores, lines, files


def answer_share(
    generator: AnswerGenerator,
    place: str,
    *,
    cache: Path | None,
    weights: Mapping[str, str],
    limit: int | None,
    swap_audio: bool,
) -> None:
    """Answers the generator's share of what `evaluate` would ask, and leaves it in the journal.

    Raises:
        UserError: as `evaluate`.
    """
    from pipeline.evaluation.generate_answers import evenly_spaced, open_questions

    questions = open_questions(place, generator.model, cache, weights)
    clips = evenly_spaced(len(questions), limit)
    generator(questions, place, {clip: clip for clip in clips}, cache, weights)
    if swap_audio:
        generator(questions, place, _swapped(questions, clips), cache, weights)


def _swapped(questions: Questions, clips: Sequence[int]) -> dict[int, int]:
    from pipeline.evaluation.baselines import swap_within_domains

    return swap_within_domains({clip: questions.clip(clip).domain for clip in clips})


def _scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Scores over the questions that have an answer; without any, how much was asked."""
    scored = [prediction for prediction in predictions if prediction.answer]
    unscored = len(predictions) - len(scored)
    if not scored:
        return {"unscored": unscored, "clips": len({prediction.clip_id for prediction in predictions})}
    return score(scored) | ({"unscored": unscored} if unscored else {})


def apply_benchmark_rules(predictions: Sequence[Prediction], benchmark: Benchmark) -> list[Prediction]:
    """The predictions with the benchmark's own verdicts."""
    items = {item.question_id: item for item in benchmark.items}
    return [replace(p, benchmark_correct=benchmark.is_correct(items[p.question_id], p.prediction)) for p in predictions]


def _print_summary(benchmark: str, scores: Mapping[str, Any]) -> None:
    if "accuracy" not in scores:
        print(f"{benchmark}: {scores['unscored']} questions about {scores['clips']} clips answered, none scored")
        return
    low, high = scores["ci95"]
    line = f"{benchmark}: accuracy {scores['accuracy']:.1%} ({low:.1%} to {high:.1%})"
    for key in ("swapped_audio", "majority_baseline"):
        if key in scores:
            line += f", {key.replace('_', ' ')} {scores[key]['accuracy']:.1%}"
    line += "".join(f", {name} {value:.3g}" for name, value in _own_metrics(scores).items() if name != "accuracy")
    line += f", {scores['unscored']} without an answer" if "unscored" in scores else ""
    print(f"{line}, {scores['questions']} questions about {scores['clips']} clips")


def _own_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """`accuracy`, and what a published benchmark adds."""
    return {name: value for name, value in scores.items() if isinstance(value, float)}


if __name__ == "__main__":
    sys.exit(run_command(main))
