import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter

from pipeline.core.errors import UserError
from pipeline.core.feature_contract import CLIPS
from pipeline.data.feature_set import FeatureSet
from tests.helpers.feature_sets import frames_of, write_feature_set

COUNTS = [3, 1, 0, 4, 2, 2]
ENCODERS = {"log_mel": 8, "clap": 4}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_feature_set(tmp_path / "set", COUNTS, encoders=ENCODERS, clips_per_shard=2, datasets=["a", "b", "c"])


def read_all(folder: Path) -> None:
    features = FeatureSet(folder, list(ENCODERS))
    for index in range(len(features)):
        features.features(index, features.clip(index).clip_id)


def first_shard(folder: Path, column: str) -> Path:
    return folder / column / "part-00000" / "shard.00000.mds"


def test_random_access_reads_what_was_written(folder):
    features = FeatureSet(folder, ["clap", "log_mel"])
    assert len(features) == len(COUNTS) and features.widths == {"clap": 4, "log_mel": 8}
    for index in (5, 0, 3):
        clip = features.clip(index)
        assert clip.clip_id == f"clip-{index}" and clip.duration_s == 1.0 + index and clip.dataset == "abc"[index % 3]
        assert [question.question_id for question in clip.questions] == [
            f"clip-{index}/{number}" for number in range(COUNTS[index])
        ]
        arrays = features.features(index, clip.clip_id)
        for name, width in ENCODERS.items():
            assert arrays[name].dtype == np.float16
            assert (arrays[name] == frames_of(index, width)).all()


def test_the_question_table_describes_each_question_without_its_text(folder):
    features = FeatureSet(folder, ["log_mel"])
    table = features.table
    assert len(table) == sum(COUNTS)
    for index in range(len(table)):
        clip = features.clip(int(table.clip[index]))
        question = clip.questions[table.number[index]]
        assert table.tasks[table.task[index]] == question.task
        assert table.datasets[table.dataset[index]] == clip.dataset
        assert table.characters[index] == len(question.question) + len(question.answer)
        assert table.duration_s[table.clip[index]] == clip.duration_s


def test_the_table_reads_no_features(folder):
    for shard in (folder / "log_mel").rglob("*.mds"):
        shard.unlink()
    FeatureSet(folder, ["log_mel"])


def test_questions_are_selected_by_task_and_dataset(folder):
    table = FeatureSet(folder, ["log_mel"]).table
    assert table.select().tolist() == list(range(len(table)))
    count = table.select(tasks=["count"])
    assert {table.tasks[code] for code in table.task[count]} == {"count"}
    both = table.select(tasks=["what"], datasets=["a", "b"])
    assert {(table.tasks[table.task[i]], table.datasets[table.dataset[i]] in "ab") for i in both} == {("what", True)}
    assert 0 < len(both) < len(table.select(tasks=["what"])) < len(table)


@pytest.mark.parametrize(
    ("selection", "fault"),
    [
        ({"tasks": ["coun"]}, r"data\.tasks: the feature set has no 'coun'; did you mean 'count'"),
        ({"datasets": ["z"]}, r"data\.datasets: the feature set has no 'z'; choose from a, b, c"),
        ({"tasks": []}, "select no question"),
    ],
)
def test_bad_selections_are_named(folder, selection, fault):
    with pytest.raises(UserError, match=fault):
        FeatureSet(folder, ["log_mel"]).table.select(**selection)


def test_an_encoder_that_the_set_lacks_is_named(folder):
    with pytest.raises(UserError, match="not of 'whisper'"):
        FeatureSet(folder, ["whisper"])


def flip(folder: Path, column: str) -> Path:
    shard = first_shard(folder, column)
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1  # in the last sample's values: it would decode to another number
    shard.write_bytes(data)
    return shard


def truncate(folder: Path, column: str) -> Path:
    shard = first_shard(folder, column)
    shard.write_bytes(shard.read_bytes()[:-7])
    return shard


def remove(folder: Path, column: str) -> Path:
    first_shard(folder, column).unlink()
    return first_shard(folder, column)


def remove_index(folder: Path, column: str) -> Path:
    (folder / column / "index.json").unlink()
    return folder / column / "index.json"


def break_index(folder: Path, column: str) -> Path:
    index = folder / column / "index.json"
    index.write_text(index.read_text()[:-20])
    return index


def lose_partition(folder: Path, column: str) -> Path:
    index = folder / column / "index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "shards": values["shards"][1:]}))
    return folder / column


@pytest.mark.parametrize("damage", [flip, truncate, remove, remove_index, break_index, lose_partition])
@pytest.mark.parametrize("column", [CLIPS, "clap"])
def test_damage_is_detected_and_the_file_named(folder, damage, column):
    read_all(folder)
    file = damage(folder, column)
    with pytest.raises(UserError) as error:
        read_all(folder)
    assert str(file) in str(error.value)


def test_swapped_indexes_are_detected(folder):
    indexes = [folder / name / "index.json" for name in ("log_mel", CLIPS)]
    first, second = (index.read_text() for index in indexes)
    indexes[0].write_text(second)
    indexes[1].write_text(first)
    with pytest.raises(UserError, match=r"clips/index\.json: has columns"):
        read_all(folder)


def test_shards_in_another_order_than_the_clips_are_detected(folder):
    index = folder / "clap" / "index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "shards": values["shards"][::-1]}))
    with pytest.raises(UserError, match=r"clap/index\.json: has clip 'clip-4' at 0, clips/ has 'clip-0' there"):
        read_all(folder)


def test_columns_that_could_run_code_are_refused(folder):
    shutil.rmtree(folder / "clap")
    with MDSWriter(out=str(folder / "clap"), columns={"clip_id": "str", "features": "pkl"}, hashes=["xxh64"]) as writer:
        writer.write({"clip_id": "clip-0", "features": [1.0]})
    with pytest.raises(UserError, match="'features': 'pkl'"):
        read_all(folder)


def test_compressed_shards_are_refused(folder):
    shutil.rmtree(folder / "clap")
    columns = {"clip_id": "str", "features": "ndarray:float16"}
    with MDSWriter(out=str(folder / "clap"), columns=columns, compression="zstd", hashes=["xxh64"]) as writer:
        writer.write({"clip_id": "clip-0", "features": frames_of(0, 4)})
    with pytest.raises(UserError, match="compression zstd"):
        read_all(folder)


def test_shards_without_hashes_are_refused(folder):
    shutil.rmtree(folder / CLIPS)
    (folder / CLIPS).mkdir()
    source = write_feature_set(folder.parent / "other", COUNTS, encoders=ENCODERS)
    for part in (source / CLIPS).iterdir():
        (shutil.copytree if part.is_dir() else shutil.copy)(part, folder / CLIPS / part.name)
    index = folder / CLIPS / "index.json"
    values = json.loads(index.read_text())
    for shard in values["shards"]:
        shard["raw_data"]["hashes"] = {}
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"shard\.00000\.mds: has no xxh64 hash"):
        read_all(folder)
