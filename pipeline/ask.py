"""`pal ask MODEL CLIP "question" ...`: a person asks a trained model about an audio file, which it hears once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, get_args

from pipeline.errors import run_command
from pipeline.features import read_encoders
from pipeline.options import add_encoder_option
from pipeline.streams import IntegrationKind

if TYPE_CHECKING:  # torch takes seconds to import, which `--help` must not
    from pipeline.inference.answering import Answerer, Features
    from pipeline.model import Prefix


@dataclass(frozen=True)
class Answer:
    """What was answered to one question, and how fast: until the first token, and after it."""

    question: str
    answer: str
    tokens: int
    first_token_s: float
    tokens_per_s: float | None


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)  # questions before, between or after options
    from pipeline.inference.answering import load_answerer, load_config_of

    config, model = load_config_of(arguments.model)
    contracts = read_encoders(arguments.model, model.feature_fingerprints, config.data.train)

    from pipeline.inference.hearing import Ears

    answerer = load_answerer(arguments.model, arguments.max_new_tokens)
    ears = Ears(contracts, dict(arguments.encoder), answerer.model.device.type)
    start = time.perf_counter()
    sound = ears.hear(arguments.clip)
    encoded = time.perf_counter()
    prefix = answerer.hear([sound.features], arguments.hide)
    heard = time.perf_counter()
    cache_mib = prefix.nbytes / 2**20
    figures_of_hearing = f"{sound.duration_s:.1f} s of audio heard in {heard - start:.2f} s, {cache_mib:.1f} MiB kept"
    print(f"{arguments.clip}: {figures_of_hearing}", file=sys.stderr)
    answers = []
    for question in arguments.question or _typed_questions():
        answers.append(ask_aloud(answerer, prefix, question, lambda text: print(text, end="", flush=True)))
        print()
    if arguments.picture:
        _draw(answerer, sound.features, arguments.clip, answers, sound.duration_s, arguments.picture)
    if arguments.json:
        rates = [answer.tokens_per_s for answer in answers if answer.tokens_per_s is not None]
        figures = {
            "answers": [asdict(answer) for answer in answers],
            "audio_s": sound.duration_s,
            "audio_cache_mib": cache_mib,
            "audio_encode_s": encoded - start,
            "audio_prefill_s": heard - encoded,
            "first_token_s": mean(answer.first_token_s for answer in answers) if answers else None,
            "tokens_per_s": mean(rates) if rates else None,
        }
        arguments.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal ask", description="Answer questions about an audio file; without a question, those typed (or piped)."
    )
    parser.add_argument("model", type=Path, help="exported folder (`pal export`)")
    parser.add_argument("clip", type=Path, help="audio file: WAV, FLAC, MP3, OGG")
    parser.add_argument("question", nargs="*")
    parser.add_argument(
        "--hide", action="append", default=[], choices=get_args(IntegrationKind), help="audio tokens that stay unheard"
    )
    add_encoder_option(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw where in the clip each answer's tokens look (of several: FILE-1, ...)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write answers and figures here")
    return parser


def ask_aloud(answerer: Answerer, prefix: Prefix, question: str, write: Callable[[str], None]) -> Answer:
    """Answers one question about the first clip of `prefix`; `write` is given the text as it comes.

    Raises:
        UserError: a question that is too long, or holds the placeholder.
    """
    from pipeline.inference.answering import Words

    words = Words(answerer.chat, write)
    start = time.perf_counter()
    (answer,) = answerer.answer(prefix, [question], [0], streamer=words)
    first, last, tokens = words.times_s[0], words.times_s[-1], len(words.times_s)
    return Answer(question, answer, tokens, first - start, (tokens - 1) / (last - first) if tokens > 1 else None)


def _draw(
    answerer: Answerer, features: Features, clip: Path, answers: Sequence[Answer], duration_s: float, file: Path
) -> None:
    from pipeline.inference.hearing import spectrogram
    from pipeline.plots import plot_listening

    background = spectrogram(clip)
    for number, given in enumerate(answers, start=1):
        moments = answerer.moments(answerer.look(features, given.question, given.answer))
        figure = plot_listening(background, duration_s, moments, f"{given.question} {given.answer}")
        figure.savefig(file if len(answers) == 1 else file.with_stem(f"{file.stem}-{number}"))


def _typed_questions() -> Iterator[str]:
    """Lines from the keyboard (or a pipe), until their end."""
    at_keyboard = sys.stdin.isatty()
    while True:
        if at_keyboard:
            print("\nquestion (Ctrl-D ends)> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    sys.exit(run_command(main))
