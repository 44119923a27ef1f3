"""A WAV that arrives as a stream gets the answers of the finished file; memory is bounded; mistakes are one line."""

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from pipeline.ask import main
from pipeline.core.errors import run_command
from pipeline.core.feature_contract import read_encoders
from pipeline.inference.encode_audio import AudioEncoders, read_ahead
from pipeline.inference.responder import load_responder
from tests.helpers.corpora import tone
from tests.helpers.exported_models import write_model

WINDOW_S, FRAME_HZ = 30, 25  # of the log-mel encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("streaming"), "lal")


def wav(seconds: float, rate_hz: int = 16000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(size=(round(seconds * rate_hz), channels)) * 0.01
    soundfile.write(file, tone(seconds, rate_hz, channels=channels) + noise, rate_hz, "PCM_16", format="WAV")
    return file.getvalue()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Sends bytes to standard input through a real pipe."""

    def send(data: bytes) -> None:
        reading, writing = os.pipe()

        def write() -> None:
            with os.fdopen(writing, "wb") as file:
                file.write(data)

        threading.Thread(target=write, daemon=True).start()  # possibly nothing reads it
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: reading))

    return send


@pytest.mark.parametrize("channels", [1, 2])
def test_the_last_answers_equal_those_about_the_file(folder: Path, tmp_path: Path, pipe, channels: int) -> None:
    data = wav(75.5, channels=channels)
    (tmp_path / "clip.wav").write_bytes(data)
    common = ["What is it?", "And then?", "--max-new-tokens=5", "--json"]
    assert main([str(folder / "model"), str(tmp_path / "clip.wav"), *common, str(tmp_path / "file.json")]) == 0
    pipe(data)
    arguments = [str(folder / "model"), "-", "--every-s=30", "--keep-s=90", *common, str(tmp_path / "stream.json")]
    assert main(arguments) == 0
    file, stream = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("file", "stream"))
    assert [a["received_s"] for a in stream["answers"]] == pytest.approx([30, 30, 60, 60, 75.5, 75.5], abs=1 / FRAME_HZ)
    assert [a["answer"] for a in stream["answers"][-2:]] == [a["answer"] for a in file["answers"]]


def test_features_of_a_stream_equal_those_of_the_file(folder: Path, tmp_path: Path) -> None:
    responder = load_responder(folder / "model", 4)
    audio_encoders = AudioEncoders(read_encoders(folder / "model", responder.feature_fingerprints, "no set"), {}, "cpu")
    for seconds, rate_hz in ((60.0, 16000), (61.3, 16000), (31.0, 44100)):
        data = wav(seconds, rate_hz)
        (tmp_path / "clip.wav").write_bytes(data)
        windows = [w for new in audio_encoders.encode_stream(io.BytesIO(data)) for w in new["log_mel"]]
        assert [len(w) for w in windows[:-1]] == [WINDOW_S * FRAME_HZ] * (len(windows) - 1)
        expected = audio_encoders.encode(tmp_path / "clip.wav").features["log_mel"]
        if rate_hz == 16000:
            assert (np.concatenate(windows) == expected).all()
        else:
            np.testing.assert_allclose(np.concatenate(windows), expected, rtol=0, atol=5e-3)


def test_reading_continues_while_no_item_is_requested() -> None:
    read, full = [], threading.Event()

    def source() -> Iterator[int]:
        for number in range(5):
            read.append(number)
            if number == 3:
                full.set()
            yield number
        raise ValueError("interrupted")

    items = read_ahead(source(), limit=2)
    assert next(items) == 0
    assert full.wait(10), "one requested, two queued, one waiting for the queue"
    assert read == [0, 1, 2, 3], "no more than that"
    assert [next(items) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="interrupted"):
        next(items)


def test_no_more_audio_is_kept_than_requested(folder: Path, tmp_path: Path, pipe) -> None:
    sizes = []
    for seconds in (95, 185):
        pipe(wav(seconds))
        arguments = ["What?", "--keep-s=60", "--max-new-tokens=2", "--json", str(tmp_path / "a.json")]
        assert main([str(folder / "model"), "-", *arguments]) == 0
        sizes.append(json.loads((tmp_path / "a.json").read_text())["audio_cache_mib"])
    layers, kv_width, number = 3, 32, 4
    assert sizes == [60 * FRAME_HZ * layers * 2 * kv_width * number / 2**20] * 2


def test_a_mistake_about_a_stream_is_one_line(
    folder: Path, tmp_path: Path, pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    summaries = write_model(tmp_path, "pal_v3") / "model"
    eight_bits = io.BytesIO()
    soundfile.write(eight_bits, tone(1, 8000), 8000, "PCM_U8", format="WAV")
    for model, data, arguments, message in (
        (folder / "model", b"no audio at all", ["What?"], "standard input: cannot be decoded"),
        (folder / "model", b"", ["What?"], "standard input: cannot be decoded"),
        (folder / "model", eight_bits.getvalue(), ["What?"], "8-bit samples"),
        (folder / "model", wav(0), ["What?"], "ends before the first frame"),
        (folder / "model", b"", [], "questions cannot be typed"),
        (folder / "model", b"", ["What?", "--picture=p.png"], "--picture"),
        (folder / "model", b"", ["What?", "--keep-s=0"], "--keep-s"),
        (summaries, b"", ["What?"], "this model integrates audio by plits"),
    ):
        pipe(data)
        assert run_command(main, [str(model), "-", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("pal: ") and message in error
    assert run_command(main, [str(folder / "model"), str(folder / "clip.flac"), "What?", "--keep-s=60"]) == 2
    assert "--keep-s: applies to streaming audio only" in capsys.readouterr().err
