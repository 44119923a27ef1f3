"""`pal ask MODEL CLIP "question" ...`: answers questions about audio files, which are encoded and prefilled once."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, get_args

from pipeline.core.arguments import add_encoder_option, add_json, require_positive, write_results
from pipeline.core.console import logger
from pipeline.core.errors import UserError, run_command
from pipeline.core.feature_contract import read_encoders
from pipeline.core.streams import IntegrationKind
from pipeline.core.units import MIB

if TYPE_CHECKING:  # torch takes seconds to import, which `--help` must not
    from pipeline.core.feature_contract import Question
    from pipeline.inference.encode_audio import AudioEncoders, EncodedAudio
    from pipeline.inference.responder import Answer, Responder

STANDARD_INPUT = "-"


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)  # questions before, between or after options
    _check(arguments)
    if arguments.web:
        from pipeline.inference.web import serve  # first, because it raises an error where gradio is not installed

    from pipeline.inference.decoding import log_decoding
    from pipeline.inference.responder import load_config_of, load_responder, require_streams

    config, model = load_config_of(arguments.model)
    require_streams(arguments.model, config)
    contracts = read_encoders(arguments.model, model.feature_fingerprints, config.data.train)

    from pipeline.inference.encode_audio import AudioEncoders

    responder = load_responder(arguments.model, arguments.max_new_tokens)
    log_decoding(arguments.max_new_tokens)
    audio_encoders = AudioEncoders(contracts, dict(arguments.encoder), responder.model.device.type)
    if arguments.web:
        serve(responder, audio_encoders, str(arguments.model), *arguments.address)
    elif str(arguments.clip) == STANDARD_INPUT:
        _answer_about_stream(responder, audio_encoders, arguments)
    else:
        _answer_about_file(responder, audio_encoders, arguments)
    return 0


def _answer_about_file(responder: Responder, audio_encoders: AudioEncoders, arguments: argparse.Namespace) -> None:
    """Encodes the clips, answers the given or typed questions, and writes pictures and results on request."""
    from pipeline.inference.dialogue import Dialogue

    start = time.perf_counter()
    files = [arguments.clip, *arguments.more_clips]
    audio = [audio_encoders.encode(file) for file in files]
    encoded = time.perf_counter()
    clips = [clip.features for clip in audio]
    dialogue = Dialogue(responder, clips, arguments.hide, keeps_history=arguments.chat)
    prefix = dialogue.prefill(arguments.question[0] if arguments.question else "")
    prefilled = time.perf_counter()
    cache_mib, audio_s = prefix.nbytes / MIB, sum(clip.duration_s for clip in audio)
    logger.info(
        f"{', '.join(map(str, files))}: {audio_s:.1f} s of audio encoded and prefilled in {prefilled - start:.2f} s; "
        f"the prefix cache takes {cache_mib:.1f} MiB"
    )
    del prefix  # questions that begin otherwise replace it
    answers = []
    for question in arguments.question or _read_questions():
        answer = dialogue.ask(question, _print_text)
        _end_answer(answer, arguments)
        answers.append(answer)
    if arguments.picture:
        _draw(responder, audio[0], dialogue.questions, arguments)
    results = {
        "answers": [asdict(answer) for answer in answers],
        "audio_s": audio_s,
        "audio_cache_mib": cache_mib,
        "audio_encode_s": encoded - start,
        "audio_prefill_s": prefilled - encoded,
    }
    write_results({**results, **_speed(answers)}, arguments.json)


def _answer_about_stream(responder: Responder, audio_encoders: AudioEncoders, arguments: argparse.Namespace) -> None:
    """Answers all questions repeatedly, about the newest audio from standard input."""
    from pipeline.inference.streaming import create_streaming_audio, receive_audio

    audio = create_streaming_audio(responder, audio_encoders, arguments.keep_s)
    answers: list[Answer] = []
    answer_results = []
    max_nbytes = 0
    # Not sys.stdin's own buffer: Python aborts when it exits while a thread still reads from that.
    source = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115 (closing it would wait for the thread)
    for received_s in receive_audio(audio, audio_encoders, source, arguments.every_s):
        prefix = responder.prefill_stream(audio, arguments.hide)
        max_nbytes = max(max_nbytes, audio.nbytes)
        for question in arguments.question:
            print(f"[{received_s:.0f} s] ", end="")
            answers.append(responder.answer_streaming(prefix, question, _print_text))
            _end_answer(answers[-1], arguments)
            answer_results.append({"received_s": received_s, **asdict(answers[-1])})
        del prefix  # frees its memory before more audio arrives
    cache_mib = max_nbytes / MIB
    logger.info(f"{received_s:.1f} s of audio received; its cache took at most {cache_mib:.1f} MiB")
    results = {"answers": answer_results, "audio_s": received_s, "audio_cache_mib": cache_mib}
    write_results({**results, **_speed(answers)}, arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal ask",
        description="Answer questions about an audio file, which is encoded once. Without a question, read them from "
        "the keyboard or a pipe, one per line. With `-` as the clip, keep the newest part of a WAV that arrives on "
        "standard input and answer the questions repeatedly: "
        "ffmpeg -i SOURCE -c:a pcm_s16le -f wav - | pal ask MODEL - QUESTION",
    )
    parser.add_argument("model", type=Path, help="exported folder (`pal export`)")
    parser.add_argument(
        "clip", type=Path, nargs="?", help="audio file (WAV, FLAC, MP3, OGG), or - for a WAV on standard input"
    )
    parser.add_argument("question", nargs="*", help="any number of questions about the clip")
    parser.add_argument(
        "--clip",
        dest="more_clips",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="another audio file; may be repeated. A question names each clip by <audio>, in order: "
        '"Is <audio> louder than <audio>?"; the clips stand in front of a question that names none',
    )
    parser.add_argument(
        "--chat", action="store_true", help="one conversation: each question follows the ones before and their answers"
    )
    parser.add_argument(
        "--hide",
        action="append",
        default=[],
        choices=get_args(IntegrationKind),
        help="hide the audio tokens of this integration from the language model; may be repeated",
    )
    add_encoder_option(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="maximum new tokens per answer (default: 256)"
    )
    parser.add_argument(
        "--every-s", type=float, metavar="S", help="with -: seconds of audio between rounds of questions (default: 60)"
    )
    parser.add_argument(
        "--keep-s",
        type=float,
        metavar="S",
        help="with -: seconds of the newest audio to keep, at least one encoder window (default: 600)",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="plot which parts of the clip each answer attends to (several answers: FILE-1, ...)",
    )
    parser.add_argument(
        "--web", action="store_true", help="serve a web page to upload or record clips and ask about them"
    )
    parser.add_argument(
        "--address",
        type=_address,
        metavar="HOST:PORT",
        help="with --web: address to serve at (default: 127.0.0.1:7860, reachable from this machine only)",
    )
    add_json(parser)
    return parser


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError("--address", f"'{text}' is not HOST:PORT", "give, for example, 127.0.0.1:7860")
    return host, int(port)


def _check(arguments: argparse.Namespace) -> None:
    """Rejects settings that have no effect and fills in defaults.

    Raises:
        UserError: an argument is missing or has no effect.
    """
    streaming = str(arguments.clip) == STANDARD_INPUT
    if arguments.web:
        for name in ("clip", "more_clips", "chat", "hide", "picture", "json"):
            if getattr(arguments, name):
                where = {"clip": "CLIP", "more_clips": "--clip"}.get(name, f"--{name}")
                raise UserError(where, "has no effect with --web", "leave it out: use the controls of the page")
    elif arguments.clip is None:
        raise UserError("CLIP", "is missing", "give an audio file, - for standard input, or --web for a web page")
    if streaming and not arguments.question:
        raise UserError("QUESTION", "is missing", "questions cannot be typed while audio arrives on standard input")
    if streaming and arguments.picture:
        raise UserError("--picture", "needs a whole audio file, not standard input", "leave it out")
    for name, option in (("more_clips", "--clip"), ("chat", "--chat")):
        if streaming and getattr(arguments, name):
            raise UserError(option, "needs whole audio files, not standard input", "leave it out")
    if arguments.picture and arguments.more_clips:
        raise UserError("--picture", "shows one clip", "leave out --picture or --clip")
    for name, default, applies, mode, remedy in (
        ("every_s", 60.0, streaming, "streaming audio", "give - as the clip, or leave it out"),
        ("keep_s", 600.0, streaming, "streaming audio", "give - as the clip, or leave it out"),
        ("address", ("127.0.0.1", 7860), arguments.web, "the web page", "give --web, or leave it out"),
    ):
        value = getattr(arguments, name)
        if value is not None and not applies:
            raise UserError(f"--{name.replace('_', '-')}", f"applies to {mode} only", remedy)
        setattr(arguments, name, default if value is None else value)
    require_positive(arguments, "every_s", "keep_s", "max_new_tokens")


def _end_answer(answer: Answer, arguments: argparse.Namespace) -> None:
    """Ends the line of an answer that was printed while it was generated; warns if it is truncated."""
    print()
    if answer.truncated:
        logger.warning(f"the answer is truncated at {arguments.max_new_tokens} tokens; raise --max-new-tokens")


def _print_text(text: str) -> None:
    print(text, end="", flush=True)


def _speed(answers: Sequence[Answer]) -> dict[str, Any]:
    """Returns the mean seconds until the first token and the mean rate after it; None where there is no answer."""
    rates = [answer.tokens_per_s for answer in answers if answer.tokens_per_s is not None]
    return {
        "first_token_s": mean(answer.first_token_s for answer in answers) if answers else None,
        "tokens_per_s": mean(rates) if rates else None,
    }


def _draw(
    responder: Responder, audio: EncodedAudio, questions: Sequence[Question], arguments: argparse.Namespace
) -> None:
    """Plots the attention of each answer over the spectrogram of the clip."""
    from pipeline.inference.encode_audio import SPECTROGRAM_HIGHEST_HZ, spectrogram
    from pipeline.plots import plot_attention_over_time

    background, file = spectrogram(arguments.clip), arguments.picture
    for number, question in enumerate(questions, start=1):
        attention = responder.attention_over_time(responder.attention_mass([audio.features], question))
        title = f"{question.question} {question.answer}"
        figure = plot_attention_over_time(background, audio.duration_s, SPECTROGRAM_HIGHEST_HZ, attention, title)
        figure.savefig(file if len(questions) == 1 else file.with_stem(f"{file.stem}-{number}"))


def _read_questions() -> Iterator[str]:
    """Yields lines from the keyboard or a pipe until end of file."""
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
