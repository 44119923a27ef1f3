"""Whisper's encoder and AF-Whisper (Audio Flamingo 3) from transformers, on log-mel windows of 30 s or less."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2AudioEncoderConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data_prep.audio.windows import Window
from data_prep.config import AfWhisperConfig, WhisperConfig
from data_prep.encoders.base import Encoder
from data_prep.encoders.weights import read_json, read_tensors, to_device
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import EncoderContract

AUDIO_TOWER = "audio_tower."  # prefix of the encoder's tensors inside the whole Audio Flamingo 3


class _WhisperMel(Encoder):
    """What Whisper and AF-Whisper share: the feature extractor."""

    def __init__(self, config: WhisperConfig | AfWhisperConfig, contract: EncoderContract, path: Path) -> None:
        self.contract = contract
        self.pool = config.pool
        self._extractor = WhisperFeatureExtractor.from_pretrained(path)
        if config.window_s is not None:
            self._extractor.n_samples = round(config.window_s * self._extractor.sampling_rate)
        self.window_samples = self._extractor.n_samples

    def prepare(self, window: Window) -> Tensor:
        """Returns log-mel (mels, frames) of a window padded with silence; the floor is relative to its maximum."""
        rate_hz = self._extractor.sampling_rate
        return self._extractor(window.audio, sampling_rate=rate_hz, return_tensors="pt").input_features[0]

    def _shorten(self, model: WhisperEncoder | Qwen2AudioEncoder) -> None:
        """Leaves only the positions of the window in an encoder."""
        positions = self.window_samples // self._extractor.hop_length // 2  # the second convolution has a stride of two
        if positions < model.config.max_source_positions:
            model.config.max_source_positions = positions
            model.embed_positions = nn.Embedding.from_pretrained(model.embed_positions.weight[:positions].clone())

    @abstractmethod
    def encode(self, inputs: list[Tensor], samples: list[int]) -> Tensor: ...

    def _mel_frames(self, samples: int) -> int:
        return -(-samples // self._extractor.hop_length)


class Whisper(_WhisperMel):
    """Encodes to frames of 20 ms; attention includes the padding up to 30 s, as in the model's training."""

    def __init__(self, config: WhisperConfig, contract: EncoderContract, path: Path, device: str) -> None:
        super().__init__(config, contract, path)
        self._layer = config.layer
        model = WhisperModel.from_pretrained(path).get_encoder()
        self._shorten(model)
        self._model = to_device(model, device, config.dtype, config.compile)
        if config.layer is not None and config.layer > len(self._model.layers):
            raise UserError("layer", f"{config.layer} of {len(self._model.layers)}", "choose a layer of the encoder")

    def num_frames(self, samples: int) -> int:
        return (self._mel_frames(samples) - 1) // 2 + 1

    def encode(self, inputs: list[Tensor], samples: list[int]) -> Tensor:
        mel_BMF = torch.stack(inputs).to(self._model.device, self._model.dtype)
        output = self._model(mel_BMF, output_hidden_states=self._layer is not None)
        return output.last_hidden_state if self._layer is None else output.hidden_states[self._layer]


class AfWhisper(_WhisperMel):
    """Encodes to frames of 40 ms (pairs averaged, then normalised); attention excludes the padding after the audio."""

    def __init__(self, config: AfWhisperConfig, contract: EncoderContract, path: Path, device: str) -> None:
        super().__init__(config, contract, path)
        values = read_json(path / "config.json", path)
        tensors = read_tensors(path)
        if "audio_config" in values:
            values = values["audio_config"]
            tensors = {k.removeprefix(AUDIO_TOWER): t for k, t in tensors.items() if k.startswith(AUDIO_TOWER)}
        sizes = {k: v for k, v in values.items() if k not in ("model_type", "architectures", "torch_dtype", "dtype")}
        model = Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**sizes))
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if missing or unexpected:
            raise UserError(path, f"is not AF-Whisper (tensor {[*missing, *unexpected][0]})", "check encoders.*.model")
        self._shorten(model)
        self._model = to_device(model, device, config.dtype, config.compile)

    def num_frames(self, samples: int) -> int:
        return ((self._mel_frames(samples) - 1) // 2 + 1) // 2

    def encode(self, inputs: list[Tensor], samples: list[int]) -> Tensor:
        mel_BMF = torch.stack(inputs).to(self._model.device, self._model.dtype)
        positions = torch.arange(mel_BMF.shape[-1] // 2, device=mel_BMF.device)
        lengths = torch.tensor([(self._mel_frames(n) - 1) // 2 + 1 for n in samples], device=mel_BMF.device)
        padding_BF = positions >= lengths[:, None]
        mask_B1FF = torch.zeros(padding_BF.shape, dtype=mel_BMF.dtype, device=mel_BMF.device)
        mask_B1FF = mask_B1FF.masked_fill(padding_BF, -torch.inf)[:, None, None].expand(-1, 1, len(positions), -1)
        return self._model(mel_BMF, attention_mask=mask_B1FF).last_hidden_state
