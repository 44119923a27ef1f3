"""Words what a clip sounds like, and questions about it, from its plan. From such text a language model learns to read
before it encodes any audio: every answer of a clip follows from its description.

Held-out descriptions and questions have wordings of their own, made of the words of the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.synth.music import MusicPlan
from data_prep.synth.plan import Plan
from data_prep.synth.questions import WORDINGS
from data_prep.synth.sounds import SoundPlan
from data_prep.synth.speech import SpeechPlan

# Of a domain: the wordings for training, and those for held-out descriptions.
DESCRIPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sound": (
        (
            "You hear {items}.",
            "The sounds are {items}.",
            "There is {items}.",
            "In this clip: {items}.",
            "The clip is {items}.",
        ),
        ("In this clip you hear {items}.", "The sounds you hear: {items}."),
    ),
    "music": (
        (
            "A {tempo} melody of {count} notes, {contour}. It plays {items}.",
            "You hear {count} {tempo} notes, {items}. The shape is {contour}.",
            "It plays {items}. The tempo is {tempo}, the shape is {contour}, with {count} notes.",
            "The melody is {contour}. It has {count} notes, and plays {items}. It is {tempo}.",
            "The instrument is {items}. A {contour} melody, {tempo}, {count} notes.",
        ),
        (
            "You hear {items}. The melody is {tempo} and {contour}. It has {count} notes.",
            "A melody of {count} notes: {items}. The shape is {contour}, the tempo is {tempo}.",
        ),
    ),
    "speech": (
        (
            "A {speaker} says {items}. The {vowel} is long.",
            "You hear a {speaker}, with a long {vowel}: {items}.",
            "They say {items}. It is said by a {speaker}, and the {vowel} is long.",
            "The {speaker} is speaking: {items}. There is a long {vowel}.",
            "The long vowel is {vowel}. The voice is a {speaker}. You hear {items}.",
        ),
        (
            "The voice is a {speaker}: {items}. The long vowel is {vowel}.",
            "You hear {items}. It is said by a {speaker}, with a long {vowel}.",
        ),
    ),
}
MORE_QUESTIONS: dict[str, tuple[str, ...]] = {  # beside those about audio
    "sound.what": ("What do you hear?", "Which sound is in the clip?"),
    "sound.count": ("What is the number of sounds?", "How many sounds are in the clip?"),
    "sound.first": ("Name the first sound.", "Which is the first sound?"),
    "sound.last": ("Name the last sound.", "Which is the last sound?"),
    "sound.direction": ("Describe the whistle.", "How does the whistle move?"),
    "sound.loudest": ("What sound is loudest?", "Which is loud?"),
    "sound.longest": ("What sound is longest?", "Which is long?"),
    "music.what": ("What plays the melody?", "Which is the instrument?"),
    "music.first": ("Name the first instrument.", "Which is the first instrument?"),
    "music.last": ("Name the last instrument.", "Which is the last instrument?"),
    "music.count": ("How many notes do you hear?", "What is the number of notes?"),
    "music.contour": ("What is the shape?", "What is the contour of the melody?"),
    "music.tempo": ("What is the tempo of the melody?", "Name the tempo."),
    "music.highest": ("Which note of the melody is the highest?", "What is the highest note?"),
    "speech.transcribe": ("Transcribe the syllables.", "Write down the speech."),
    "speech.count": ("What is the number of syllables?", "How many syllables are in the clip?"),
    "speech.first": ("Name the first syllable.", "Which is the first syllable?"),
    "speech.last": ("Name the last syllable.", "Which is the last syllable?"),
    "speech.speaker": ("Who is it: a man, a woman or a child?", "Which voice do you hear?"),
    "speech.longest": ("Name the longest vowel.", "Which vowel is long?"),
}
HELD_OUT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "sound.what": ("Which sound is it?",),
    "sound.count": ("Count the sounds you hear.",),
    "sound.first": ("What is the first sound in this clip?",),
    "sound.last": ("What is the last sound in this clip?",),
    "sound.direction": ("What does the whistle do?",),
    "sound.loudest": ("Which is the loudest sound?",),
    "sound.longest": ("Which is the longest sound?",),
    "music.what": ("Which instrument do you hear?",),
    "music.first": ("What is the first instrument?",),
    "music.last": ("What is the last instrument?",),
    "music.count": ("How many notes are in the melody?",),
    "music.contour": ("Describe the shape of the melody.",),
    "music.tempo": ("How fast is it: slow, medium or fast?",),
    "music.highest": ("Where is the highest note of the melody?",),
    "speech.transcribe": ("Write down the syllables they say.",),
    "speech.count": ("How many syllables are there?",),
    "speech.first": ("What is the first syllable you hear?",),
    "speech.last": ("What is the last syllable you hear?",),
    "speech.speaker": ("Whose voice do you hear?",),
    "speech.longest": ("Which is the longest vowel?",),
}


def describe(plan: Plan, rng: np.random.Generator, *, held_out: bool) -> str:
    """Returns a description from which every answer of the plan follows, in a random wording."""
    domain, values = _values(plan)
    return str(rng.choice(DESCRIPTIONS[domain][held_out])).format(**values)


def word_question(task: str, rng: np.random.Generator, *, held_out: bool) -> str:
    """Returns a question of a task about a description, in a random wording."""
    wordings = HELD_OUT_QUESTIONS[task] if held_out else WORDINGS[task] + MORE_QUESTIONS[task]
    return str(rng.choice(wordings))


def _values(plan: Plan) -> tuple[str, dict[str, str]]:
    """Returns the domain of a plan and what fills the gaps of its wordings."""
    facts = dict(plan.facts())
    if isinstance(plan, SoundPlan):
        return "sound", {"items": _in_order(_sound_items(plan))}
    if isinstance(plan, MusicPlan):
        instruments = [note.instrument for note in plan.notes]
        items = _in_order(instruments[:1] if len(set(instruments)) == 1 else [instruments[0], instruments[-1]])
        values = {"items": items, "tempo": plan.tempo, "contour": plan.contour, "count": facts["music.count"]}
        return "music", values
    assert isinstance(plan, SpeechPlan)
    items = _in_order([syllable.text for syllable in plan.syllables])
    return "speech", {"items": items, "speaker": plan.speaker, "vowel": facts["speech.longest"]}


def _sound_items(plan: SoundPlan) -> list[str]:
    """Returns the events with what sets them apart from the others of the clip."""
    loudest = max(plan.events, key=lambda event: event.level_db)
    longest = max(plan.events, key=lambda event: event.duration_s)
    items = []
    for event in plan.events:
        words = [event.kind, *([event.direction] if event.direction else [])]
        if len(plan.events) > 1:
            words += ["loud"] * (event is loudest) + ["long"] * (event is longest)
        items.append(" ".join(words))
    return items


def _in_order(items: Sequence[str]) -> str:
    """Returns one to three items with the words of their order."""
    words = {1: ["only"], 2: ["first", "last"], 3: ["first", "then", "last"]}[len(items)]
    return ", ".join(f"{word} {item}" for word, item in zip(words, items, strict=True))
