import hashlib
from collections import Counter

import numpy as np
import pytest

from pipeline.core.errors import UserError
from pipeline.data.sampler import MixtureSampler, PackedExample, PackedSampler, split_micro_batches

COUNTS = [3, 1, 7, 0, 6, 6, 2, 5, 12, 1, 4]
CLIP = np.repeat(np.arange(len(COUNTS)), COUNTS)
SHARDS = [3, 4, 4]


def sampler(selected=None, questions_per_sequence=2, seed=0, block_clips=4, clip=CLIP, shards=SHARDS) -> PackedSampler:
    selected = np.arange(len(clip)) if selected is None else selected
    return PackedSampler(
        clip, selected, shards, questions_per_sequence=questions_per_sequence, block_clips=block_clips, seed=seed
    )


def keys(packed_examples: list[PackedExample]) -> list[tuple[int, ...]]:
    return [(example.clip, *example.questions.tolist()) for example in packed_examples]


def steps(
    sampler: PackedSampler | MixtureSampler, world_size: int, start: int, num_steps: int, examples_per_step: int = 8
) -> list[list]:
    """Global batches as sorted keys of packed examples, gathered from the micro-batches of all ranks."""
    batches = []
    for first in range(start, start + num_steps * examples_per_step, examples_per_step):
        packed_examples = sampler.packed_examples(first, first + examples_per_step)
        ranks = [
            split_micro_batches(packed_examples, length_of, lambda _: 2, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        batches.append(sorted(key for rank in ranks for batch in rank for key in keys(batch)))
    return batches


def length_of(example: PackedExample) -> float:
    return float((example.questions % 5 + 1).sum())


@pytest.mark.parametrize("questions_per_sequence", [1, 2, 6, 100])
def test_every_selected_question_is_seen_once_an_epoch(questions_per_sequence):
    selected = np.array([0, 2, 3, 5, 6, 8, 9, 10, 11, 17, 20, 25, 30, 31, 32, 33, 40, 46])
    this = sampler(selected, questions_per_sequence)
    per_epoch = this.examples_per_epoch
    for epoch in range(3):
        packed_examples = this.packed_examples(epoch * per_epoch, (epoch + 1) * per_epoch)
        assert sorted(np.concatenate([example.questions for example in packed_examples])) == selected.tolist()
        for example in packed_examples:
            assert 1 <= len(example.questions) <= questions_per_sequence
            assert (CLIP[example.questions] == example.clip).all()


def test_there_are_as_few_packed_examples_as_possible():
    assert sampler(questions_per_sequence=6).examples_per_epoch == sum(-(-count // 6) for count in COUNTS)


def test_the_order_depends_on_epoch_and_seed_only():
    this = sampler()
    first, second = (
        keys(this.packed_examples(e * this.examples_per_epoch, (e + 1) * this.examples_per_epoch)) for e in (0, 1)
    )
    assert first != second
    assert {frozenset(example) for example in first} != {
        frozenset(example) for example in second
    }  # questions are grouped anew, too
    assert keys(sampler(seed=1).packed_examples(0, 10)) != first[:10]
    assert keys(sampler().packed_examples(0, 10)) == first[:10]


def test_any_position_is_computed_without_the_earlier_ones():
    whole = keys(sampler().packed_examples(0, 100))
    assert keys(sampler().packed_examples(70, 100)) == whole[70:]


def test_packed_examples_of_a_clip_are_spread_over_the_epoch():
    clip = np.repeat(np.arange(200), 6)
    this = sampler(clip=clip, questions_per_sequence=1, shards=[50] * 4, block_clips=100)
    packed_examples = this.packed_examples(0, this.examples_per_epoch)
    for sixth in range(6):  # one packed example of each clip in each sixth of the epoch
        assert Counter(example.clip for example in packed_examples[sixth * 200 : (sixth + 1) * 200]) == Counter(
            range(200)
        )


def test_clips_with_few_questions_come_late_as_often_as_early():
    clip = np.concatenate([np.arange(1000), np.repeat(np.arange(1000, 2000), 4)])
    this = sampler(clip=clip, questions_per_sequence=1, shards=[2000], block_clips=10_000)
    few = [example.clip < 1000 for example in this.packed_examples(0, this.examples_per_epoch)]
    share = np.array(few).reshape(5, -1).mean(1)
    assert np.allclose(share, 0.2, atol=0.05)


def test_a_block_reads_only_its_shards():
    clip = np.arange(1000)
    this = sampler(clip=clip, questions_per_sequence=1, shards=[10] * 100, block_clips=50)
    clips = np.array([example.clip for example in this.packed_examples(0, 1000)])
    shards_per_block = [len(set(block // 10)) for block in clips.reshape(-1, 50)]
    assert shards_per_block == [5] * 20
    assert (np.diff(clips // 10) != 0).mean() > 0.5  # shuffled inside the block
    assert len(set(clips[:50] // 10)) == 5 and clips[:50].max() - clips[:50].min() > 50  # shards come in random order


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_are_the_same_at_any_world_size_and_after_resume(world_size):
    expected = steps(sampler(), 1, 0, 12)
    assert steps(sampler(), world_size, 0, 12) == expected
    assert steps(sampler(), world_size, 5 * 8, 7) == expected[5:]
    stream = keys(sampler().packed_examples(0, 12 * 8))  # the last batch of an epoch continues in the next one
    assert expected == [sorted(stream[k * 8 : (k + 1) * 8]) for k in range(12)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("budget", [5, 9, 20, 1000])
def test_micro_batches_are_as_large_as_their_bound_allows(world_size, budget):
    packed_examples = sampler(questions_per_sequence=1).packed_examples(0, 24)
    ranks = [
        split_micro_batches(
            packed_examples, length_of, lambda longest: int(budget // longest), rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert sorted(keys(packed_examples)) == sorted(key for rank in ranks for batch in rank for key in keys(batch))
    for together in zip(*ranks, strict=True):  # what the ranks compute at the same time
        assert len({len(batch) for batch in together}) == 1
        assert all(len(batch) * max(map(length_of, batch)) <= budget for batch in together)
    longest = [max(map(length_of, batch)) for batch in ranks[0]]
    assert longest == sorted(longest, reverse=True)
    for batch in ranks[0][:-1]:  # one more row of each rank would not fit
        assert (len(batch) + 1) * max(map(length_of, batch)) > budget


def test_an_empty_selection_is_named():
    with pytest.raises(UserError, match="no question is selected"):
        sampler(np.empty(0, np.int64))


def test_a_mixture_keeps_its_shares_and_the_order_of_each_sampler():
    main, other, few = sampler(), sampler(seed=1), sampler(np.arange(3), 1)
    mixed = MixtureSampler([main, other, few], [0.25, 0.1], seed=0)
    per_epoch = mixed.examples_per_epoch
    assert per_epoch == round(main.examples_per_epoch / 0.65)
    packed_examples = mixed.packed_examples(0, 3 * per_epoch)
    assert keys(mixed.packed_examples(per_epoch + 5, per_epoch + 9)) == keys(
        packed_examples[per_epoch + 5 : per_epoch + 9]
    )
    for epoch in range(3):
        count = Counter(example.source for example in packed_examples[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert count[0] == main.examples_per_epoch
        assert (count[1], count[2]) == (round(0.25 * per_epoch), round(0.1 * per_epoch))
    for source, this in enumerate([main, other, few]):  # no sampler skips or repeats a packed example
        examples = [example for example in packed_examples if example.source == source]
        assert keys(examples) == keys(this.packed_examples(0, len(examples)))
    interleavings = [
        [example.source for example in packed_examples[epoch * per_epoch :][:per_epoch]] for epoch in (0, 1)
    ]
    assert interleavings[0] != interleavings[1]


def test_a_mixture_is_the_same_at_any_world_size():
    def mixed() -> MixtureSampler:
        return MixtureSampler([sampler(), sampler(seed=1)], [0.3], seed=0)

    expected = steps(mixed(), 1, 0, 12)
    assert steps(mixed(), 4, 0, 12) == expected
    assert steps(mixed(), 2, 5 * 8, 7) == expected[5:]


@pytest.mark.parametrize(
    ("questions_per_sequence", "recorded"), [(1, "e41868c775e43ad0"), (2, "772bf17f538367c0"), (6, "362684814cbbc933")]
)
def test_the_order_of_plain_questions_is_the_recorded_one(questions_per_sequence, recorded):
    this = sampler(questions_per_sequence=questions_per_sequence, seed=5)
    order = keys(this.packed_examples(0, 3 * this.examples_per_epoch))
    assert hashlib.sha256(repr(order).encode()).hexdigest()[:16] == recorded
    coded = sampler(questions_per_sequence=questions_per_sequence, seed=5, clip=np.stack([CLIP, 0 * CLIP], axis=1))
    assert keys(coded.packed_examples(0, 3 * this.examples_per_epoch)) == order


def test_only_questions_with_the_same_code_share_a_packed_example():
    code = np.arange(len(CLIP)) % 3
    this = sampler(questions_per_sequence=4, clip=np.stack([CLIP, code], axis=1))
    packed = this.packed_examples(0, this.examples_per_epoch)
    assert sorted(np.concatenate([example.questions for example in packed])) == list(range(len(CLIP)))
    for example in packed:
        assert (CLIP[example.questions] == example.clip).all() and len(set(code[example.questions])) == 1
    assert any(len(example.questions) > 1 for example in packed)
