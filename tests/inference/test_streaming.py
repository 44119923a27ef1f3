"""A WAV that arrives is answered as the finished file is; bounds are kept; what cannot be is one line."""

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
    return write_model(tmp_path_factory.mktemp("listening"), "lal")


def wav(seconds: float, rate_hz: int = 16000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(size=(round(seconds * rate_hz), channels)) * 0.01
    soundfile.write(file, tone(seconds, rate_hz, channels=channels) + noise, rate_hz, "PCM_16", format="WAV")
    return file.getvalue()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Sends bytes to standard input through a real pipe, bit by bit."""

    def send(data: bytes) -> None:
        reading, writing = os.pipe()

        def write() -> None:
            with os.fdopen(writing, "wb") as file:
                file.write(data)

        threading.Thread(target=write, daemon=True).start()  # nobody may want to read it
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: reading))

    return send


@pytest.mark.parametrize("channels", [1, 2])
def test_the_answers_at_the_end_are_those_about_the_file(folder: Path, tmp_path: Path, pipe, channels: int) -> None:
    data = wav(75.5, channels=channels)
    (tmp_path / "clip.wav").write_bytes(data)
    common = ["What is it?", "And then?", "--max-new-tokens=5", "--json"]
    assert main([str(folder / "model"), str(tmp_path / "clip.wav"), *common, str(tmp_path / "file.json")]) == 0
    pipe(data)
    live = [str(folder / "model"), "-", "--every-s=30", "--keep-s=90", *common, str(tmp_path / "live.json")]
    assert main(live) == 0
    file, heard = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("file", "live"))
    assert [a["heard_s"] for a in heard["answers"]] == pytest.approx([30, 30, 60, 60, 75.5, 75.5], abs=1 / FRAME_HZ)
    assert [a["answer"] for a in heard["answers"][-2:]] == [a["answer"] for a in file["answers"]]


def test_features_that_arrive_are_those_of_the_file(folder: Path, tmp_path: Path) -> None:
    responder = load_responder(folder / "model", 4)
    audio_encoders = AudioEncoders(
        read_encoders(folder / "model", responder.feature_fingerprints, "nowhere"), {}, "cpu"
    )
    for seconds, rate_hz in ((60.0, 16000), (61.3, 16000), (31.0, 44100)):
        data = wav(seconds, rate_hz)
        (tmp_path / "clip.wav").write_bytes(data)
        arrived = [w for windows in audio_encoders.encode_stream(io.BytesIO(data)) for w in windows["log_mel"]]
        assert [len(w) for w in arrived[:-1]] == [WINDOW_S * FRAME_HZ] * (len(arrived) - 1)
        expected = audio_encoders.encode(tmp_path / "clip.wav").features["log_mel"]
        if rate_hz == 16000:
            assert (np.concatenate(arrived) == expected).all()
        else:
            np.testing.assert_allclose(np.concatenate(arrived), expected, rtol=0, atol=5e-3)


def test_reading_goes_on_while_nobody_takes() -> None:
    read, full = [], threading.Event()

    def source() -> Iterator[int]:
        for number in range(5):
            read.append(number)
            if number == 3:
                full.set()
            yield number
        raise ValueError("torn off")

    taken = read_ahead(source(), most=2)
    assert next(taken) == 0
    assert full.wait(10), "one taken, two waiting, one in hand"
    assert read == [0, 1, 2, 3], "and no more"
    assert [next(taken) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="torn off"):
        next(taken)


def test_no_more_is_kept_than_was_asked_for(folder: Path, tmp_path: Path, pipe) -> None:
    sizes = []
    for seconds in (95, 185):
        pipe(wav(seconds))
        arguments = ["What?", "--keep-s=60", "--max-new-tokens=2", "--json", str(tmp_path / "a.json")]
        assert main([str(folder / "model"), "-", *arguments]) == 0
        sizes.append(json.loads((tmp_path / "a.json").read_text())["audio_cache_mib"])
    layers, kv_width, number = 3, 32, 4
    assert sizes == [60 * FRAME_HZ * layers * 2 * kv_width * number / 2**20] * 2


def test_what_cannot_be_listened_to_is_one_line(
    folder: Path, tmp_path: Path, pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    summaries = write_model(tmp_path, "pal_v3") / "model"
    eight_bits = io.BytesIO()
    soundfile.write(eight_bits, tone(1, 8000), 8000, "PCM_U8", format="WAV")
    for model, data, arguments, said in (
        (folder / "model", b"no audio at all", ["What?"], "standard input: cannot be heard"),
        (folder / "model", b"", ["What?"], "standard input: cannot be heard"),
        (folder / "model", eight_bits.getvalue(), ["What?"], "8-bit samples"),
        (folder / "model", wav(0), ["What?"], "ends before the first frame"),
        (folder / "model", b"", [], "questions cannot be typed"),
        (folder / "model", b"", ["What?", "--picture=p.png"], "--picture"),
        (folder / "model", b"", ["What?", "--keep-s=0"], "--keep-s"),
        (summaries, b"", ["What?"], "this model puts audio into plits"),
    ):
        pipe(data)
        assert run_command(main, [str(model), "-", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("pal: ") and said in error
    assert run_command(main, [str(folder / "model"), str(folder / "clip.flac"), "What?", "--keep-s=60"]) == 2
    assert "--keep-s: is for audio that still arrives" in capsys.readouterr().err
