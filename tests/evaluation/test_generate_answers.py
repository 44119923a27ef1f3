"""The work of an evaluation is partitioned over nodes and their processes."""

from pipeline.evaluation.generate_answers import Partition


def test_partitions_of_partitions_cover_the_work() -> None:
    parts = [Partition(node, 3).split(process, 2) for node in range(3) for process in range(2)]
    assert parts == [Partition(index, 6) for index in range(6)]
