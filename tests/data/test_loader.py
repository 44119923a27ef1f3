import itertools
import time

import numpy as np
import pytest
import torch

from pipeline.config import DataConfig, TrainConfig
from pipeline.core.errors import UserError
from pipeline.core.ranks import Ranks
from pipeline.data.chat_template import ChatTemplate, load_tokenizer
from pipeline.data.collate import Example, collate
from pipeline.data.feature_set import FeatureSet, open_mixture
from pipeline.data.loader import TrainingLoader, evaluation_batches
from tests.helpers.feature_sets import byte_tokenizer, frames_of, write_feature_set

COUNTS = [3, 1, 2, 6, 4, 0, 5, 2, 3, 1]
WIDTHS = {"log_mel": 8, "clap": 4}


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> FeatureSet:
    return FeatureSet(write_feature_set(tmp_path_factory.mktemp("set"), COUNTS, encoders=WIDTHS), list(WIDTHS))


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return ChatTemplate(load_tokenizer(folder), "You listen.", max_text_tokens=500)


def ranks_of(rank: int = 0, world_size: int = 1) -> Ranks:
    return Ranks(rank, world_size, 0, 1)


def loader(features, chat, rank=0, world_size=1, audio_positions=None, **settings) -> TrainingLoader:
    """A loader of 8 rows per step unless `settings` of the two config sections, or `examples_per_step`, differ."""
    train = {name: settings.pop(name) for name in TrainConfig.model_fields.keys() & settings.keys()}
    examples_per_step = settings.pop("examples_per_step", 8)
    data_config = DataConfig(train=str(features.folder), **{"questions_per_sequence": 2, **settings})
    train["global_batch_size"] = examples_per_step * data_config.questions_per_sequence
    train_config = TrainConfig(**{"micro_batch_size": 2, "precision": "fp32", **train})
    sets = [features, *open_mixture(features, data_config)]
    return TrainingLoader(sets, chat, data_config, train_config, ranks_of(rank, world_size), audio_positions)


def batches_of(loader: TrainingLoader, num_steps: int) -> list[dict]:
    return [batch for step in itertools.islice(loader, num_steps) for batch in step]


def take(loaders: list[TrainingLoader], num_steps: int) -> list[list[str]]:
    """Question ids of each global batch, sorted."""
    iterators = [iter(this) for this in loaders]
    return [
        sorted(question for iterator in iterators for batch in next(iterator) for question in batch["question_ids"])
        for _ in range(num_steps)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_question_is_seen_once_an_epoch_at_any_world_size(features, chat, world_size, workers):
    loaders = [loader(features, chat, rank, world_size, workers=workers) for rank in range(world_size)]
    per_epoch = loaders[0].sampler.examples_per_epoch
    steps = take(loaders, per_epoch)  # eight epochs: whole epochs, which end where a global batch ends
    seen = [question for step in steps for question in step]
    expected = [f"clip-{clip}/{number}" for clip, count in enumerate(COUNTS) for number in range(count)]
    assert sorted(seen) == sorted(expected * 8)


def test_resume_at_another_world_size_continues_with_the_next_batch(features, chat):
    straight = take([loader(features, chat)], 9)
    two = [loader(features, chat, rank, 2, workers=rank) for rank in range(2)]
    assert take(two, 4) == straight[:4]
    states = [this.state_dict() for this in two]
    assert states[0] == states[1] and states[0]["packed_examples"] == 32
    four = [loader(features, chat, rank, 4) for rank in range(4)]
    for this in four:
        this.load_state_dict(states[0])
    assert take(four, 5) == straight[4:]


def test_a_second_iterator_continues_where_the_first_stopped(features, chat):
    this = loader(features, chat, workers=1)
    first = next(iter(this))
    assert len(first) == 4 and this.state_dict()["packed_examples"] == 8  # whatever the workers have prefetched
    assert take([this], 2) == take([loader(features, chat)], 3)[1:]


@pytest.mark.parametrize("change", [{"seed": 1}, {"tasks": ["what"]}, {"questions_per_sequence": 1}])
def test_a_state_of_another_sampling_order_is_refused(features, chat, change):
    with pytest.raises(UserError, match="is not the sampling order"):
        loader(features, chat, **change).load_state_dict(loader(features, chat).state_dict())


def test_batches_have_the_form_the_model_reads(features, chat):
    batch = next(iter(loader(features, chat)))[0]
    shape = batch["input_ids"].shape
    assert all(batch[name].shape == shape for name in ("attention_mask", "labels", "segment_ids"))
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "labels", "segment_ids"))
    clips = [int(clip_id.removeprefix("clip-")) for clip_id in batch["clip_ids"]]
    assert (batch["input_ids"] == chat.audio_token_id).sum(1).tolist() == [1, 1]
    assert batch["audio_s"] == [1.0 + clip for clip in clips]
    for name, width in WIDTHS.items():
        expected = [frames_of(clip, width) for clip in clips]
        assert batch["audio_lengths"][name].tolist() == [len(frames) for frames in expected]
        assert (batch["audio_features"][name].numpy() == np.concatenate(expected)).all()
        assert batch["audio_features"][name].dtype == torch.float32
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["input_ids"][padding] == chat.pad_token_id).all()
    assert (batch["labels"][padding] == -100).all() and (batch["labels"][:, 0] == -100).all()
    answers = [chat.decode(row[row != -100].tolist()) for row in batch["labels"]]
    assert "".join(answers) == "".join(
        f"answer {question.removeprefix('clip-').replace('/', '.')}" for question in batch["question_ids"]
    )


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.float16)]
)
def test_features_have_the_dtype_of_the_precision(features, chat, precision, dtype):
    train = TrainConfig(micro_batch_size=2, precision=precision)
    (batch,) = evaluation_batches(features, chat, np.array([0, 4]), train, ranks_of())
    clips = [int(clip_id.removeprefix("clip-")) for clip_id in batch["clip_ids"]]
    assert sorted(clips) == [0, 2]
    expected = torch.from_numpy(np.concatenate([frames_of(clip, 8) for clip in clips])).to(dtype)
    assert batch["audio_features"]["log_mel"].dtype == dtype
    assert torch.equal(batch["audio_features"]["log_mel"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_collate_converts_features_to_any_dtype(features, chat, dtype):
    clips = [features.clip(index) for index in (0, 2)]
    arrays = [features.features(index, clip.clip_id) for index, clip in zip((0, 2), clips, strict=True)]
    examples = [
        Example(chat.row(clip.questions), clip.questions, clip, frames)
        for clip, frames in zip(clips, arrays, strict=True)
    ]
    batch = collate(examples, pad_token_id=chat.pad_token_id, widths=WIDTHS, feature_dtype=dtype)
    expected = torch.from_numpy(np.concatenate([frames_of(index, 8) for index in (0, 2)])).to(dtype)
    assert torch.equal(batch["audio_features"]["log_mel"], expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_each_question_once_in_equally_many_batches(features, chat, world_size):
    selected, train = features.table.select(), TrainConfig(micro_batch_size=3)
    ranks = [
        list(evaluation_batches(features, chat, selected, train, ranks_of(rank, world_size)))
        for rank in range(world_size)
    ]
    seen = [question for rank in ranks for batch in rank for question in batch["question_ids"]]
    assert len(seen) == len(set(seen)) == len(selected)
    assert len({len(rank) for rank in ranks}) == 1
    for batch in itertools.chain(*ranks):  # filler rows have a clip and no label
        labelled = (batch["labels"] != -100).any(1)
        assert labelled.sum() == len(batch["question_ids"])
        assert len(batch["clip_ids"]) == len(batch["input_ids"])


def test_evaluation_keeps_the_bound_on_positions(features, chat):
    selected = features.table.select()[::2]
    train = TrainConfig(micro_batch_size=4, micro_batch_tokens=300)
    batches = list(evaluation_batches(features, chat, selected, train, ranks_of(), int))
    assert sorted(question for batch in batches for question in batch["question_ids"]) == sorted(
        question.question_id for question in list(features.questions())[::2]
    )
    sizes = set()
    for batch in batches:
        lengths = batch["attention_mask"].sum(1) - 1 + torch.tensor(batch["audio_s"]).long()
        assert lengths.max() * len(lengths) <= 300
        sizes.add(len(lengths))
    assert max(sizes) > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_error_crosses_from_a_worker_unchanged(features, tmp_path, workers):
    byte_tokenizer().save_pretrained(tmp_path)
    short = ChatTemplate(load_tokenizer(tmp_path), "You listen.", max_text_tokens=60)
    with pytest.raises(UserError, match=r"question 'clip-\d/\d': is \d+ text tokens long"):
        next(iter(loader(features, short, workers=workers)))


def test_a_global_batch_that_does_not_divide_is_named(features, chat):
    with pytest.raises(UserError, match="multiple of 4 sequences"):
        loader(features, chat, world_size=4, examples_per_step=6)


def test_the_last_micro_batch_holds_the_remaining_rows(features, chat):
    """Every rank has micro-batches of the same sizes, and the questions of a step are those of even micro-batches."""
    ranks = [loader(features, chat, rank, 2, examples_per_step=10, micro_batch_size=4) for rank in range(2)]
    for steps in itertools.islice(zip(*ranks, strict=True), 4):
        assert [[len(batch["input_ids"]) for batch in batches] for batches in steps] == [[4, 1]] * 2
    uneven = [loader(features, chat, rank, 2, examples_per_step=10, micro_batch_size=4) for rank in range(2)]
    assert take(uneven, 4) == take([loader(features, chat, examples_per_step=10, micro_batch_size=5)], 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_are_prefetched_and_change_nothing(features, chat, tmp_path, workers):
    remote = FeatureSet(features.folder, list(WIDTHS), tmp_path)
    expected = take([loader(features, chat)], 6)
    assert take([loader(remote, chat, workers=workers)], 6) == expected
    this = FeatureSet(features.folder, list(WIDTHS), tmp_path / "other")
    batches = iter(loader(this, chat))
    next(batches)  # the thread prefetches without further requests
    for _ in range(500):
        if len(list((tmp_path / "other").rglob("*.mds"))) == 3 * len(features.shard_sizes):
            break
        time.sleep(0.01)
    else:
        pytest.fail("no shard was prefetched")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_bound_on_positions_changes_only_how_rows_are_grouped(features, chat, world_size):
    """Micro-batches hold as many rows as fit, every rank has as many of them, and each step has the same questions."""

    def audio(seconds: float) -> int:
        return 20 * int(seconds)

    settings = {"micro_batch_tokens": 500, "audio_positions": audio, "micro_batch_size": 6}
    ranks = [loader(features, chat, rank, world_size, **settings) for rank in range(world_size)]
    assert take(ranks, 6) == take([loader(features, chat)], 6)
    ranks = [loader(features, chat, rank, world_size, **settings) for rank in range(world_size)]
    numbers = set()
    for steps in itertools.islice(zip(*ranks, strict=True), 6):
        numbers.add(len(steps[0]))
        for together in zip(*steps, strict=True):
            assert len({len(batch["input_ids"]) for batch in together}) == 1
            for batch in together:
                lengths = batch["attention_mask"].sum(1) - 1 + 20 * torch.tensor(batch["audio_s"]).long()
                assert lengths.max() * len(lengths) <= 500 and len(lengths) <= 6
    assert len(numbers) > 1 or world_size == 2  # of micro-batches in a step
    with pytest.raises(UserError, match=r"train\.micro_batch_tokens: is 40, and a row has \d+ positions"):
        next(iter(loader(features, chat, micro_batch_tokens=40)))
    with pytest.raises(UserError, match="multiple of 4 sequences"):
        loader(features, chat, world_size=4, examples_per_step=6, micro_batch_tokens=500)


def test_lengths_equal_those_of_the_rows(features, chat):
    questions = list(features.questions())
    assert len(questions) == sum(COUNTS)
    expected = [len(chat.row([question]).input_ids) - len(chat.prefix) for question in questions]
    assert [after for _, after in chat.token_counts(questions)] == expected


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_feature_set(tmp_path_factory.mktemp("text"), [1] * 6, encoders={}, tasks=["chat"])


@pytest.mark.parametrize("workers", [0, 1])
def test_questions_about_no_clip_are_mixed_in(features, chat, text, workers):
    this = loader(features, chat, workers=workers, mixture=[{"path": text, "share": 0.5}])
    batches = batches_of(this, 10)
    for batch in batches:
        placeholders = (batch["input_ids"] == chat.audio_token_id).sum(1)
        assert placeholders.sum() == len(batch["clip_ids"]) == len(batch["audio_lengths"]["log_mel"])
        assert all(
            len(batch["audio_features"][name]) == batch["audio_lengths"][name].sum()
            and batch["audio_features"][name].shape[1] == width
            for name, width in WIDTHS.items()
        )
    tasks = [task for batch in batches for task in batch["tasks"]]
    rows = sum(len(batch["input_ids"]) for batch in batches)
    assert 0.3 < tasks.count("chat") / rows < 0.7
    assert any(not batch["clip_ids"] for batch in batches)  # whole batches without audio occur


def test_a_mixture_can_weight_the_tasks_of_one_set(features, chat):
    this = loader(
        features, chat, tasks=["what"], questions_per_sequence=1, mixture=[{"tasks": ["count"], "share": 0.2}]
    )
    steps = int(np.ceil(this.steps_per_epoch)) * 4
    tasks = [task for batch in batches_of(this, steps) for task in batch["tasks"]]
    assert set(tasks) == {"what", "count"} and abs(tasks.count("count") / len(tasks) - 0.2) < 0.05


def test_a_mixture_resumes_at_another_world_size(features, chat, text):
    mixture = [{"path": text, "share": 0.3}]
    straight = take([loader(features, chat, mixture=mixture)], 9)
    two = [loader(features, chat, rank, 2, mixture=mixture) for rank in range(2)]
    assert take(two, 4) == straight[:4]
    one = loader(features, chat, mixture=mixture)
    one.load_state_dict(two[1].state_dict())
    assert take([one], 5) == straight[4:]
    with pytest.raises(UserError, match="is not the sampling order"):
        loader(features, chat).load_state_dict(two[0].state_dict())


def test_bad_mixtures_are_named(features, chat, tmp_path):
    other = write_feature_set(tmp_path / "other", [2], encoders={"log_mel": 8, "clap": 5})
    with pytest.raises(UserError, match=r"features of 'clap' have fingerprint \w+, but data\.train"):
        loader(features, chat, mixture=[{"path": other, "share": 0.1}])
    with pytest.raises(UserError, match=r"data\.mixture\.0\.tasks: the feature set has no 'sing'"):
        loader(features, chat, mixture=[{"tasks": ["sing"], "share": 0.1}])
