"""`pal probe MODEL SHARDS`: what a trained model listens to. Attention by layer, head and moment; scores with a pathway
hidden (arXiv 2506.10423 v3, figure 5, tables 5 and 6)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.arguments import require_positive
from pipeline.core.console import format_table
from pipeline.core.errors import run_command
from pipeline.core.feature_contract import require_same_features
from pipeline.evaluation.scoring import score

if TYPE_CHECKING:  # torch and streaming take seconds to import, which `--help` must not
    from pipeline.data.feature_set import Clip, FeatureSet
    from pipeline.inference.responder import Responder
    from pipeline.model import AttentionMass

NOTHING = "none"


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    require_positive(arguments, "limit", "questions", "batch_size")

    from pipeline.evaluation.generate_answers import evenly_spaced, open_set
    from pipeline.inference.responder import load_responder

    responder = load_responder(arguments.model, arguments.max_new_tokens)
    features = open_set(arguments.shards, list(responder.feature_fingerprints), arguments.cache)
    require_same_features(responder.feature_fingerprints, features.contract, arguments.shards, str(arguments.model))
    clips = evenly_spaced(len(features), arguments.limit)
    figures = {
        "attention_mass": attention_mass(responder, features, clips, arguments.questions),
        "masking": masking(responder, features, clips, arguments.batch_size),
    }
    _print_tables(figures)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        _draw(figures, responder, features, clips, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal probe", description="Attention by layer and pathway, and scores with a pathway hidden."
    )
    parser.add_argument("model", type=Path, help="exported folder (`pal export`)")
    parser.add_argument("shards", metavar="SHARDS", help="prepared feature set: a folder or a URL")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the pictures here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--limit", type=int, metavar="N", help="only N clips, evenly_spaced evenly")
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="watch so many answers (default: 200)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="questions at a time (default: 64)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder for local copies of far sets")
    return parser


def attention_mass(
    responder: Responder, features: FeatureSet, clips: Sequence[int], questions: int
) -> list[dict[str, Any]]:
    """Where the tokens look that predict the right answers, layer by layer.

    Returns:
        for each layer `{layer, text, lal, plits, by_head, by_domain}`: shares that sum to 1; `by_head` lists the three
        of each head, `by_domain` holds them by domain.

    Raises:
        UserError: a model with flamingo streams.
    """
    from pipeline.evaluation.generate_answers import evenly_spaced
    from pipeline.model import KINDS

    wanted = np.flatnonzero(np.isin(features.table.clip, np.asarray(clips)))
    chosen = wanted[evenly_spaced(len(wanted), questions)]
    masses: dict[str, list[NDArray[np.float32]]] = {}
    for question in chosen.tolist():
        clip, look = _look(responder, features, question)
        masses.setdefault(clip.domain, []).append(look.mass.numpy())
    everything = np.mean([mass for of_domain in masses.values() for mass in of_domain], axis=0)
    by_domain = {domain: np.mean(masses[domain], axis=(0, 2)) for domain in sorted(masses)}

    def named(shares: NDArray[np.float32]) -> dict[str, float]:
        return dict(zip(KINDS, shares.tolist(), strict=True))

    return [
        {
            "layer": layer,
            **named(heads.mean(0)),
            "by_head": [named(head) for head in heads],
            "by_domain": {domain: named(mass[layer]) for domain, mass in by_domain.items()},
        }
        for layer, heads in enumerate(everything)
    ]


def masking(responder: Responder, features: FeatureSet, clips: Sequence[int], batch_size: int) -> dict[str, Any]:
    """Scores with each pathway hidden at inference, and with all of them: what the language model says by itself.

    Returns:
        hidden pathways (`none`, `lal`, `plits`, `lal+plits`, ...) -> as `scoring.score`.
    """
    from pipeline.evaluation.generate_answers import generate_answers, predictions_of

    kinds = sorted({spec.integration for spec in responder.model.specs})
    heard = {clip: clip for clip in clips}
    results = {}
    for hidden in chain.from_iterable(combinations(kinds, count) for count in range(len(kinds) + 1)):
        groups = generate_answers(responder, features, heard, batch_size, hidden=hidden)
        answers = {question: answer for group in groups for question, answer in group.items()}
        results["+".join(hidden) or NOTHING] = score(predictions_of(features, answers))
    return results


def _look(responder: Responder, features: FeatureSet, question: int) -> tuple[Clip, AttentionMass]:
    number = int(features.table.clip[question])
    clip = features.clip(number)
    asked = clip.questions[features.table.number[question]]
    return clip, responder.attention_mass(features.features(number, clip.clip_id), asked.question, asked.answer)


def _print_tables(figures: dict[str, Any]) -> None:
    print("attention of the tokens that predict an answer, % of each layer")
    kinds = ("text", "lal", "plits")
    mass = [[str(row["layer"]), *(f"{row[kind]:.1%}" for kind in kinds)] for row in figures["attention_mass"]]
    print(format_table([["layer", *kinds], *mass], right=True))
    scores = figures["masking"]
    domains = list(scores[NOTHING]["by_domain"])
    accuracies = [
        [hidden, *(f"{group['accuracy']:.1%}" for group in (row, *(row["by_domain"][domain] for domain in domains)))]
        for hidden, row in scores.items()
    ]
    print(f"\naccuracy\n{format_table([['hidden', 'all', *domains], *accuracies], right=True)}")


def _draw(
    figures: dict[str, Any],
    responder: Responder,
    features: FeatureSet,
    clips: Sequence[int],
    arguments: argparse.Namespace,
) -> None:
    from pipeline import plots
    from pipeline.evaluation.generate_answers import open_set

    name, out = arguments.model.resolve().parent.name, arguments.out
    mass = figures["attention_mass"]
    kinds = [kind for kind in ("lal", "plits") if any(row[kind] for row in mass)]
    plots.plot_attention_by_layer(mass, f"What {name} attends to").savefig(out / "attention_by_layer.png")
    heads = {kind: [[head[kind] for head in row["by_head"]] for row in mass] for kind in kinds}
    plots.plot_attention_by_head(heads, f"Audio in the attention of {name}").savefig(out / "attention_by_head.png")
    bars = [
        plots.Bars(
            f"{'nothing' if label == NOTHING else label.upper()} hidden",
            {domain: (group["accuracy"], *group["ci95"]) for domain, group in row["by_domain"].items()},
            {},
        )
        for label, row in figures["masking"].items()
    ]
    plots.plot_accuracy_by_domain(bars, {}, f"{name} with audio hidden").savefig(out / "masking.png")

    mel = [column for column, contract in features.contract.encoders.items() if contract.kind == "log_mel"]
    if not mel:
        print("pal: no picture of a clip: the set holds no log_mel features; `pal ask --picture` draws one of any file")
        return
    pictures = open_set(arguments.shards, mel[:1], arguments.cache)
    contract = features.contract.encoders[mel[0]]
    drawn: set[str] = set()
    for number in clips:
        clip = features.clip(number)
        if clip.domain in drawn or not clip.questions:
            continue
        drawn.add(clip.domain)
        frames = pictures.features(number, clip.clip_id)[mel[0]].astype(np.float32)
        spectrogram = frames.reshape(-1, contract.options["num_mels"])
        asked = clip.questions[-1]
        look = responder.attention_mass(features.features(number, clip.clip_id), asked.question, asked.answer)
        title = f"{clip.clip_id}: {asked.question} {asked.answer}"
        highest_hz = contract.sample_rate_hz / 2
        figure = plots.plot_listening(spectrogram, clip.duration_s, highest_hz, responder.moments(look), title)
        figure.savefig(out / f"listening_{clip.domain}.png")


if __name__ == "__main__":
    sys.exit(run_command(main))
