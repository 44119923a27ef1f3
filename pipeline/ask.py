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
from typing import TYPE_CHECKING, Any, get_args

from pipeline.errors import UserError, run_command
from pipeline.features import read_encoders
from pipeline.options import add_encoder_option, require_positive
from pipeline.streams import IntegrationKind

if TYPE_CHECKING:  # torch takes seconds to import, which `--help` must not
    from pipeline.inference.answering import Answerer, Features
    from pipeline.inference.hearing import Ears
    from pipeline.model import Prefix

STANDARD_INPUT = "-"


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
    live = str(arguments.clip) == STANDARD_INPUT
    _check(arguments, live)
    from pipeline.inference.answering import load_answerer, load_config_of

    config, model = load_config_of(arguments.model)
    contracts = read_encoders(arguments.model, model.feature_fingerprints, config.data.train)

    from pipeline.inference.hearing import Ears

    answerer = load_answerer(arguments.model, arguments.max_new_tokens)
    ears = Ears(contracts, dict(arguments.encoder), answerer.model.device.type)
    if live:
        return _ask_meanwhile(answerer, ears, arguments)
    start = time.perf_counter()
    sound = ears.hear(arguments.clip)
    encoded = time.perf_counter()
    prefix = answerer.hear([sound.features], arguments.hide)
    heard = time.perf_counter()
    cache_mib = prefix.nbytes / 2**20
    figures_of_hearing = f"{sound.duration_s:.1f} s of audio heard in {heard - start:.2f} s, {cache_mib:.1f} MiB kept"
    print(f"{arguments.clip}: {figures_of_hearing}", file=sys.stderr)
    made_for = answerer.model.config.language_model.max_position_embeddings
    if (positions := int(prefix.next_position)) > made_for:
        print(f"pal: {positions} positions, the language model was made for {made_for}", file=sys.stderr)
    answers = []
    for question in arguments.question or _typed_questions():
        answers.append(ask_aloud(answerer, prefix, question, _print_on))
        print()
    if arguments.picture:
        _draw(answerer, sound.features, arguments.clip, answers, sound.duration_s, arguments.picture)
    if arguments.json:
        figures = {
            "answers": [asdict(answer) for answer in answers],
            "audio_s": sound.duration_s,
            "audio_cache_mib": cache_mib,
            "audio_encode_s": encoded - start,
            "audio_prefill_s": heard - encoded,
        }
        _write_figures(arguments.json, figures, answers)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal ask",
        description="Answer questions about an audio file; without a question, those typed (or piped). "
        "Of a WAV that arrives on standard input (`-`) the newest part is kept, and the questions are asked again and "
        "again: ffmpeg -i SOURCE -c:a pcm_s16le -f wav - | pal ask MODEL - QUESTION",
    )
    parser.add_argument("model", type=Path, help="exported folder (`pal export`)")
    parser.add_argument("clip", type=Path, help="audio file: WAV, FLAC, MP3, OGG; or - for a WAV that arrives")
    parser.add_argument("question", nargs="*")
    parser.add_argument(
        "--hide", action="append", default=[], choices=get_args(IntegrationKind), help="audio tokens that stay unheard"
    )
    add_encoder_option(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--every-s", type=float, metavar="S", help="of -: seconds between the questions (default: 60)")
    parser.add_argument(
        "--keep-s",
        type=float,
        metavar="S",
        help="of -: newest seconds that are kept, at least one window (default: 600)",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw where in the clip each answer's tokens look (of several: FILE-1, ...)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write answers and figures here")
    return parser


def _check(arguments: argparse.Namespace, live: bool) -> None:
    """Refuses settings that mean nothing here, and fills in defaults."""
    if live and not arguments.question:
        raise UserError("QUESTION", "is absent", "questions cannot be typed while audio arrives on standard input")
    if live and arguments.picture:
        raise UserError("--picture", "cannot be drawn of audio that still arrives", "leave it out")
    for name, default in (("every_s", 60.0), ("keep_s", 600.0)):
        value = getattr(arguments, name)
        if value is not None and not live:
            raise UserError(f"--{name.replace('_', '-')}", "is for audio that still arrives", "give - as the clip")
        setattr(arguments, name, default if value is None else value)
    require_positive(arguments, "every_s", "keep_s", "max_new_tokens")


def _ask_meanwhile(answerer: Answerer, ears: Ears, arguments: argparse.Namespace) -> int:
    """Asks all questions again and again about the newest part of the audio on standard input."""
    from pipeline.inference.listening import keep_newest, listen

    live = keep_newest(answerer, ears, arguments.keep_s)
    given, kept, answers = [], 0, []
    for heard_s in listen(live, ears, sys.stdin.buffer, arguments.every_s):
        prefix = answerer.hear_live(live, arguments.hide)
        kept = max(kept, live.nbytes)
        for question in arguments.question:
            print(f"[{heard_s:.0f} s] ", end="")
            answers.append(ask_aloud(answerer, prefix, question, _print_on))
            given.append({"heard_s": heard_s, **asdict(answers[-1])})
            print()
        del prefix  # or it would stay while more audio comes
    print(f"{heard_s:.1f} s of audio heard, at most {kept / 2**20:.1f} MiB kept", file=sys.stderr)
    if arguments.json:
        figures = {"answers": given, "audio_s": heard_s, "audio_cache_mib": kept / 2**20}
        _write_figures(arguments.json, figures, answers)
    return 0


def _print_on(text: str) -> None:
    print(text, end="", flush=True)


def _write_figures(file: Path, figures: dict[str, Any], answers: Sequence[Answer]) -> None:
    rates = [answer.tokens_per_s for answer in answers if answer.tokens_per_s is not None]
    figures["first_token_s"] = mean(answer.first_token_s for answer in answers) if answers else None
    figures["tokens_per_s"] = mean(rates) if rates else None
    file.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
