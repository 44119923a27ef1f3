"""Recognises language models in GGUF files (llama.cpp), which cannot be trained, and says how to convert them."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.errors import UserError

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def refuse_gguf(language_model: str | Path) -> None:
    """Checks that a language model is not a GGUF file, or a folder whose only weights are GGUF files.

    Args:
        language_model: a folder, a file or a Hub name.

    Raises:
        UserError: it is one.
    """
    path = Path(language_model)
    if path.suffix.lower() == ".gguf" and path.is_file():
        files, has_weights = [path], False
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        has_weights = any(next(path.glob(pattern), None) for pattern in _WEIGHTS)
    else:
        return
    if not files or has_weights:
        return
    file = files[0]
    others = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
    load = f"C.from_pretrained('{file.parent}', gguf_file='{file.name}').save_pretrained('NEW_FOLDER')"
    code = f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; [{load} for C in (M, T)]"
    fault = f"holds a GGUF file, {file.name}{others}, which is for inference with llama.cpp"
    remedy = "name the model's Hugging Face folder, or convert the file: pip install gguf, then python -c "
    raise UserError(language_model, fault, f'{remedy}"{code}"')
