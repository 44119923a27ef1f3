"""Maps an encoder's config to its contract (cheap) and to the encoder itself (loads its package and weights).

To add an encoder, subclass `Encoder` in a module of this folder, add its config to `EncoderConfig` in
`data_prep/config.py`, and handle it in `describe_encoder` and `build_encoder`, and in `_layout` if it has weights.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from data_prep.config import AfWhisperConfig, ClapConfig, EncoderConfig, LogMelConfig, SslamConfig, WhisperConfig
from data_prep.encoders.weights import find_model, read_json, read_tensors, weights_sha256
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import EncoderContract

if TYPE_CHECKING:
    from data_prep.encoders.base import Encoder

RESAMPLER = "torchaudio sinc_interp_hann, lowpass_filter_width 6, rolloff 0.99"
SOFTWARE = ("soundfile", "torch", "torchaudio", "transformers")
CODE_REVISION = "1"  # raise it whenever the encoders of this folder compute different features
PREPROCESSOR = "preprocessor_config.json"


def describe_encoder(config: EncoderConfig) -> EncoderContract:
    """Returns the contract of an encoder; hashes the weights where there are any, but loads no model.

    Raises:
        UserError: the weights do not exist or are of another kind.
    """
    software = {name: version(name) for name in SOFTWARE}
    if isinstance(config, LogMelConfig):
        return EncoderContract(
            kind=config.kind,
            revision=CODE_REVISION,
            sample_rate_hz=config.sample_rate_hz,
            frame_rate_hz=1000 / (config.hop_ms * config.frames_per_token),
            width=config.num_mels * config.frames_per_token,
            options={**config.model_dump(exclude={"kind", "sample_rate_hz"}), "resampler": RESAMPLER},
            software=software,
        )
    path = find_model(config.model, config.revision)
    layout, options = _layout(config, path)
    options |= config.model_dump(exclude={"kind", "model", "revision", "compile"}) | {"resampler": RESAMPLER}
    if options.get("window_s", 0) is None:  # the model's own: features are those of versions without this setting
        del options["window_s"]
    grid = layout.pop("grid", None)
    return EncoderContract(
        kind=config.kind,
        revision=CODE_REVISION,
        weights_sha256=weights_sha256(path),
        frame_rate_hz=layout.pop("frame_rate_hz") / config.pool,
        grid=None if grid is None else (-(-grid[0] // config.pool), grid[1]),
        options=options,
        software={**software, "weights": f"{config.model}@{config.revision}" if config.revision else config.model},
        **layout,
    )


def config_from_contract(contract: EncoderContract, model: str | None = None) -> EncoderConfig:
    """Returns the config whose `describe_encoder` gives this contract.

    Args:
        model: folder, file or Hub name of the weights; None means the location recorded in the contract.

    Raises:
        UserError: no encoder of this version has such a contract.
    """
    values = {name: value for name, value in contract.options.items() if name not in ("resampler", "preprocessor")}
    if contract.weights_sha256 is None:
        values["sample_rate_hz"] = contract.sample_rate_hz
    else:
        location = model or contract.software["weights"]
        name, _, revision = ("", "", "") if Path(location).exists() else location.partition("@")
        values |= {"model": name or location, "revision": revision or None}
    try:
        config: EncoderConfig = TypeAdapter(EncoderConfig).validate_python({**values, "kind": contract.kind})
    except ValidationError as error:
        fault = f"cannot be made by this version ({error.error_count()} settings do not fit)"
        raise UserError(f"encoder of kind {contract.kind}", fault, "use the version that made the features") from error
    return config


def build_encoder(config: EncoderConfig, contract: EncoderContract, device: str) -> Encoder:
    """Loads an encoder; call it once per process.

    Raises:
        UserError: the weights do not fit the model.
    """
    if isinstance(config, LogMelConfig):
        from data_prep.encoders.log_mel import LogMel

        return LogMel(config, contract)
    path = find_model(config.model, config.revision)
    match config:
        case WhisperConfig():
            from data_prep.encoders.whisper import Whisper

            return Whisper(config, contract, path, device)
        case AfWhisperConfig():
            from data_prep.encoders.whisper import AfWhisper

            return AfWhisper(config, contract, path, device)
        case ClapConfig():
            from data_prep.encoders.clap import Clap

            return Clap(config, contract, path, device)
        case SslamConfig():
            from data_prep.encoders.sslam import Sslam

            return Sslam(config, contract, path, device)


def _layout(
    config: WhisperConfig | AfWhisperConfig | ClapConfig | SslamConfig, path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns rates, width, grid and window of a model, read from its own files, and its preprocessor's settings."""
    if isinstance(config, SslamConfig):
        width = _sslam_width(path)
        return {"sample_rate_hz": 16000, "frame_rate_hz": 50.0, "width": width, "grid": (64, 8), "window_s": 10.24}, {}
    values = read_json(path / "config.json", path)
    audio = values.get("audio_config", values)
    extractor = read_json(path / PREPROCESSOR, path)
    settings = {k: v for k, v in sorted(extractor.items()) if isinstance(v, int | float | str) and "class" not in k}
    try:
        if isinstance(config, ClapConfig):
            stages, stride = len(audio["depths"]), audio["patch_stride"]
            cells = audio["spec_size"] // 2 ** (stages - 1) // (stride if isinstance(stride, int) else stride[0])
            ratio = audio["spec_size"] // audio["num_mel_bins"]
            grid, window_s = (cells * ratio, cells // ratio), float(extractor["max_length_s"])
            width = audio["patch_embeds_hidden_size"] * 2 ** (stages - 1)
        else:
            grid, window_s, width = None, float(extractor["chunk_length"]), audio["d_model"]
        sample_rate_hz = extractor["sampling_rate"]
        if grid is not None:
            frames = float(grid[0] * grid[1])
        else:
            frames = audio["max_source_positions"] / (2 if isinstance(config, AfWhisperConfig) else 1)
    except KeyError as error:
        raise UserError(path, f"is not a model of kind {config.kind} (no {error.args[0]})", "check it") from error
    layout = {
        "sample_rate_hz": sample_rate_hz,
        "frame_rate_hz": frames / window_s,
        "width": width,
        "grid": grid,
        "window_s": window_s if isinstance(config, ClapConfig) else _chosen_window(config, window_s, frames),
    }
    return layout, {"preprocessor": settings}


def _chosen_window(config: WhisperConfig | AfWhisperConfig, longest_s: float, frames: float) -> float:
    """Returns the window of a config, which holds whole frames and is no longer than the model's."""
    if config.window_s is None:
        return longest_s
    frame_s = longest_s / frames
    if config.window_s > longest_s:
        raise UserError("window_s", f"{config.window_s} is longer than the model's {longest_s:g}", "lower it")
    if abs(config.window_s / frame_s - round(config.window_s / frame_s)) > 1e-6:
        raise UserError("window_s", f"{config.window_s} is not a multiple of a frame ({frame_s:g} s)", "round it")
    return config.window_s


def _sslam_width(path: Path) -> int:
    tensors = read_tensors(path)
    for name, tensor in tensors.get("model", tensors).items():
        if name.endswith("extra_tokens"):
            return int(tensor.shape[-1])
    raise UserError(path, "is not an SSLAM checkpoint (no extra_tokens)", "check encoders.*.model")
