"""`pal ask`: a clip is encoded once for any number of questions, as preparation encodes it; mistakes are one line."""

import io
import json
from pathlib import Path

import pytest
import soundfile

from pipeline.ask import main
from pipeline.core.errors import UserError, run_command
from pipeline.core.feature_contract import ENCODERS_FILE, Question, read_encoders
from pipeline.data.feature_set import FeatureSet
from pipeline.inference.encode_audio import AudioEncoders, spectrogram
from pipeline.inference.responder import load_responder
from pipeline.model import PalForCausalLM
from tests.helpers.corpora import tone


def test_a_file_is_encoded_as_preparation_encodes_it(exported: Path) -> None:
    features = FeatureSet(exported / "set", ["log_mel"])
    stored = features.features(0, "clip")["log_mel"]
    fingerprints = {"log_mel": features.contract.encoders["log_mel"].fingerprint}
    audio = AudioEncoders(read_encoders(exported / "model", fingerprints, "no set"), {}, "cpu").encode(
        exported / "clip.flac"
    )
    assert audio.duration_s == 70.0
    assert (audio.features["log_mel"] == stored).all()
    assert spectrogram(exported / "clip.flac").shape == (7000, 64)


def test_questions_share_one_prefill(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    audio_kv = PalForCausalLM.audio_kv
    monkeypatch.setattr(PalForCausalLM, "audio_kv", lambda *a: calls.append(1) or audio_kv(*a))
    questions = [f"What is it? {n}" for n in range(10)]
    arguments = [str(exported / "model"), str(exported / "clip.flac"), "--max-new-tokens=4", "--json"]
    assert main([*arguments, str(tmp_path / "a.json"), *questions]) == 0
    assert len(calls) == 1, "the audio tokens are computed once"
    figures = json.loads((tmp_path / "a.json").read_text())
    assert [answer["question"] for answer in figures["answers"]] == questions
    assert capsys.readouterr().out == "".join(f"{answer['answer']}\n" for answer in figures["answers"])
    assert min(figures[key] for key in ("audio_cache_mib", "audio_encode_s", "audio_prefill_s", "first_token_s")) > 0

    responder = load_responder(exported / "model", 4)
    stored = FeatureSet(exported / "set", ["log_mel"]).features(0, "clip")
    replies = responder.answer(responder.prefill([stored]), questions, [0] * 10)
    batch_answers = [reply.text for reply in replies]
    assert [answer["answer"] for answer in figures["answers"]] == batch_answers, "the answers of an evaluation"

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{questions[0]}\n\n{questions[1]}\n"))
    assert main([*arguments, str(tmp_path / "b.json")]) == 0
    typed = json.loads((tmp_path / "b.json").read_text())["answers"]
    assert [answer["answer"] for answer in typed] == batch_answers[:2]


def test_several_clips_and_a_conversation(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "b.wav", tone(1.0, 16000), 16000)
    arguments = [str(exported / "model"), str(exported / "clip.flac"), "--max-new-tokens=4"]
    two = [*arguments, "--clip", str(tmp_path / "b.wav")]
    assert main([*two, "Is <audio> louder than <audio>?", "--json", str(tmp_path / "two.json")]) == 0
    figures = json.loads((tmp_path / "two.json").read_text())
    assert figures["audio_s"] == pytest.approx(71.0)
    features = FeatureSet(exported / "set", ["log_mel"])
    fingerprints = {"log_mel": features.contract.encoders["log_mel"].fingerprint}
    encoders = AudioEncoders(read_encoders(exported / "model", fingerprints, "no set"), {}, "cpu")
    clips = [encoders.encode(file).features for file in (exported / "clip.flac", tmp_path / "b.wav")]
    content = ["Is ", 0, " louder than ", 1, "?"]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": ["yes"]}]
    question = Question.model_validate(
        {"question_id": "q", "question": "?", "answer": "yes", "turns": turns, "clips": ["b"]}
    )
    responder = load_responder(exported / "model", 4)
    prompt = responder.prompt_of(question)
    prefix = responder.prefill_prompts([prompt.prefix], clips, prompt.clips)
    assert figures["answers"][0]["answer"] == responder.answer(prefix, [question], [0])[0].text, "as of a prepared set"

    assert main([*arguments, "What is it?", "Why?", "--chat", "--json", str(tmp_path / "chat.json")]) == 0
    assert len(json.loads((tmp_path / "chat.json").read_text())["answers"]) == 2
    capsys.readouterr()
    for more, message in (
        (["Is <audio>?"], "QUESTION: names 1 clips by <audio>, but there are 2; write <audio> 2 times, or not at all"),
        (["What?", "--picture=p.png"], "--picture: shows one clip"),
    ):
        assert run_command(main, [*two, *more]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    for more in (["--chat"], ["--clip=b.wav"]):
        assert run_command(main, [str(exported / "model"), "-", "What?", *more]) == 2
        assert "needs whole audio files, not standard input" in capsys.readouterr().err.splitlines()[-1]


def test_a_mistake_is_one_line(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    model, clip = exported / "model", exported / "clip.flac"
    foreign = json.loads((model / ENCODERS_FILE).read_text())
    foreign["log_mel"]["options"]["num_mels"] = 32
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).symlink_to(file)
    (other / ENCODERS_FILE).unlink()
    (other / ENCODERS_FILE).write_text(json.dumps(foreign))
    for arguments, message in (
        ([model, tmp_path / "noise.wav", "What?"], "noise.wav: is undecodable"),
        ([model, tmp_path / "gone.wav", "What?"], "gone.wav: is missing"),
        ([model, clip, "What? " * 5000], "text tokens long"),
        ([model, clip, "--encoder=clap=folder", "What?"], "the model has no encoder 'clap'"),
        ([other, clip, "What?"], "does not describe the encoder 'log_mel'"),
        ([tmp_path, clip, "What?"], "is not an exported model"),
    ):
        assert run_command(main, [str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("pal: ") and message in error


def test_an_encoder_that_would_make_other_features_is_refused(exported: Path) -> None:
    features = FeatureSet(exported / "set", ["log_mel"])
    contract = features.contract.encoders["log_mel"]
    with pytest.raises(UserError, match="makes features with fingerprint"):
        AudioEncoders({"log_mel": contract.model_copy(update={"revision": "0"})}, {}, "cpu")
