"""Plans clips that are never rendered, and writes their descriptions with questions about them: a corpus of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.synth.corpus import DOMAINS, HELD_OUT, check_size
from data_prep.synth.descriptions import describe, word_question
from data_prep.synth.folder import KIND, finish, read_finished, start, write_lines
from data_prep.synth.plan import deck

REVISION = 3  # raise it with every change that alters the corpus
SYSTEM_PROMPT = "Listen."  # that of the demo, in front of each description
STREAM = 2  # of the random numbers of a seed; those of audio have 0 and 1


@dataclass(frozen=True)
class Description:
    """A described clip: a row of the manifest, except for its origin."""

    clip_id: str
    domain: str
    held_out: bool
    text: str
    questions: list[dict[str, str]]


def plan_text(clips: int, seed: int) -> list[Description]:
    """Plans a corpus of text; no clip of it is in a corpus of audio.

    Held-out descriptions and questions have wordings of their own.

    Raises:
        UserError: see `check_size`.
    """
    check_size(clips, seed)
    rng = np.random.default_rng([seed, STREAM])
    plans = {name: make_plans(rng) for name, make_plans in DOMAINS.items()}
    decks = {name: deck(rng, HELD_OUT) for name in DOMAINS}
    corpus = []
    for index in range(clips):
        domain = list(DOMAINS)[index % len(DOMAINS)]
        clip_id = f"{domain}-text-{index:06d}"
        plan, held_out = next(plans[domain]), next(decks[domain])
        text = f"{SYSTEM_PROMPT}\n{describe(plan, rng, held_out=held_out)}"
        questions = [
            {
                "question_id": f"{clip_id}-{number}",
                "system": text,  # not in the question, so that packed questions about a clip share it
                "question": word_question(fact.task, rng, held_out=held_out),
                "answer": fact.answer,
                "task": fact.task,
            }
            for number, fact in enumerate(plan.facts())
        ]
        corpus.append(Description(clip_id, domain, held_out, text, questions))
    return corpus


def write_text(out: Path, clips: int, seed: int) -> dict[str, Any]:
    """Writes `train.jsonl` and `test.jsonl`, unless the corpus is already finished.

    Returns:
        the content of `synth.json`.

    Raises:
        UserError: `out` holds something else, or a setting is invalid.
    """
    out = out.resolve()
    settings = {KIND: True, "revision": REVISION, "clips": clips, "seed": seed}
    finished = read_finished(out, settings)
    if finished is not None:
        return finished
    corpus = plan_text(clips, seed)
    work_dir = start(out, settings)
    for name, held_out in (("train.jsonl", False), ("test.jsonl", True)):
        write_lines(work_dir / name, [_manifest_row(clip) for clip in corpus if clip.held_out == held_out])
    record = {**settings, **summary_of_text(corpus)}
    finish(work_dir, out, record)
    return record


def summary_of_text(corpus: list[Description]) -> dict[str, Any]:
    """Returns the counts of a planned corpus."""
    return {
        "questions": sum(len(clip.questions) for clip in corpus),
        "train_clips": sum(not clip.held_out for clip in corpus),
        "test_clips": sum(clip.held_out for clip in corpus),
    }


def _manifest_row(clip: Description) -> dict[str, Any]:
    return {"clip_id": clip.clip_id, "dataset": "synth_text", "domain": clip.domain, "questions": clip.questions}
