"""`pal scratch` writes a folder that transformers loads and that is the same for the same config."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.core.errors import UserError
from pipeline.scratch import main

CONFIG = """
hidden_size: 16
intermediate_size: 32
num_layers: 2
num_heads: 2
num_key_value_heads: 1
vocab_size: 300
"""


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    (tmp_path / "small.yaml").write_text(CONFIG)
    row = {"clip_id": "c", "audio": "c.wav", "questions": [{"question": "What is it?", "answer": "a whistle"}] * 3}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    return [str(tmp_path / "small.yaml"), str(tmp_path / "model"), str(tmp_path / "train.jsonl")]


def test_the_model_loads_and_its_tokenizer_knows_the_manifest(inputs: list[str], tmp_path: Path) -> None:
    assert main([*inputs, "--json", str(tmp_path / "figures.json")]) == 0
    model = AutoModelForCausalLM.from_pretrained(inputs[1])
    tokenizer = AutoTokenizer.from_pretrained(inputs[1])
    assert json.loads((tmp_path / "figures.json").read_text())["parameters"] == model.num_parameters()
    ids = tokenizer("a whistle")["input_ids"]
    assert tokenizer.decode(ids) == "a whistle"
    assert len(ids) < len("a whistle"), "the tokenizer merges the words of the manifest"
    weights = (Path(inputs[1]) / "model.safetensors").read_bytes()
    assert main(inputs) == 0
    assert (Path(inputs[1]) / "model.safetensors").read_bytes() == weights


def test_the_spread_of_the_weights_is_a_setting_of_the_config(inputs: list[str]) -> None:
    assert main([*inputs, "--set", "initializer_range=0.1"]) == 0
    assert AutoModelForCausalLM.from_pretrained(inputs[1]).config.initializer_range == 0.1
    with pytest.raises(UserError, match="initializer_range"):
        main([*inputs, "--set", "initializer_range=0"])


def test_texts_of_conversations_are_read_and_unusual_line_separators_kept(inputs: list[str]) -> None:
    turns = [{"role": "user", "content": [0, "zebra zebra"]}, {"role": "assistant", "content": "quagga\u2028quagga"}]
    row = {"clip_id": "c", "audio": "c.wav", "questions": [{"turns": turns, "system": "okapi okapi"}] * 5}
    Path(inputs[2]).write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert main(inputs) == 0
    tokenizer = AutoTokenizer.from_pretrained(inputs[1])
    assert all(len(tokenizer(word)["input_ids"]) < len(word) for word in ("zebra", "quagga", "okapi"))


@pytest.mark.parametrize(
    ("text", "fault"), [(None, "cannot be read"), ("{", "not a manifest"), ("[]", "not a manifest")]
)
def test_a_bad_manifest_is_a_user_error(inputs: list[str], text: str | None, fault: str) -> None:
    manifest = Path(inputs[2])
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(UserError, match=fault):
        main(inputs)
