"""`pal evaluate MODEL text=FILE`: the perplexity of a text file, before and after the training of a model."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.core.errors import UserError
from pipeline.evaluate import main
from pipeline.evaluation.perplexity import DocumentLosses, read_documents

TEXT = "What is it? A dog, and a dog.\n\nIs it <audio>?\nNo: it is\ta cat.\n\n" + "it is a dog " * 600


@pytest.fixture(scope="module")
def results(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Perplexities of an untrained PAL, and of its language model alone."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT)
    scores = {}
    for name in ("model", "lm"):
        arguments = [str(exported / name), f"text={folder / 'text.txt'}", "--json", str(folder / f"{name}.json")]
        assert main(arguments) == 0
        scores[name] = json.loads((folder / f"{name}.json").read_text())["text"]
    return scores


def test_an_untrained_model_equals_its_language_model(results) -> None:  # type: ignore[no-untyped-def]
    model, plain = results["model"], results["lm"]
    assert model["documents"] == 3
    assert model["perplexity"] == pytest.approx(math.exp(model["nats_per_token"]))
    low, high = model["nats_per_token_ci95"]
    assert low < model["nats_per_token"] < high
    assert model["increase"] == {"nats_per_token": pytest.approx(0, abs=1e-6), "ci95": pytest.approx([0, 0], abs=1e-6)}
    base = {key: value for key, value in model["base"].items() if key != "language_model"}
    assert base["tokens"] == plain["tokens"]
    assert base["nats_per_token"] == pytest.approx(plain["nats_per_token"], rel=1e-5)


def test_every_token_is_scored_once_as_transformers_scores_it(exported: Path, results) -> None:  # type: ignore[no-untyped-def]
    model = AutoModelForCausalLM.from_pretrained(exported / "lm")
    tokenizer = AutoTokenizer.from_pretrained(exported / "lm")
    nats, tokens = 0.0, 0
    for document in TEXT.split("\n\n"):
        ids = tokenizer("")["input_ids"] + tokenizer(document, add_special_tokens=False)["input_ids"]
        window = min(1024, model.config.max_position_embeddings)
        for first in range(0, len(ids) - 1, window - 1):
            row = torch.tensor([ids[first : first + window]])
            nats += model(row, labels=row).loss.item() * (row.shape[1] - 1)
            tokens += row.shape[1] - 1
    assert results["lm"]["tokens"] == tokens > window
    assert results["lm"]["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-4)


def test_a_missing_language_model_costs_the_comparison_alone(
    exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(exported / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.yaml"
    config.write_text(config.read_text().replace(str(exported / "lm"), str(tmp_path / "moved")))
    (tmp_path / "text.txt").write_text("It is a dog.")
    arguments = [str(tmp_path / "model"), f"text={tmp_path / 'text.txt'}", "--json", str(tmp_path / "s.json")]
    assert main(arguments) == 0
    assert "base" not in json.loads((tmp_path / "s.json").read_text())["text"]


def test_the_increase_is_the_difference_of_paired_documents() -> None:
    before = DocumentLosses(torch.tensor([10.0, 30.0]).double().numpy(), torch.tensor([10.0, 10.0]).double().numpy())
    after = DocumentLosses(before.nats + 5, before.tokens)
    assert after.difference(before) == {"nats_per_token": 0.5, "ci95": [0.5, 0.5]}
    assert before.scores()["nats_per_token"] == 2.0


def test_documents_are_rows_blocks_or_lines(tmp_path: Path) -> None:
    cases = {
        "a.jsonl": ('{"text": "one\\n\\ntwo"}\n\n{"text": "three"}\n', ["one\n\ntwo", "three"]),
        "b.txt": ("one\ntwo\r\n\r\nthree\n", ["one\ntwo", "three"]),
        "c.txt": ("\ufeffone\n two\n", ["one", " two"]),
    }
    for name, (text, documents) in cases.items():
        (tmp_path / name).write_bytes(text.encode())
        assert read_documents(tmp_path / name) == documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n\n", "holds no text"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "is not UTF-8"),
        ("rows.jsonl", b'{"content": "a"}\n', r"rows\.jsonl:1: has no field `text`"),
        ("rows.jsonl", b'{"text": 1}\n', r"rows\.jsonl:1: has a field `text` that is no text"),
    ],
)
def test_files_without_text_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_documents(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_documents(tmp_path / "absent.txt")
