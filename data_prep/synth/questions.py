"""Words the questions. Every task has several wordings, so that the text of a question does not predict the answer."""

from __future__ import annotations

import numpy as np

from data_prep.synth.plan import Fact

QUESTIONS_PER_CLIP = 6

WORDINGS: dict[str, tuple[str, ...]] = {
    "sound.what": ("What sound is this?", "Which sound do you hear?", "Name the sound in this clip."),
    "sound.count": (
        "How many different sounds are there?",
        "How many sounds do you hear?",
        "Count the sounds in this clip.",
    ),
    "sound.first": ("Which sound comes first?", "What is the first sound?", "What do you hear at the start?"),
    "sound.last": ("Which sound comes last?", "What is the last sound?", "What do you hear at the end?"),
    "sound.direction": (
        "Is the whistle rising, falling or steady?",
        "How does the pitch of the whistle move?",
        "What does the whistle do: rising, falling or steady?",
    ),
    "sound.loudest": ("Which sound is the loudest?", "What is the loudest sound?", "Name the loudest sound."),
    "sound.longest": (
        "Which sound is the longest?",
        "What is the longest sound?",
        "Name the sound that lasts longest.",
    ),
    "music.what": ("Which instrument plays?", "What instrument is this?", "Name the instrument."),
    "music.first": ("Which instrument begins?", "Which instrument plays first?", "What instrument starts the melody?"),
    "music.last": ("Which instrument ends?", "Which instrument plays last?", "What instrument finishes the melody?"),
    "music.count": ("How many notes are played?", "How many notes does the melody have?", "Count the notes."),
    "music.contour": (
        "What is the shape of the melody?",
        "How does the melody move?",
        "Describe the contour of the melody.",
    ),
    "music.tempo": ("What is the tempo?", "Is the tempo slow, medium or fast?", "How fast is the melody?"),
    "music.highest": (
        "Where is the highest note: first, middle or last?",
        "Which note is the highest?",
        "Is the highest note first, in the middle or last?",
    ),
    "speech.transcribe": ("What is said?", "Transcribe the speech.", "Write down the syllables.", "What do they say?"),
    "speech.count": ("How many syllables are spoken?", "Count the syllables.", "How many syllables do you hear?"),
    "speech.first": ("What is the first syllable?", "Which syllable comes first?", "Which syllable is spoken first?"),
    "speech.last": ("What is the last syllable?", "Which syllable comes last?", "Which syllable is spoken last?"),
    "speech.speaker": ("Who is speaking?", "Is it a man, a woman or a child?", "Whose voice is this?"),
    "speech.longest": ("Which vowel is the longest?", "What is the longest vowel?", "Which vowel is drawn out?"),
}


def word_questions(clip_id: str, facts: list[Fact], rng: np.random.Generator) -> list[dict[str, str]]:
    """Returns manifest entries for up to `QUESTIONS_PER_CLIP` facts, in random order, each in a random wording."""
    return [
        {
            "question_id": f"{clip_id}-{number}",
            "question": str(rng.choice(WORDINGS[facts[index].task])),
            "answer": facts[index].answer,
            "task": facts[index].task,
        }
        for number, index in enumerate(rng.permutation(len(facts))[:QUESTIONS_PER_CLIP])
    ]
