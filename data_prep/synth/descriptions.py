"""Words what a clip sounds like, and questions about it, from its plan. From such text a language model learns to read
before it encodes any audio: a description states every answer of a clip with a word that names it, in random order.

Held-out descriptions and questions have wordings of their own, made of the words of the others."""

from __future__ import annotations

import numpy as np

from data_prep.synth.plan import Plan
from data_prep.synth.questions import WORDINGS

# How a description begins, and what separates two of its facts.
DESCRIPTIONS: tuple[tuple[str, str], ...] = (
    ("You hear: ", ", "),
    ("You hear ", " and "),
    ("In this clip: ", ", "),
    ("In this clip, ", ". "),
    ("The clip: ", ". "),
    ("There is ", ", and "),
)
HELD_OUT_DESCRIPTIONS: tuple[tuple[str, str], ...] = (("In this clip you hear: ", ", and "), ("The clip is: ", " and "))
NAMES: dict[str, str] = {  # what a description calls the answer of a task
    "sound.what": "sound",
    "sound.count": "number",
    "sound.first": "first",
    "sound.last": "last",
    "sound.direction": "whistle",
    "sound.loudest": "loudest",
    "sound.longest": "longest",
    "music.what": "instrument",
    "music.first": "first",
    "music.last": "last",
    "music.count": "number",
    "music.contour": "shape",
    "music.tempo": "tempo",
    "music.highest": "highest",
    "speech.count": "number",
    "speech.first": "first",
    "speech.last": "last",
    "speech.speaker": "voice",
    "speech.longest": "longest",
}
# Stated as one word (`firstHiss`), which is one token. A small model takes many more steps to learn
# which of several answers stands behind which name.
COMPOUND_TASKS = frozenset(
    {
        "sound.what",
        "sound.first",
        "sound.last",
        "sound.loudest",
        "sound.longest",
        "music.first",
        "music.last",
        "speech.first",
        "speech.last",
        "speech.longest",
    }
)
MORE_QUESTIONS: dict[str, tuple[str, ...]] = {  # beside those about audio
    "sound.what": ("What do you hear?", "Which sound is in the clip?", "What is the sound?"),
    "sound.count": ("How many sounds are in the clip?", "How many sounds are there?", "What is the number of sounds?"),
    "sound.first": ("Which sound is first?", "Which is the first sound?", "Name the first sound."),
    "sound.last": ("Which sound is last?", "Which is the last sound?", "Name the last sound."),
    "sound.direction": ("How does the whistle move?", "What is the whistle?", "Describe the whistle."),
    "sound.loudest": ("What sound is loudest?", "Which is the loudest sound?", "Name the sound that is loudest."),
    "sound.longest": ("What sound is longest?", "Which is the longest sound?", "Name the sound that is longest."),
    "music.what": ("What plays the melody?", "Which instrument is in the clip?", "What is the instrument?"),
    "music.first": ("What instrument is first?", "Which is the first instrument?", "Name the first instrument."),
    "music.last": ("What instrument is last?", "Which is the last instrument?", "Name the last instrument."),
    "music.count": ("How many notes do you hear?", "How many notes are in the clip?", "What is the number of notes?"),
    "music.contour": ("What is the contour of the melody?", "What is the shape?", "Name the shape of the melody."),
    "music.tempo": ("What is the tempo of the melody?", "Is it slow, medium or fast?", "Name the tempo."),
    "music.highest": (
        "Which note of the melody is the highest?",
        "Where is the highest note?",
        "What is the highest note?",
    ),
    "speech.transcribe": ("Transcribe the syllables.", "What do you hear them say?", "What is the speech?"),
    "speech.count": (
        "How many syllables are in the clip?",
        "How many syllables do they say?",
        "What is the number of syllables?",
    ),
    "speech.first": ("Which syllable is first?", "Which is the first syllable?", "Name the first syllable."),
    "speech.last": ("Which syllable is last?", "Which is the last syllable?", "Name the last syllable."),
    "speech.speaker": ("Who is it: a man, a woman or a child?", "Which voice do you hear?", "What is the voice?"),
    "speech.longest": ("What vowel is longest?", "Which is the longest vowel?", "Name the longest vowel."),
}
HELD_OUT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "sound.what": ("Which sound is it?",),
    "sound.count": ("Count the sounds you hear.",),
    "sound.first": ("What is the first sound in this clip?",),
    "sound.last": ("What is the last sound in this clip?",),
    "sound.direction": ("How is the whistle: rising, falling or steady?",),
    "sound.loudest": ("Which sound do you hear the loudest?",),
    "sound.longest": ("Which sound do you hear the longest?",),
    "music.what": ("Which instrument do you hear?",),
    "music.first": ("What is the first instrument you hear?",),
    "music.last": ("What is the last instrument you hear?",),
    "music.count": ("How many notes are in the melody?",),
    "music.contour": ("Which contour does the melody have?",),
    "music.tempo": ("How fast is it: slow, medium or fast?",),
    "music.highest": ("Where is the highest note of the melody?",),
    "speech.transcribe": ("Write down the syllables they say.",),
    "speech.count": ("How many syllables are there?",),
    "speech.first": ("What is the first syllable you hear?",),
    "speech.last": ("What is the last syllable you hear?",),
    "speech.speaker": ("Whose voice do you hear?",),
    "speech.longest": ("Which vowel is the longest vowel?",),
}


def describe(plan: Plan, rng: np.random.Generator, *, held_out: bool) -> str:
    """Returns a description that states every answer of the plan, in random order and a random wording."""
    wordings = HELD_OUT_DESCRIPTIONS if held_out else DESCRIPTIONS
    beginning, separator = wordings[rng.integers(len(wordings))]
    statements = _statements(plan)
    return beginning + separator.join(statements[number] for number in rng.permutation(len(statements))) + "."


def _statements(plan: Plan) -> list[str]:
    """Returns what a description states. Where several facts could be an answer, name and answer form one word."""
    statements = []
    for fact in plan.facts():
        if fact.task == "speech.transcribe":  # its first and its last syllable are facts of their own
            statements += [f"then{syllable.capitalize()}" for syllable in fact.answer.split()[1:-1]]
        elif fact.task in COMPOUND_TASKS:
            statements.append(NAMES[fact.task] + fact.answer.capitalize())
        else:
            statements.append(f"{NAMES[fact.task]} {fact.answer}")
    return statements


def word_question(task: str, rng: np.random.Generator, *, held_out: bool) -> str:
    """Returns a question of a task about a description, in a random wording."""
    wordings = HELD_OUT_QUESTIONS[task] if held_out else WORDINGS[task] + MORE_QUESTIONS[task]
    return str(rng.choice(wordings))
