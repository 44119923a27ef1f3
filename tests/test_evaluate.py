"""Answers depend on model and features alone; swapped audio makes a model that uses audio fail; features of another
encoder are refused; scores are logged to the run that trained the model."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoConfig, PreTrainedTokenizerBase

from pipeline.config import ExperimentConfig, validate_config
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import CONTRACT_FILE, load_contract
from pipeline.core.streams import Connector, preset_streams
from pipeline.data.chat_template import ChatTemplate, load_tokenizer
from pipeline.data.collate import Example, collate
from pipeline.data.feature_set import FeatureSet
from pipeline.evaluate import main
from pipeline.evaluation.baselines import swap_within_domains
from pipeline.evaluation.evaluate_benchmark import BenchmarkResult, EvaluationOptions, evaluate_benchmark
from pipeline.evaluation.generate_answers import (
    AnswerGenerator,
    GenerationSettings,
    Partition,
    generate_answers,
    group_clips,
    open_answer_generator,
    unanswered_groups,
)
from pipeline.evaluation.question_sets import QuestionSource
from pipeline.inference.responder import Responder
from pipeline.model import PalConfig, PalForCausalLM
from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model
from pipeline.tracking.writer import EVALUATIONS
from pipeline.training import run_dir
from pipeline.training.exported_model import save_model
from tests.helpers.feature_sets import write_rows
from tests.helpers.log_lines import log_lines

SOUNDS = ("dog", "cat", "bell")
CLIPS_IN_SET = 9
SYSTEM_PROMPT = "Listen."


def write_set(folder: Path) -> Path:
    """Writes clips of three sounds that differ in their features and not in their questions."""
    rows, frames = [], []
    for number in range(CLIPS_IN_SET):
        sound = SOUNDS[number % 3]
        questions = [
            {"question": "What is it?", "answer": sound, "task": "what"},
            {"question": "Is it a dog?", "answer": "yes" if sound == "dog" else "no", "task": "verify"},
        ]
        rows.append(
            {
                "clip_id": f"clip-{number}",
                "duration_s": 1.0 + number % 4,
                "dataset": "synth",
                "domain": "sound" if number < 6 else "music",
                "questions": [{"question_id": f"{number}/{i}", **question} for i, question in enumerate(questions)],
            }
        )
        frames.append(np.zeros((3 + number % 4, 8), np.float16))
        frames[-1][:, number % 3] = 2
    return write_rows(folder, rows, {"log_mel": frames})


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    return FeatureSet(write_set(tmp_path_factory.mktemp("sets") / "held-out"), ["log_mel"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, features: FeatureSet) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("language_model")
    texts = [f"{q.question} {q.answer}" for clip in range(3) for q in features.clip(clip).questions]
    sizes = RandomLanguageModel(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2)
    save_random_language_model(folder, texts * 5, sizes)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase, features: FeatureSet) -> PalForCausalLM:
    """A tiny LAL model that has memorised the set."""
    chat = ChatTemplate(tokenizer, SYSTEM_PROMPT, max_text_tokens=128)
    torch.manual_seed(0)
    config = PalConfig(
        AutoConfig.from_pretrained(tokenizer.name_or_path),
        streams=preset_streams("lal", ["log_mel"], 2, connector=Connector()),
        encoder_widths=features.widths,
        audio_token_id=chat.audio_token_id,
        feature_fingerprints={"log_mel": features.contract.encoders["log_mel"].fingerprint},
        base_language_model=tokenizer.name_or_path,
    )
    model = PalForCausalLM.from_language_model(config)
    examples = []
    for number in range(CLIPS_IN_SET):
        clip = features.clip(number)
        arrays = features.features(number, clip.clip_id)
        examples += [Example(chat.row([question]), [question], clip, arrays) for question in clip.questions]
    batch = collate(examples, pad_token_id=chat.pad_token_id, widths=features.widths, feature_dtype=torch.float32)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels", "audio_features", "audio_lengths")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in count():
        loss = model(**inputs).loss
        if loss < 0.01:
            return model
        assert step < 300, "the model does not learn"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError


@pytest.fixture(scope="module")
def responder(model: PalForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Responder:
    return Responder(model, ChatTemplate(tokenizer, SYSTEM_PROMPT, max_text_tokens=128), max_new_tokens=16)


def config_of(folder: Path, tokenizer: PreTrainedTokenizerBase, features: FeatureSet) -> ExperimentConfig:
    return validate_config(
        ExperimentConfig,
        {
            "output": str(folder),
            "model": {"language_model": tokenizer.name_or_path},
            "data": {"train": str(features.folder), "system_prompt": SYSTEM_PROMPT},
            "train": {"steps": 1},
            "tracking": {"uri": f"sqlite:///{folder.parent / 'mlflow.db'}"},
        },
        "test",
    )


@pytest.fixture(scope="module")
def exported(
    model: PalForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    features: FeatureSet,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    output = tmp_path_factory.mktemp("runs") / "lal"
    save_model(model, tokenizer, config_of(output, tokenizer, features), output / "model")
    return output / "model"


@pytest.fixture
def generator(exported: Path, tmp_path: Path) -> Iterator[AnswerGenerator]:
    settings = GenerationSettings(exported, max_new_tokens=16, batch_size=4, journal=tmp_path / "journal")
    with open_answer_generator(settings) as generator:
        yield generator


def evaluate(generator: AnswerGenerator, location: Any, cache: Path | None = None, **options: Any) -> BenchmarkResult:
    return evaluate_benchmark(generator, QuestionSource(str(location), cache), EvaluationOptions(**options))


def own_audio() -> dict[int, int]:
    return {clip: clip for clip in range(CLIPS_IN_SET)}


def test_a_model_that_uses_audio_fails_on_swapped_audio(generator: AnswerGenerator, features: FeatureSet) -> None:
    result = evaluate(generator, features.folder, swap_audio=True, majority_from=str(features.folder))
    scores, lines = result.scores, result.predictions
    assert scores["accuracy"] == 1.0
    assert (scores["questions"], scores["clips"]) == (2 * CLIPS_IN_SET, CLIPS_IN_SET)
    # The audio decides: with another clip's audio the answer is right where that clip's answer is the same.
    swapped = swap_within_domains({clip: features.clip(clip).domain for clip in range(CLIPS_IN_SET)})
    agreeing = [
        features.clip(clip).questions[number].answer == features.clip(other).questions[number].answer
        for clip, other in swapped.items()
        for number in range(2)
    ]
    assert scores["swapped_audio"]["accuracy"] == pytest.approx(np.mean(agreeing))
    assert np.mean(agreeing) < 0.7
    guess = scores["majority_baseline"]["by_task"]
    assert guess["what"]["accuracy"] == pytest.approx(1 / 3)
    assert guess["verify"]["accuracy"] == pytest.approx(2 / 3)
    assert [line["audio"] for line in lines] == ["own"] * 18 + ["swapped"] * 18
    assert [line["question_id"] for line in lines[:4]] == ["0/0", "0/1", "1/0", "1/1"], "in storage order"


def test_answers_do_not_depend_on_batch_size_and_a_clip_is_encoded_once(
    responder: Responder, features: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded_clips: list[int] = []
    prefill = responder.prefill_prompts

    def counting_prefill(prefixes: Any, clips: Any, placeholders: Any, hidden: Any) -> Any:
        encoded_clips.append(len(clips))
        return prefill(prefixes, clips, placeholders, hidden)

    monkeypatch.setattr(responder, "prefill_prompts", counting_prefill)
    swapped = swap_within_domains({clip: features.clip(clip).domain for clip in range(CLIPS_IN_SET)})
    for pairing in (own_audio(), swapped):
        answers = []
        for batch_size in (1, 5, 64):
            encoded_clips.clear()
            groups = group_clips(features.table, pairing, batch_size)
            answers.append(
                {k: v for group in generate_answers(responder, features, groups, batch_size) for k, v in group.items()}
            )
            assert sum(encoded_clips) == CLIPS_IN_SET
        assert answers[0] == answers[1] == answers[2]
        assert sorted(answers[0]) == list(range(2 * CLIPS_IN_SET))


def test_partitions_cover_the_work_and_answered_groups_are_skipped(responder: Responder, features: FeatureSet) -> None:
    groups = group_clips(features.table, own_audio(), 4)
    answers = list(generate_answers(responder, features, groups, 4))
    parts = [list(generate_answers(responder, features, Partition(n, 3).select(groups), 4)) for n in range(3)]
    assert all(parts)
    assert [group for part in parts for group in part] == [group for n in range(3) for group in answers[n::3]]
    first, second = list(answers[0]), list(answers[1])
    unanswered = unanswered_groups(groups, [*first, *second[:-1]])
    assert unanswered == groups[1:], "a group with a missing answer is answered again"


@pytest.fixture
def arguments(exported: Path, features: FeatureSet, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes the arguments of an evaluation whose predictions have a name."""

    def make(name: str, *more: str) -> list[str]:
        files = ["--predictions", str(tmp_path / f"{name}.jsonl"), "--batch-size", "4"]
        return [str(exported), str(features.folder), "--swap-audio", *files, *more]

    return make


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Receives the number of questions of each call of the model."""
    real, counts = Responder.answer, []

    def counting_answer(self: Responder, prefix: Any, questions: list[str], *others: Any) -> list[str]:
        counts.append(len(questions))
        return real(self, prefix, questions, *others)

    monkeypatch.setattr(Responder, "answer", counting_answer)
    return counts


def test_a_killed_evaluation_resumes(
    arguments: Callable[..., list[str]], answered: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments("whole")) == 0
    answered.clear()
    counting = Responder.answer

    def dying_answer(self: Responder, prefix: Any, questions: list[str], *others: Any) -> list[str]:
        if len(answered) == 6:
            raise KeyboardInterrupt
        return counting(self, prefix, questions, *others)

    with monkeypatch.context() as dying:
        dying.setattr(Responder, "answer", dying_answer)
        with pytest.raises(KeyboardInterrupt):
            main(arguments("broken"))
    with next((tmp_path / "broken.jsonl.partial").iterdir()).open("a") as file:
        file.write('["half a li')
    assert main(arguments("broken")) == 0
    assert sum(answered) == 36, "no answered question is answered again"
    assert (tmp_path / "broken.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "broken.jsonl.partial").exists()


def test_nodes_answer_their_shares_and_one_node_scores(
    arguments: Callable[..., list[str]], answered: list[int], tmp_path: Path
) -> None:
    assert main(arguments("whole")) == 0
    answered.clear()
    counts = []
    for number in (2, 0, 1):
        assert main(arguments("shared", f"--share={number}/3")) == 0
        assert not (tmp_path / "shared.jsonl").exists(), "a share scores nothing"
        counts.append(sum(answered))
    assert 0 < counts[0] < counts[1] < counts[2] == 36
    assert main(arguments("shared")) == 0
    assert sum(answered) == 36, "nothing is answered again"
    assert (tmp_path / "shared.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_answers_do_not_depend_on_the_number_of_processes(exported: Path, features: FeatureSet, tmp_path: Path) -> None:
    for nproc in (1, 2):
        files = ["--predictions", str(tmp_path / f"{nproc}.jsonl"), "--batch-size", "4"]
        assert main([str(exported), str(features.folder), f"--nproc={nproc}", *files]) == 0
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_a_limit_takes_evenly_spaced_clips(generator: AnswerGenerator, features: FeatureSet) -> None:
    result = evaluate(generator, features.folder, limit=3)
    scores, lines = result.scores, result.predictions
    assert scores["clips"] == 3
    assert list(dict.fromkeys(line["clip_id"] for line in lines)) == ["clip-0", "clip-3", "clip-6"]
    assert "swapped_audio" not in scores


def test_truncated_answers_are_counted_and_kept_in_the_journal(
    exported: Path, features: FeatureSet, tmp_path: Path
) -> None:
    settings = GenerationSettings(exported, max_new_tokens=1, batch_size=4, journal=tmp_path / "journal")
    for _ in range(2):  # the second time all answers are in the journal
        with log_lines() as logged, open_answer_generator(settings) as generator:
            result = evaluate(generator, features.folder, swap_audio=True)
        truncated = [line["truncated"] for line in result.predictions if line["audio"] == "own"]
        assert result.scores["truncated_answers"] == sum(truncated) > 0
        warning = f"{sum(truncated)} of 18 answers are truncated at 1 tokens; raise --max-new-tokens"
        assert sum(line.endswith(warning) for line in logged) >= 1
        assert sum("greedy decoding" in line for line in logged) == 1


def test_a_clip_beyond_the_language_models_positions_is_reported_once(
    responder: Responder, features: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder, "max_positions", 3)
    with log_lines() as logged:
        list(generate_answers(responder, features, group_clips(features.table, own_audio(), 4), 4, show_progress=False))
    (line,) = logged
    assert "positions with its audio, more than the 3 of the language model; shorten the audio or the text" in line


def test_features_of_another_encoder_are_refused(generator: AnswerGenerator, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "foreign")
    contract = load_contract(folder)
    encoder = contract.encoders["log_mel"].model_copy(update={"revision": "2"})
    (folder / CONTRACT_FILE).write_text(contract.model_copy(update={"encoders": {"log_mel": encoder}}).dump())
    with pytest.raises(UserError, match=f"fingerprint {encoder.fingerprint}, .*model was made with"):
        evaluate(generator, folder)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["--limit=0"], "--limit"),
        (["--batch-size=0"], "--batch-size"),
        (["--nproc=0"], "--nproc"),
        (["--limit=1", "--swap-audio"], "two clips"),
        (["--share=2/2"], "'2/2' is not I/N"),
        (["--share=half"], "'half' is not I/N"),
        (["--share=0/2"], "would lose its answers"),
    ],
)
def test_impossible_settings_are_refused(exported: Path, features: FeatureSet, settings: list[str], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        main([str(exported), str(features.folder), *settings])


def test_a_remote_set_is_read_through_the_cache(
    generator: AnswerGenerator, features: FeatureSet, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--cache"):
        evaluate(generator, "s3://bucket/held-out")
    cache = tmp_path / "cache"
    assert evaluate(generator, features.folder, cache=cache).scores["accuracy"] == 1.0
    assert list(cache.rglob("*.mds")), "shards were copied"


def test_the_command_writes_scores_and_predictions_and_logs_to_the_run(
    exported: Path, features: FeatureSet, tmp_path: Path
) -> None:
    output = exported.parent
    client = MlflowClient(f"sqlite:///{output.parent / 'mlflow.db'}")
    run_id = client.create_run(client.create_experiment("pal", (tmp_path / "artifacts").as_uri())).info.run_id
    run_dir.write_run(output, run_dir.RunRecord(identity={}, run_id=run_id))

    files = ["--json", str(tmp_path / "scores.json"), "--predictions", str(tmp_path / "predictions.jsonl")]
    assert main([str(exported), str(features.folder), "--swap-audio", *files]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {"held-out"}
    assert scores["held-out"]["accuracy"] == 1.0, "the exported model answers as the trained one"
    assert set(scores["held-out"]["by_domain"]) == {"sound", "music"}
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * CLIPS_IN_SET
    assert all(line["benchmark"] == "held-out" for line in lines)
    assert all(line["correct"] for line in lines if line["audio"] == "own")
    assert scores["held-out"]["truncated_answers"] == scores["held-out"]["swapped_audio"]["truncated_answers"] == 0
    decoding = scores["held-out"]["decoding"]
    assert decoding == {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 64}
    assert all(line["truncated"] is False and line["decoding"] == decoding for line in lines)

    metrics = client.get_run(run_id).data.metrics
    assert metrics["eval/held-out/accuracy"] == 1.0
    assert metrics["eval/held-out/accuracy_sound"] == 1.0
    assert metrics["eval/held-out/swapped_audio_accuracy"] == scores["held-out"]["swapped_audio"]["accuracy"]
    (artifact,) = client.list_artifacts(run_id, EVALUATIONS)
    assert artifact.path == f"{EVALUATIONS}/held-out.json"


def test_a_folder_that_is_no_exported_model_is_refused(tmp_path: Path, features: FeatureSet) -> None:
    with pytest.raises(UserError, match="is not an exported model"):
        main([str(tmp_path), str(features.folder)])
    with pytest.raises(UserError, match="have the same name"):
        main([str(tmp_path), str(features.folder), str(features.folder)])
