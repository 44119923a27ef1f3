"""`pal ask MODEL CLIP "question" ...`: a person asks a trained model about an audio file, which it hears once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, get_args

from pipeline.core.arguments import add_encoder_option, require_positive
from pipeline.core.errors import UserError, run_command
from pipeline.core.feature_contract import read_encoders
from pipeline.core.streams import IntegrationKind

if TYPE_CHECKING:  # torch takes seconds to import, which `--help` must not
    from pipeline.inference.encode_audio import AudioEncoders
    from pipeline.inference.responder import Answer, Features, Responder

STANDARD_INPUT = "-"


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)  # questions before, between or after options
    _check(arguments)
    if arguments.web:
        from pipeline.inference.web import serve  # first of all: it tells when its library is not installed

    from pipeline.inference.responder import load_config_of, load_responder

    config, model = load_config_of(arguments.model)
    contracts = read_encoders(arguments.model, model.feature_fingerprints, config.data.train)

    from pipeline.inference.encode_audio import AudioEncoders

    responder = load_responder(arguments.model, arguments.max_new_tokens)
    audio_encoders = AudioEncoders(contracts, dict(arguments.encoder), responder.model.device.type)
    if arguments.web:
        serve(responder, audio_encoders, str(arguments.model), *arguments.address)
    elif str(arguments.clip) == STANDARD_INPUT:
        _ask_meanwhile(responder, audio_encoders, arguments)
    else:
        _ask_about_file(responder, audio_encoders, arguments)
    return 0


def _ask_about_file(responder: Responder, audio_encoders: AudioEncoders, arguments: argparse.Namespace) -> None:
    """Hears the clip, asks the questions given or typed, draws and writes what is wanted."""
    start = time.perf_counter()
    sound = audio_encoders.encode(arguments.clip)
    encoded = time.perf_counter()
    prefix = responder.prefill([sound.features], arguments.hide)
    heard = time.perf_counter()
    cache_mib = prefix.nbytes / 2**20
    figures_of_hearing = f"{sound.duration_s:.1f} s of audio heard in {heard - start:.2f} s, {cache_mib:.1f} MiB kept"
    print(f"{arguments.clip}: {figures_of_hearing}", file=sys.stderr)
    made_for = responder.model.config.language_model.max_position_embeddings
    if (positions := int(prefix.next_position)) > made_for:
        print(f"pal: {positions} positions, the language model was made for {made_for}", file=sys.stderr)
    answers = []
    for question in arguments.question or _typed_questions():
        answers.append(responder.answer_aloud(prefix, question, _print_on))
        print()
    if arguments.picture:
        _draw(responder, sound.features, arguments.clip, answers, sound.duration_s, arguments.picture)
    if arguments.json:
        figures = {
            "answers": [asdict(answer) for answer in answers],
            "audio_s": sound.duration_s,
            "audio_cache_mib": cache_mib,
            "audio_encode_s": encoded - start,
            "audio_prefill_s": heard - encoded,
        }
        _write_figures(arguments.json, figures, answers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal ask",
        description="Answer questions about an audio file; without a question, those typed (or piped). "
        "Of a WAV that arrives on standard input (`-`) the newest part is kept, and the questions are asked again and "
        "again: ffmpeg -i SOURCE -c:a pcm_s16le -f wav - | pal ask MODEL - QUESTION",
    )
    parser.add_argument("model", type=Path, help="exported folder (`pal export`)")
    parser.add_argument(
        "clip", type=Path, nargs="?", help="audio file: WAV, FLAC, MP3, OGG; or - for a WAV that arrives"
    )
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
    parser.add_argument("--web", action="store_true", help="ask on a web page, where clips are dropped or recorded")
    parser.add_argument(
        "--address",
        type=_address,
        metavar="HOST:PORT",
        help="of --web (default: 127.0.0.1:7860, which this machine alone can reach)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write answers and figures here")
    return parser


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError("--address", f"'{text}' is not HOST:PORT", "give, for example, 127.0.0.1:7860")
    return host, int(port)


def _check(arguments: argparse.Namespace) -> None:
    """Refuses settings that mean nothing here, and fills in defaults."""
    live = str(arguments.clip) == STANDARD_INPUT
    if arguments.web:
        for name in ("clip", "hide", "picture", "json"):
            if getattr(arguments, name):
                where = "CLIP" if name == "clip" else f"--{name}"
                raise UserError(where, "has no effect on --web", "leave it out: the page asks for it")
    elif arguments.clip is None:
        raise UserError("CLIP", "is absent", "give an audio file, - for standard input, or --web for a page")
    if live and not arguments.question:
        raise UserError("QUESTION", "is absent", "questions cannot be typed while audio arrives on standard input")
    if live and arguments.picture:
        raise UserError("--picture", "cannot be drawn of audio that still arrives", "leave it out")
    for name, default, belongs, owner in (
        ("every_s", 60.0, live, "audio that still arrives; give - as the clip"),
        ("keep_s", 600.0, live, "audio that still arrives; give - as the clip"),
        ("address", ("127.0.0.1", 7860), arguments.web, "a page; give --web"),
    ):
        value = getattr(arguments, name)
        if value is not None and not belongs:
            meant_for, remedy = owner.split("; ")
            raise UserError(f"--{name.replace('_', '-')}", f"is for {meant_for}", remedy)
        setattr(arguments, name, default if value is None else value)
    require_positive(arguments, "every_s", "keep_s", "max_new_tokens")


def _ask_meanwhile(responder: Responder, audio_encoders: AudioEncoders, arguments: argparse.Namespace) -> None:
    """Asks all questions again and again about the newest part of the audio on standard input."""
    from pipeline.inference.streaming import keep_newest, listen

    live = keep_newest(responder, audio_encoders, arguments.keep_s)
    given, kept, answers = [], 0, []
    # Not sys.stdin's own buffer: Python aborts when it ends while a thread still reads from that.
    source = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115 (closing it would wait for the thread)
    for heard_s in listen(live, audio_encoders, source, arguments.every_s):
        prefix = responder.prefill_stream(live, arguments.hide)
        kept = max(kept, live.nbytes)
        for question in arguments.question:
            print(f"[{heard_s:.0f} s] ", end="")
            answers.append(responder.answer_aloud(prefix, question, _print_on))
            given.append({"heard_s": heard_s, **asdict(answers[-1])})
            print()
        del prefix  # or it would stay while more audio comes
    print(f"{heard_s:.1f} s of audio heard, at most {kept / 2**20:.1f} MiB kept", file=sys.stderr)
    if arguments.json:
        figures = {"answers": given, "audio_s": heard_s, "audio_cache_mib": kept / 2**20}
        _write_figures(arguments.json, figures, answers)


def _print_on(text: str) -> None:
    print(text, end="", flush=True)


def _write_figures(file: Path, figures: dict[str, Any], answers: Sequence[Answer]) -> None:
    rates = [answer.tokens_per_s for answer in answers if answer.tokens_per_s is not None]
    figures["first_token_s"] = mean(answer.first_token_s for answer in answers) if answers else None
    figures["tokens_per_s"] = mean(rates) if rates else None
    file.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _draw(
    responder: Responder, features: Features, clip: Path, answers: Sequence[Answer], duration_s: float, file: Path
) -> None:
    from pipeline.inference.encode_audio import SPECTROGRAM_HIGHEST_HZ, spectrogram
    from pipeline.plots import plot_listening

    background = spectrogram(clip)
    for number, given in enumerate(answers, start=1):
        moments = responder.moments(responder.attention_mass(features, given.question, given.answer))
        title = f"{given.question} {given.answer}"
        figure = plot_listening(background, duration_s, SPECTROGRAM_HIGHEST_HZ, moments, title)
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
