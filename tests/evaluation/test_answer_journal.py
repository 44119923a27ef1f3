"""The journal of an evaluation."""

from pathlib import Path

from pipeline.evaluation.answer_journal import AnswerJournal, fingerprint_job
from pipeline.inference.decoding import greedy_decoding
from pipeline.inference.responder import Reply


def write(folder: Path, fingerprint: str, replies: dict[int, Reply]) -> None:
    journal = AnswerJournal(folder, fingerprint)
    with journal.open_file() as file:
        journal.append(file, replies)


def test_a_journal_returns_texts_and_whether_they_are_truncated(tmp_path: Path) -> None:
    replies = {3: Reply("a dog\n“barks”", False), 1: Reply("two", True)}
    write(tmp_path, "f", replies)
    with next(tmp_path.glob("*.jsonl")).open("a") as file:
        file.write('["f", 4, "half a li')
    assert AnswerJournal(tmp_path, "f").read() == replies


def test_answers_that_were_decoded_otherwise_are_not_reused(tmp_path: Path) -> None:
    settings = greedy_decoding(64)
    fingerprints = [
        fingerprint_job("model", decoding, {0: 0}, "set")
        for decoding in (settings, settings | {"repetition_penalty": 1.05}, greedy_decoding(65), {"num_beams": 1})
    ]
    assert len(set(fingerprints)) == 4
    write(tmp_path, fingerprints[1], {0: Reply("penalised", False)})
    assert AnswerJournal(tmp_path, fingerprints[0]).read() == {}


def test_a_line_of_an_older_journal_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text('["older", 0, "an answer"]\n')
    write(tmp_path, "f", {0: Reply("new", False)})
    assert AnswerJournal(tmp_path, "f").read() == {0: Reply("new", False)}
