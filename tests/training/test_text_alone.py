"""A language model trained on text alone: it learns, its folder is a plain language model, and training on audio begins
from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pipeline import ask, evaluate, probe
from pipeline.config import ExperimentConfig, load_config, validate_config
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.export import export
from pipeline.inference.responder import load_responder
from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model
from pipeline.plan import main as plan
from pipeline.tracking import writer
from pipeline.training.preflight import check, describe
from tests.helpers.feature_sets import write_feature_set
from tests.helpers.jobs import end_of, start_job, write_experiment


def write_text_experiment(folder: Path) -> Path:
    """Writes a config that trains on text alone, beside the sets and the model of `write_experiment`."""
    values = yaml.safe_load(write_experiment(folder).read_text())
    for name, questions in (("text", [3] * 16), ("held_out_text", [2] * 4)):
        write_feature_set(folder / name, questions, encoders={})
    values["model"] = {"language_model": str(folder / "language_model"), "encoders": []}
    values["data"] |= {"train": str(folder / "text"), "validation": str(folder / "held_out_text")}
    values["data"] |= {"questions_per_sequence": 2}
    file = folder / "text.yaml"
    file.write_text(yaml.safe_dump({**values, "output": str(folder / "text_run")}))
    return file


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_experiment(tmp_path_factory.mktemp("text_alone"))


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """Returns the output of a run on text alone, on two ranks."""
    output = config.parent / "text_run"
    code, _, err = end_of(start_job(config, "--nproc", 2), output)
    assert code == 0, err
    return output


def experiment(config: Path, *overrides: str) -> ExperimentConfig:
    return load_config(ExperimentConfig, config, overrides)


def test_the_loss_falls_and_held_out_text_is_validated(trained: Path) -> None:
    metrics = [metrics for _, metrics in writer.read_metrics(trained)]
    losses = [values["train/loss"] for values in metrics if "train/loss" in values]
    assert losses[-1] < losses[0] - 1
    assert metrics[-1]["validation/loss"] < losses[0]


def test_the_saved_folder_is_a_plain_language_model_with_its_own_tokenizer(config: Path, trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert isinstance(model, LlamaForCausalLM)
    base = load_file(config.parent / "language_model" / "model.safetensors")
    saved = load_file(trained / "model" / "model.safetensors")
    assert saved.keys() == base.keys() and not any(saved[name].equal(base[name]) for name in base)
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    assert len(tokenizer) == model.config.vocab_size and "<audio>" not in tokenizer.get_vocab()


def test_export_writes_the_same_folder_and_replaces_only_an_export(trained: Path, tmp_path: Path) -> None:
    assert export(trained / "step-000012", tmp_path / "model")["max_abs_difference"] == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "config.yaml"):
        assert (tmp_path / "model" / name).read_bytes() == (trained / "model" / name).read_bytes(), name


def test_answers_are_those_of_transformers(trained: Path) -> None:
    system = [None, None, "You read."]  # None: that of the run
    texts = ["Question 1 about clip 3??", "Question 0?", "Question 2 about clip 1???"]
    questions = [
        Question(question_id=str(n), question=text, answer="", system=system[n]) for n, text in enumerate(texts)
    ]
    responder = load_responder(trained / "model", 12)
    prompts = [responder.prompt_of(question, has_audio=False) for question in questions]
    prefix = responder.prefill_prompts([prompt.prefix for prompt in prompts], [], [])
    replies = responder.answer(prefix, questions, range(len(questions)))
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    plain = AutoModelForCausalLM.from_pretrained(trained / "model").eval()
    for question, reply in zip(questions, replies, strict=True):
        turns = [("system", question.system or "Listen."), ("user", question.question)]
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.inference_mode():
            generated = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert reply.text == tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_evaluation_of_text_needs_no_audio_and_has_no_swapped_control(
    config: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = str(config.parent / "held_out_text")
    file = tmp_path / "scores.json"
    assert evaluate.main([str(trained / "model"), text, "--swap-audio", f"--json={file}", "--max-new-tokens=8"]) == 0
    scores = json.loads(file.read_text())["held_out_text"]
    assert scores["questions"] == 8 and "swapped_audio" not in scores
    assert "has no audio to swap" in caplog.text


def test_a_model_that_reads_audio_answers_text_as_well(exported: Path, tmp_path: Path) -> None:
    text = write_feature_set(tmp_path / "text", [2] * 3, encoders={})
    file = tmp_path / "scores.json"
    assert evaluate.main([str(exported / "model"), str(text), f"--json={file}", "--max-new-tokens=4"]) == 0
    assert json.loads(file.read_text())["text"]["questions"] == 6


def test_training_on_audio_begins_from_it(config: Path, trained: Path) -> None:
    folder = config.parent
    output = folder / "audio_run"
    overrides = (f"output={output}", f"model.language_model={trained / 'model'}", "train.trainable=connector")
    code, _, err = end_of(start_job(folder / "config.yaml", *overrides, "train.steps=2"), output)
    assert code == 0, err
    saved = load_file(output / "model" / "model.safetensors")
    read = load_file(trained / "model" / "model.safetensors")
    assert all(saved[f"language_model.{name}"].equal(tensor) for name, tensor in read.items())


def test_a_dry_run_counts_text_and_no_frames(config: Path, tmp_path: Path) -> None:
    fresh = experiment(config, f"output={tmp_path}")
    contract, streams = check(fresh, 1, on_gpu=False)
    text = describe(fresh, contract, streams, 1)
    assert streams == () and "12 steps on 48 questions about 16 clips" in text
    assert "0 audio frames (0 s)" in text


def test_a_plan_of_text_prepares_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert plan([str(config), "--cluster", "cpu", f"--json={file}"]) == 0
    figures = json.loads(file.read_text())
    assert figures["workload"]["clip_s"] == 0 and figures["memory_gib_per_gpu"]["audio"] == 0
    assert "to prepare" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.trainable=connector"], "train.trainable: is connector, and a model without encoders has none"),
        (["train.connector_learning_rate=1e-3"], "train.connector_learning_rate: has no effect"),
        (["model.integration=lal"], "model.encoders: is empty, and integration 'lal' reads audio"),
        (["model.integration=none", "model.encoders=[log_mel]"], "model.encoders: has no effect on integration 'none'"),
    ],
)
def test_settings_of_the_audio_side_are_refused(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        experiment(config, *overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train={audio}"], "features: asks about clips (log_mel), and the model has no encoder to read them"),
        (["data.validation={audio}"], "features: asks about clips (log_mel)"),
        (['data.mixture=[{"path": "{audio}", "share": 0.5}]'], "features: asks about clips (log_mel)"),
        (["model.num_audio_layers=2"], "model.num_audio_layers: has no effect on integration 'none'"),
        (['model.connector={"kind": "linear"}'], "model.connector: has no effect on integration 'none'"),
        (["model.encoders=[log_mel]", "model.integration=lal"], "text: is a set of text without audio"),
    ],
)
def test_sets_that_do_not_fit_are_refused_before_the_run(
    config: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    overrides = [text.replace("{audio}", str(config.parent / "features")) for text in overrides]
    with pytest.raises(UserError) as error:
        check(experiment(config, f"output={tmp_path}", *overrides), 1, on_gpu=False)
    assert message in str(error.value)


def test_a_run_on_audio_names_the_folder_of_the_language_model_instead_of_the_run(config: Path, trained: Path) -> None:
    audio = experiment(config.parent / "config.yaml", f"starts_from={trained}", f"output={config.parent / 'x'}")
    with pytest.raises(UserError, match=rf"set model\.language_model to {trained}/model instead"):
        check(audio, 1, on_gpu=False)


def test_commands_that_need_audio_refuse_it(config: Path, trained: Path) -> None:
    model, clip = str(trained / "model"), str(config.parent / "clip.wav")
    commands: list[tuple[Any, list[str]]] = [
        (ask.main, [model, clip, "What is it?"]),
        (probe.main, [model, str(config.parent / "features")]),
    ]
    for command, arguments in commands:
        with pytest.raises(UserError, match="was trained on text alone"):
            command(arguments)
    with pytest.raises(UserError, match=r"features: asks about clips"):
        evaluate.main([model, str(config.parent / "features")])


def test_a_plain_language_model_answers_a_set_of_text_before_any_training(exported: Path, tmp_path: Path) -> None:
    text, file = write_feature_set(tmp_path / "text", [2], encoders={}), tmp_path / "scores.json"
    assert evaluate.main([str(exported / "lm"), str(text), f"--json={file}", "--max-new-tokens=2"]) == 0
    assert json.loads(file.read_text())["text"]["questions"] == 2
    with pytest.raises(UserError, match="is a language model that was trained on text alone"):
        probe.main([str(exported / "lm"), str(exported / "set")])


def test_integration_and_encoders_follow_from_each_other() -> None:
    def model(**values: Any) -> tuple[list[str], str]:
        common = {"output": "x", "data": {"train": "x"}, "train": {"steps": 1}}
        section = {"language_model": "x", **values}
        resolved = validate_config(ExperimentConfig, {**common, "model": section}, "test").model
        return resolved.encoders, resolved.integration

    assert model(encoders=[]) == model(integration="none") == model(encoders={}) == ([], "none")
    assert model() == (["log_mel"], "lal")


def test_text_without_a_prompt_before_it_is_answered(tmp_path: Path) -> None:
    """A tokenizer without a chat template and without a system text puts nothing before the audio."""
    save_random_language_model(tmp_path / "lm", ["What is it? a dog"] * 5, RandomLanguageModel(num_layers=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "chat_template.jinja").unlink(missing_ok=True)
    text = write_feature_set(tmp_path / "text", [2], encoders={})
    values = {
        "output": str(tmp_path / "run"),
        "model": {"language_model": str(tmp_path / "lm"), "encoders": []},
        "data": {"train": str(text), "system_prompt": ""},
        "train": {"steps": 1, "precision": "fp32", "zero": "zero0", "global_batch_size": 2, "micro_batch_size": 2},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    code, _, err = end_of(start_job(file), tmp_path / "run")
    assert code == 0, err
    assert evaluate.main([str(tmp_path / "run/model"), str(text), "--max-new-tokens=2"]) == 0
