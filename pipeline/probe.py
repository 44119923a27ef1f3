"""`pal probe MODEL SHARDS`: what a trained model attends to.

Reports attention by layer, head and time, and scores with a pathway hidden (arXiv 2506.10423 v3, figure 5, tables 5 and
6)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.arguments import add_json, require_positive, write_results
from pipeline.core.console import format_table, logger
from pipeline.core.errors import run_command

if TYPE_CHECKING:  # torch and streaming take seconds to import, which `--help` must not
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.core.feature_contract import Question
    from pipeline.core.streams import IntegrationKind
    from pipeline.data.feature_set import Clip, FeatureSet
    from pipeline.evaluation.generate_answers import ClipGroup
    from pipeline.inference.responder import Reply, Responder
    from pipeline.model import AttentionMass

NOTHING, PLAIN = "none", "plain"  # rows of `masking`: no pathway hidden; no audio at all
GAP_NOTE = (
    "Hidden audio keeps its positions, so the question stands behind a gap that is in no text; `plain` has no\n"
    "gap and is what the language model answers by itself. Their difference is the effect of the gap alone."
)


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    require_positive(arguments, "limit", "questions", "batch_size")

    from pipeline.core.feature_contract import require_same_features
    from pipeline.evaluation.question_sets import clips_with_questions, open_feature_set
    from pipeline.inference.decoding import log_decoding
    from pipeline.inference.responder import load_config_of, load_responder, require_streams

    require_streams(arguments.model, load_config_of(arguments.model)[0])
    responder = load_responder(arguments.model, arguments.max_new_tokens)
    log_decoding(arguments.max_new_tokens)
    features = open_feature_set(arguments.shards, list(responder.feature_fingerprints), arguments.cache)
    require_same_features(responder.feature_fingerprints, features.contract, arguments.shards, str(arguments.model))
    clips = clips_with_questions(features, arguments.limit)
    results = {
        "attention_mass": attention_mass(responder, features, clips, arguments.questions),
        "masking": score_without_pathways(responder, features, clips, arguments.batch_size),
    }
    _print_tables(results)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        _draw(results, responder, features, clips, arguments)
    write_results(results, arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal probe", description="Show attention by layer and pathway, and accuracy with a pathway hidden."
    )
    parser.add_argument("model", type=Path, help="exported folder (`pal export`)")
    parser.add_argument("shards", metavar="SHARDS", help="prepared feature set: a folder or a URL")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write figures to this folder")
    add_json(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="only N clips, evenly spaced")
    parser.add_argument(
        "--questions", type=int, default=200, metavar="N", help="measure the attention of N answers (default: 200)"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="questions per batch (default: 64)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="maximum new tokens per answer (default: 64)"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder for local copies of remote sets")
    return parser


def attention_mass(
    responder: Responder, features: FeatureSet, clips: Sequence[int], questions: int
) -> list[dict[str, Any]]:
    """Returns what the positions that predict the reference answers attend to, layer by layer.

    Args:
        questions: number of questions, evenly spaced over those about `clips`.

    Returns:
        for each layer `{layer, text, lal, plits, by_head, by_domain}`: shares of attention that sum to 1; `by_head`
        lists the three shares of each head, `by_domain` holds them by domain.

    Raises:
        UserError: a model with flamingo streams.
    """
    import numpy as np

    from pipeline.evaluation.question_sets import evenly_spaced
    from pipeline.model import PATHWAYS

    candidates = np.flatnonzero(np.isin(features.table.clip, np.asarray(clips)))
    chosen = candidates[evenly_spaced(len(candidates), questions)]
    masses: dict[str, list[NDArray[np.float32]]] = {}
    for index in chosen.tolist():
        clip, question, attention = _probe_question(responder, features, index)
        masses.setdefault(clip.domain_of(question), []).append(attention.mass.numpy())
    overall = np.mean([mass for domain_masses in masses.values() for mass in domain_masses], axis=0)
    by_domain = {domain: np.mean(masses[domain], axis=(0, 2)) for domain in sorted(masses)}

    def named(shares: NDArray[np.float32]) -> dict[str, float]:
        return dict(zip(PATHWAYS, shares.tolist(), strict=True))

    return [
        {
            "layer": layer,
            **named(heads.mean(0)),
            "by_head": [named(head) for head in heads],
            "by_domain": {domain: named(mass[layer]) for domain, mass in by_domain.items()},
        }
        for layer, heads in enumerate(overall)
    ]


def score_without_pathways(
    responder: Responder, features: FeatureSet, clips: Sequence[int], batch_size: int
) -> dict[str, Any]:
    """Scores the model with every combination of pathways hidden at inference, and without any audio.

    Where all pathways are hidden, the audio's positions remain: the question is as far from the text before the audio
    as in training. Without audio there are neither placeholders nor such a gap, as in training on text alone.

    Returns:
        hidden pathways (`none`, `lal`, `plits`, `lal+plits`, ...), then `plain` -> scores of `scoring.score`, with
        `condition`, what the model attends to.
    """
    from pipeline.evaluation.generate_answers import generate_answers, group_clips
    from pipeline.evaluation.question_sets import make_predictions
    from pipeline.evaluation.scoring import score

    kinds = sorted({spec.integration for spec in responder.model.specs})
    groups = group_clips(features.table, {clip: clip for clip in clips}, batch_size)
    without_audio = [replace(group, audio=None) for group in groups]
    conditions: list[tuple[str, Sequence[IntegrationKind], Sequence[ClipGroup]]] = [
        ("+".join(hidden) or NOTHING, hidden, groups)
        for hidden in chain.from_iterable(combinations(kinds, count) for count in range(len(kinds) + 1))
    ]
    results = {}
    for name, hidden, condition_groups in [*conditions, (PLAIN, (), without_audio)]:
        answers: dict[int, Reply] = {}
        for group_answers in generate_answers(responder, features, condition_groups, batch_size, hidden=hidden):
            answers |= group_answers
        condition = _describe_condition(hidden, kinds, plain=name == PLAIN)
        results[name] = {"condition": condition, **score(make_predictions(features, answers))}
    return results


def _describe_condition(
    hidden: Sequence[IntegrationKind], kinds: Sequence[IntegrationKind], *, plain: bool = False
) -> str:
    """Returns what the model attends to in a row of `masking`, in words."""
    if plain:
        return "text alone: no audio, no gap"
    if not hidden:
        return "text and audio"
    if len(hidden) < len(kinds):
        return f"without {' and '.join(hidden)}"
    return "audio hidden, its positions kept (gap)"


def _probe_question(responder: Responder, features: FeatureSet, index: int) -> tuple[Clip, Question, AttentionMass]:
    """Returns a question with its clip, and the attention of its reference answer."""
    from pipeline.evaluation.question_sets import ClipNumbers, features_of

    clip_index = int(features.table.clip[index])
    clip = features.clip(clip_index)
    question = clip.questions[features.table.number[index]]
    arrays = features_of(features, ClipNumbers(features).of_question(clip_index, question))
    return clip, question, responder.attention_mass(arrays, question)


def _print_tables(results: dict[str, Any]) -> None:
    print("attention of the positions that predict an answer, % of each layer")
    kinds = ("text", "lal", "plits")
    mass = [[str(row["layer"]), *(f"{row[kind]:.1%}" for kind in kinds)] for row in results["attention_mass"]]
    print(format_table([["layer", *kinds], *mass], right=True))
    scores = results["masking"]
    domains = list(scores[NOTHING]["by_domain"])
    accuracies = [
        [
            row["condition"],
            hidden,
            *(f"{group['accuracy']:.1%}" for group in (row, *(row["by_domain"][domain] for domain in domains))),
        ]
        for hidden, row in scores.items()
    ]
    headings = ["the model attends to", "hidden", "all", *domains]
    print(f"\naccuracy\n{format_table([headings, *accuracies], right=True)}")
    print(GAP_NOTE)


def _draw(
    results: dict[str, Any],
    responder: Responder,
    features: FeatureSet,
    clips: Sequence[int],
    arguments: argparse.Namespace,
) -> None:
    """Writes the pictures of attention by layer and head, of accuracy with pathways hidden, and of one clip per
    domain."""
    from pipeline import plots

    name, out = arguments.model.resolve().parent.name, arguments.out
    mass = results["attention_mass"]
    kinds = [kind for kind in ("lal", "plits") if any(row[kind] for row in mass)]
    plots.plot_attention_by_layer(mass, f"Attention by layer: {name}").savefig(out / "attention_by_layer.png")
    heads = {kind: [[head[kind] for head in row["by_head"]] for row in mass] for kind in kinds}
    plots.plot_attention_by_head(heads, f"Attention to audio by head: {name}").savefig(out / "attention_by_head.png")
    accuracies = [
        plots.DomainAccuracy(
            row["condition"],
            {domain: (group["accuracy"], *group["ci95"]) for domain, group in row["by_domain"].items()},
            {},
        )
        for row in results["masking"].values()
    ]
    title = f"Accuracy with audio hidden or left out: {name}"
    plots.plot_accuracy_by_domain(accuracies, {}, title).savefig(out / "masking.png")
    _draw_clips(responder, features, clips, arguments)


def _draw_clips(
    responder: Responder, features: FeatureSet, clips: Sequence[int], arguments: argparse.Namespace
) -> None:
    """Draws attention over time on the spectrogram of one clip per domain, if the set holds log-mel features."""
    import numpy as np

    from pipeline import plots
    from pipeline.evaluation.question_sets import open_feature_set

    log_mels = [column for column, contract in features.contract.encoders.items() if contract.kind == "log_mel"]
    if not log_mels:
        logger.info("no picture of a clip: the set holds no log_mel features; `pal ask --picture` draws any audio file")
        return
    spectrograms = open_feature_set(arguments.shards, log_mels[:1], arguments.cache)
    contract = features.contract.encoders[log_mels[0]]
    domains: set[str] = set()
    for index in clips:
        clip = features.clip(index)
        if clip.domain in domains or not clip.questions:
            continue
        domains.add(clip.domain)
        frames = spectrograms.features(index, clip.clip_id)[log_mels[0]].astype(np.float32)
        spectrogram = frames.reshape(-1, contract.options["num_mels"])
        question = clip.questions[-1]
        if question.clips:
            continue
        attention = responder.attention_mass([features.features(index, clip.clip_id)], question)
        title = f"{clip.clip_id}: {question.question} {question.answer}"
        highest_hz = contract.sample_rate_hz / 2
        figure = plots.plot_attention_over_time(
            spectrogram, clip.duration_s, highest_hz, responder.attention_over_time(attention), title
        )
        figure.savefig(arguments.out / f"attention_over_time_{clip.domain}.png")


if __name__ == "__main__":
    sys.exit(run_command(main))
