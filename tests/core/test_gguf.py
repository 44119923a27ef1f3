import pytest

from pipeline.core.errors import UserError
from pipeline.core.gguf import refuse_gguf
from pipeline.data.chat_template import load_tokenizer
from pipeline.model.language_models import language_model_config, published_shape


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("a model")
    (tmp_path / "small.Q4_1.gguf").write_bytes(b"GGUF")
    return tmp_path


@pytest.mark.parametrize("read", [refuse_gguf, load_tokenizer, language_model_config, published_shape])
def test_a_folder_of_gguf_files_is_named_with_the_command_that_converts_it(folder, read):
    with pytest.raises(UserError) as error:
        read(str(folder))
    assert error.value.where == str(folder)
    assert f"from_pretrained('{folder}', gguf_file='small.Q4_1.gguf').save_pretrained(" in str(error.value)


def test_a_gguf_file_itself_is_refused(folder):
    with pytest.raises(UserError, match=r"holds a GGUF file, small\.Q4_1\.gguf, "):
        refuse_gguf(folder / "small.Q4_1.gguf")


def test_gguf_files_beside_weights_of_transformers_are_ignored(folder):
    (folder / "model.safetensors").write_bytes(b"")
    assert refuse_gguf(folder) is None
    assert refuse_gguf("org/name-GGUF") is None
