import json
import shutil

import pytest

from data_prep import validate
from pipeline.core.errors import run_command
from tests.helpers.corpora import prepare_config, prepare_here, write_corpus


@pytest.fixture(scope="module")
def valid_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    prepare_here(prepare_config(write_corpus(folder / "corpus", 6), folder / "set", partition_clips=3))
    return folder / "set"


@pytest.fixture
def root(valid_set, tmp_path):
    shutil.copytree(valid_set, tmp_path / "set")
    return tmp_path / "set"


def run(root, capsys) -> tuple[int, dict, str]:
    code = run_command(validate.main, [str(root), "--json", str(root.parent / "out.json")])
    return code, json.loads((root.parent / "out.json").read_text()), capsys.readouterr().err


def test_a_valid_set_has_no_problems(root, capsys):
    assert run(root, capsys) == (0, {"clips": 6, "questions": 12, "problems": []}, "")


def test_the_picture_is_drawn(root, capsys):
    assert validate.main([str(root), "--picture", str(root.parent / "set.png")]) == 0
    assert (root.parent / "set.png").read_bytes().startswith(b"\x89PNG")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


OTHER_INDEX, PART_INDEX = "clips/part-00001/index.json", "log_mel/part-00001/index.json"
RECORD = "commits/00001.json"
SHARD = "log_mel/part-00001/shard.00000.mds"


@pytest.mark.parametrize(
    ("damage", "file", "fault"),
    [
        (lambda r: flip(r / SHARD), SHARD, "hash"),
        (lambda r: (r / SHARD).write_bytes((r / SHARD).read_bytes()[:-10]), SHARD, "bytes"),
        (lambda r: (r / SHARD).unlink(), SHARD, "missing"),
        (lambda r: shutil.copy(r / OTHER_INDEX, r / PART_INDEX), PART_INDEX, "committed"),
        (lambda r: shutil.copy(r / "clips/index.json", r / "log_mel/index.json"), "log_mel/index.json", "index"),
        (lambda r: (r / "clips/index.json").unlink(), "clips/index.json", "missing"),
        (lambda r: (r / RECORD).write_bytes((r / RECORD).read_bytes()[:-10]), RECORD, "commit record"),
        (lambda r: (r / "rejects.jsonl").write_text('{"reason": "empty"}\n'), "rejects.jsonl", "holds 1 clips"),
        (lambda r: (r / "commits/00000.json").unlink(), "commits/00000.json", "missing"),
    ],
)
def test_damage_is_found_and_its_file_named(root, capsys, damage, file, fault):
    damage(root)
    code, figures, err = run(root, capsys)
    assert code == 1
    assert any(line.startswith(f"{file}: ") and fault in line for line in figures["problems"])
    assert file in err


def test_columns_of_other_clips_are_found(root, capsys):
    """Complete, committed shards with correct hashes but of other clips: only their content shows it."""
    paths = [root / f"commits/0000{i}.json" for i in range(2)]
    records = [json.loads(path.read_text()) for path in paths]
    columns = [record["columns"]["log_mel"] for record in records]
    for i, (path, record) in enumerate(zip(paths, records, strict=True)):
        record["columns"]["log_mel"] = columns[1 - i]  # its folder goes with it
        path.write_text(json.dumps(record))
    _, figures, _ = run(root, capsys)
    assert any(line.startswith("log_mel/part-00001: its clips differ from those of") for line in figures["problems"])
