"""Tests tables and archives that hold conversations, and archives whose columns select segments."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_prep.audio.fragments import split_fragment
from data_prep.config import PrepareConfig
from data_prep.files import open_audio
from data_prep.manifests.clips import Clip, RejectedRow
from data_prep.manifests.reader import audio_path, audio_roots, read_clips
from pipeline.config import load_config
from pipeline.core.errors import UserError
from tests.data_prep.test_archive_formats import write_tar
from tests.data_prep.test_manifest_formats import wav_bytes
from tests.helpers.corpora import prepare_config

WAVS = [wav_bytes(300), wav_bytes(400), wav_bytes(500)]
DIALOGUE = [
    {"role": "user", "content": "Is <audio> high, or low?"},
    {"role": "assistant", "content": "low, I think"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "yes"},
]
TURNS = [["Is ", 0, " high, or low?"], ["low, I think"], ["Sure?"], ["yes"]]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in DIALOGUE]


def read(manifest: Path, **table: Any) -> tuple[list[tuple[Clip, list[bytes]]], list[RejectedRow]]:
    """Returns the clips with the bytes of their audio, and the rejected rows."""
    config = prepare_config(manifest, manifest.parent / "out", table=table, audio_root=None)
    rows = list(read_clips(config))
    roots = audio_roots(config)
    clips = []
    for clip in rows:
        if isinstance(clip, Clip):
            stored = open_audio(split_fragment(audio_path(clip, roots))[0])
            clips.append((clip, Path(stored).read_bytes() if isinstance(stored, str) else stored.read()))
    return clips, [row for row in rows if isinstance(row, RejectedRow)]


def parquet(folder: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pa.table(columns), folder / "m.parquet")
    return folder / "m.parquet"


def embedded(number: int) -> dict:
    return {"bytes": WAVS[number], "path": f"{number}.wav"}


def files(folder: Path) -> list[str]:
    for number, wav in enumerate(WAVS):
        (folder / f"{number}.wav").write_bytes(wav)
    return [f"{number}.wav" for number in range(len(WAVS))]


def table_file(folder: Path, header: list[str], row: list[str]) -> Path:
    with (folder / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, row])
    return folder / "m.csv"


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "embedded": lambda f: parquet(f, sound=[embedded(1)], messages=[DIALOGUE]),
    "list of embedded": lambda f: parquet(f, audios=[[embedded(1)]], messages=[DIALOGUE]),
    "paths in Parquet": lambda f: parquet(f, audios=[[files(f)[1]]], messages=[DIALOGUE]),
    "ShareGPT as text": lambda f: parquet(f, audio=[embedded(1)], conversations=[json.dumps(SHAREGPT)]),
    "WebDataset": lambda f: write_tar(
        f / "m.tar", [("a.wav", WAVS[1]), ("a.json", json.dumps({"conversations": SHAREGPT}).encode())]
    ),
    "CSV": lambda f: table_file(f, ["audio", "messages"], [files(f)[1], json.dumps(DIALOGUE)]),
    "CSV of lists": lambda f: table_file(f, ["audios", "messages"], [json.dumps(files(f)[1:2]), json.dumps(DIALOGUE)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_of_conversations_are_read_like_records_of_json(tmp_path, layout):
    ((clip, audio),), rejects = read(LAYOUTS[layout](tmp_path))
    assert rejects == [] and audio == WAVS[1]
    (question,) = clip.questions
    assert [turn.content for turn in question.turns] == TURNS


def test_each_sound_of_a_list_stands_at_its_placeholder(tmp_path):
    turns = [
        {"role": "user", "content": "<audio>, <audio> or <audio>?"},
        {"role": "assistant", "content": "the second"},
    ]
    clips, _ = read(parquet(tmp_path, audios=[[embedded(2), embedded(0), embedded(1)]], messages=[turns]))
    assert [audio for _, audio in clips] == [WAVS[2], WAVS[0], WAVS[1]]
    (question,) = clips[0][0].questions
    assert question.turns[0].content == [0, ", ", 1, " or ", 2, "?"]
    assert question.clips == [clip.clip_id for clip, _ in clips[1:]]


def test_labels_and_segments_of_a_conversation_come_from_the_templates(tmp_path):
    columns = {"audio": [embedded(0)], "messages": [DIALOGUE], "start": [0.001], "end": [0.002], "kind": ["music"]}
    manifest = parquet(tmp_path, **columns)
    ((clip, _),), _ = read(manifest, start="{start}", end="{end}", domain="{kind}", task="chat", clip_id="c-{kind}")
    assert (clip.clip_id, clip.start_s, clip.end_s, clip.domain) == ("c-music", 0.001, 0.002, "music")
    assert clip.questions[0].task == "chat"
    ((clip, _),), _ = read(manifest, start=None)
    assert clip.start_s is None and clip.end_s is None


def test_a_row_that_is_no_conversation_of_ours_is_rejected_alone(tmp_path):
    tool = [*DIALOGUE, {"role": "tool", "content": "x"}]
    manifest = parquet(tmp_path, audio=[embedded(n) for n in range(3)], messages=[tool, DIALOGUE, None])
    clips, rejects = read(manifest)
    assert [clip.clip_id for clip, _ in clips] == ["1.wav"]
    assert {(row.clip_id, row.reason) for row in rejects} == {
        (f"{manifest}#0/0", "unsupported"),
        (f"{manifest}#0/2", "empty_field"),
    }


def test_a_member_is_not_taken_for_several_sounds(tmp_path):
    record = json.dumps({"messages": DIALOGUE, "audios": ["a.wav", "b.wav"]}).encode()
    clips, (row,) = read(write_tar(tmp_path / "m.tar", [("a.wav", WAVS[0]), ("a.json", record)]))
    assert clips == [] and row.detail == "field 'audios' names 2 sounds, and the row holds 1"


def test_text_that_is_no_conversation_is_named(tmp_path):
    manifest = table_file(tmp_path, ["audio", "messages"], [files(tmp_path)[0], "[{'role': 'user'}]"])
    with pytest.raises(UserError, match=r"m\.csv:2: messages"):
        read(manifest)


def test_lists_of_sounds_need_conversations(tmp_path):
    with pytest.raises(UserError, match="has a list of sounds in its column 'audios'"):
        read(parquet(tmp_path, audios=[[embedded(0)]], answer=["rain"]), question="What?")


@pytest.mark.parametrize(("end", "value"), [("end", 2.5), ("duration", 1.0)])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_times_of_an_archive_need_templates(tmp_path, kind, end, value):
    fields = {"start": 1.5, end: value, "answer": "rain"}
    if kind == "tar":
        members = [("a.wav", WAVS[0]), ("a.json", json.dumps(fields).encode())]
        manifest = write_tar(tmp_path / "m.tar", members)
    else:
        manifest = parquet(tmp_path, audio=[embedded(0)], **{key: [value] for key, value in fields.items()})
    with pytest.raises(UserError, match=f"has columns 'start' and '{end}'") as error:
        read(manifest, question="What?")
    assert f'table: {{start: "{{start}}", {end}: "{{{end}}}"}}' in str(error.value)
    ((clip, _),), _ = read(manifest, question="What?", start=None)
    assert clip.end_s is None
    ((clip, _),), _ = read(manifest, question="What?", start="{start}", **{end: f"{{{end}}}"})
    assert (clip.start_s, clip.end_s) == (1.5, 2.5)


def test_a_table_has_an_end_or_a_duration():
    with pytest.raises(UserError, match=r"table\.duration: is given beside table\.end"):
        load_config(PrepareConfig, "demo_prepare", ["table.end='{end}'", "table.duration='{duration}'"])


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations_beside_a_question_of_all_rows_are_not_passed_over(tmp_path, column):
    manifest = parquet(tmp_path, audio=[embedded(1)], answer=["rain"], **{column: [DIALOGUE]})
    with pytest.raises(UserError, match=f"has conversations in its column '{column}', which no template names"):
        read(manifest, question="What?")
    ((clip, _),), _ = read(manifest)  # the remedy
    assert clip.questions[0].turns is not None
    ((clip, _),), _ = read(manifest, question=f"{{{column}[2][content]}}", answers=[f"{{{column}[3][content]}}"])
    assert (clip.questions[0].question, clip.questions[0].answer) == ("Sure?", "yes")
