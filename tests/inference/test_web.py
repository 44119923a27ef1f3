"""The page of `pal ask --web`: a clip is encoded once, pathways switch off and on, a browser shows the answers."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from pipeline.ask import main
from pipeline.core.errors import run_command
from pipeline.core.feature_contract import read_encoders
from pipeline.inference.encode_audio import AudioEncoders
from pipeline.inference.responder import Responder, load_responder
from pipeline.model import PalForCausalLM

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BOTH = ["lal", "plits"]


@pytest.fixture(scope="module")
def model(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model whose answers depend on the audio, because its audio tokens are scaled up."""
    scaled = tmp_path_factory.mktemp("web") / "model"
    shutil.copytree(exported / "model", scaled)
    (file,) = scaled.glob("*.safetensors")
    weights = load_file(file)
    for name in weights:
        if name.startswith("streams.") and name.endswith("output.weight"):
            weights[name] *= 30
    save_file(weights, file, {"format": "pt"})
    return scaled


@pytest.fixture(scope="module")
def responder(model: Path) -> Responder:
    return load_responder(model, 4)


@pytest.fixture(scope="module")
def audio_encoders(model: Path, responder: Responder) -> AudioEncoders:
    return AudioEncoders(read_encoders(model, responder.feature_fingerprints, "no set"), {}, "cpu")


def test_a_clip_is_encoded_once_and_prefilled_once_per_choice_of_pathways(
    exported: Path,
    responder: Responder,
    audio_encoders: AudioEncoders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.inference.web import Page

    features = audio_encoders.encode(exported / "clip.flac").features
    expected = {
        hidden: responder.answer(responder.prefill([features], hidden), ["What?"], [0])[0].text
        for hidden in ((), ("lal",), ("lal", "plits"))
    }
    assert expected[()] != expected["lal", "plits"]
    encoded: list[int] = []
    prefilled: list[int] = []
    encode, audio_kv = AudioEncoders.encode, PalForCausalLM.audio_kv
    monkeypatch.setattr(AudioEncoders, "encode", lambda *a: encoded.append(1) or encode(*a))
    monkeypatch.setattr(PalForCausalLM, "audio_kv", lambda *a: prefilled.append(1) or audio_kv(*a))
    page = Page(responder, audio_encoders, "model")
    session, picture, line, *outputs = page.open_clip(str(exported / "clip.flac"))
    assert session is not None and picture is not None and "70.0 s" in line and outputs == ["", "", []]
    updates = list(page.ask(session, "What?", BOTH))
    assert [len(text) for _, text, _ in updates] == sorted(len(text) for _, text, _ in updates), "the text only grows"
    assert updates[-1][1] == expected[()]
    list(page.ask(session, "Why?", BOTH))
    list(page.ask(session, "What?", BOTH))
    assert (len(encoded), len(prefilled)) == (1, 1)
    assert list(page.ask_again(session, ["plits"]))[-1][1] == expected[("lal",)]
    assert list(page.ask_again(session, []))[-1][1] == expected[("lal", "plits")]
    assert list(page.ask_again(session, BOTH))[-1][1] == expected[()]
    assert (len(encoded), len(prefilled)) == (1, 3)
    assert [row[:2] for row in session.rows] == [
        ["What?", "LAL + PLITS"],
        ["What?", "none"],
        ["What?", "PLITS"],
        ["What?", "LAL + PLITS"],
        ["Why?", "LAL + PLITS"],
        ["What?", "LAL + PLITS"],
    ]


def test_clips_and_questions_that_fail_show_a_message_on_the_page(
    exported: Path,
    tmp_path: Path,
    responder: Responder,
    audio_encoders: AudioEncoders,
) -> None:
    from pipeline.inference.web import Page

    page = Page(responder, audio_encoders, "model")
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    session, picture, line, *_ = page.open_clip(str(tmp_path / "noise.wav"))
    assert session is None and picture is None
    assert "**noise.wav** is undecodable" in line and str(tmp_path) not in line
    assert page.open_clip(None)[:3] == (None, None, "")
    assert "first" in next(page.ask(None, "What?", BOTH))[0]
    session = page.open_clip(str(exported / "clip.flac"))[0]
    assert "Type a question" in next(page.ask(session, " ", BOTH))[0]
    assert "text tokens long" in list(page.ask(session, "What? " * 5000, BOTH))[-1][0]
    assert session is not None and session.rows == [] and list(page.ask_again(session, [])) == []


def test_the_page_offers_the_pathways_of_the_model(responder: Responder, audio_encoders: AudioEncoders) -> None:
    from pipeline.inference.web import Page

    page = Page(responder, audio_encoders, "model").build()
    (boxes,) = (part["props"] for part in page.config["components"] if part["type"] == "checkboxgroup")
    assert [value for _, value in boxes["choices"]] == boxes["value"] == BOTH
    assert not page.analytics_enabled and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_the_command_serves_this_machine_only_by_default(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.inference import web

    served: list[tuple[str, int]] = []
    monkeypatch.setattr(web, "serve", lambda responder, audio_encoders, name, host, port: served.append((host, port)))
    assert main([str(exported / "model"), "--web"]) == 0
    assert main([str(exported / "model"), "--web", "--address=0.0.0.0:80"]) == 0
    assert served == [("127.0.0.1", 7860), ("0.0.0.0", 80)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--web", "clip.wav"], "CLIP: has no effect with --web"),
        (["--web", "--hide=lal"], "--hide: has no effect with --web"),
        ([], "CLIP: is missing"),
        (["clip.wav", "--address=127.0.0.1:80"], "--address: applies to the web page only"),
        (["--web", "--address=80"], "is not HOST:PORT"),
        (["--web", "--address=localhost:66000"], "is not HOST:PORT"),
    ],
)
def test_settings_without_effect_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, ["model", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_gradio_the_message_names_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "pipeline.inference.web", raising=False)
    assert run_command(main, ["model", "--web"]) == 2
    assert capsys.readouterr().err == "pal: --web: needs gradio; pip install 'pal-pipeline[web]'\n"


@pytest.fixture
def url(model: Path, tmp_path: Path) -> Iterator[str]:
    """Address of a served page, which Ctrl-C ends."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    arguments = [str(model), "--web", f"--address=127.0.0.1:{port}", "--max-new-tokens=4"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.ask", *arguments], stdout=subprocess.PIPE, stderr=stream, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"http://127.0.0.1:{port} (Ctrl-C ends)\n", log.read_text()
        listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"]
        assert listening == ["127.0.0.1"]
        yield line.split()[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        (decoding,) = log.read_text().splitlines()  # and nothing else
        assert decoding.startswith("pal: greedy decoding (")
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_uploads_and_records_clips_asks_and_switches_pathways_off(
    url: str,
    exported: Path,
    tmp_path: Path,
    responder: Responder,
    audio_encoders: AudioEncoders,
) -> None:
    from playwright.sync_api import expect, sync_playwright

    clip, question = exported / "clip.flac", "What?"
    features = audio_encoders.encode(clip).features
    none_hidden, lal_hidden, both_hidden = (
        responder.answer(responder.prefill([features], hidden), [question], [0])[0].text
        for hidden in ((), ("lal",), ("lal", "plits"))
    )
    assert none_hidden != both_hidden
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    requests: list[str] = []
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"],
        )
        page = browser.new_context(permissions=["microphone"], viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        upload = page.get_by_test_id("waveform-Clip").get_by_test_id("file-upload")
        upload.set_input_files(clip)
        expect(page.get_by_text(re.compile(r"Encoded \d+\.\d s"))).to_be_visible()
        expect(page.locator(".matplotlib img")).to_be_visible()
        page.get_by_label("Question").fill(question)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_test_id("cell-0-1")).to_have_text("LAL + PLITS")
        expect(page.get_by_label("Answer", exact=True)).to_have_value(none_hidden)
        page.get_by_role("checkbox", name="LAL").uncheck()
        expect(page.get_by_test_id("cell-0-1")).to_have_text("PLITS")
        expect(page.get_by_label("Answer", exact=True)).to_have_value(lal_hidden)
        page.get_by_role("checkbox", name="PLITS").uncheck()
        expect(page.get_by_test_id("cell-0-1")).to_have_text("none")
        expect(page.get_by_label("Answer", exact=True)).to_have_value(both_hidden)
        page.screenshot(path=tmp_path / "asked.png")

        page.get_by_role("button", name="Clear").click()
        upload.set_input_files(tmp_path / "noise.wav")
        expect(page.get_by_text("is undecodable")).to_be_visible()

        page.get_by_label("Record audio").click()
        page.get_by_role("button", name="Record", exact=True).click()
        page.wait_for_timeout(2_000)
        page.get_by_role("button", name="Stop", exact=True).click()
        expect(page.get_by_text(re.compile(r"Encoded \d+\.\d s"))).to_be_visible()
        browser.close()
    foreign = [address for address in requests if not address.startswith((url, "blob:", "data:"))]
    assert foreign == [], "the page works without a network"
