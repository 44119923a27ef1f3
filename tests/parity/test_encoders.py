"""Compares each encoder with its model called directly on one clip at a time, from files in the published formats."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    Qwen2AudioEncoderConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data_prep import config as configs
from data_prep.audio.windows import Windower
from data_prep.encoders.build import build_encoder, config_from_contract, describe_encoder
from pipeline.core.errors import UserError
from tests.parity import sslam_reference

# Several windows of each encoder, the last one partly filled, and clips shorter than a window.
SHORT = (0.1, 3.0, 31.0)
LONG = (10.0, 122.0)
ONE = (3.0,)


def variants(*variants_to_run: object) -> pytest.MarkDecorator:
    """Runs the first variant at all lengths, the longest as a slow test, and the other variants at one length."""
    first, *remaining = variants_to_run
    slow = pytest.param(first, LONG, marks=pytest.mark.slow)
    return pytest.mark.parametrize(
        ("variant", "lengths_s"), [(first, SHORT), slow, *((other, ONE) for other in remaining)]
    )


# Stored features are float16: half a unit in the last place of values up to 4, plus 1e-5 of the float32 pass.
HALF = 2e-3


def noise(seconds: float, rate_hz: int) -> np.ndarray:
    """Returns noise of rising loudness, so that windows and frames differ."""
    samples = round(seconds * rate_hz)
    audio = np.random.default_rng(samples).normal(0, 0.1, samples) * np.linspace(0.2, 1, samples)
    return audio.astype(np.float32)


def build(config):
    return build_encoder(config, describe_encoder(config), "cpu")


def encode_together(encoder, clips: list[np.ndarray]) -> list[np.ndarray]:
    """Returns float32 features of clips whose windows all share one batch."""
    windows = [list(Windower(encoder).push(audio, True)) for audio in clips]
    flat = [window for clip in windows for window in clip]
    samples = [window.samples for window in flat]
    with torch.inference_mode():
        features_BFD = encoder.encode([encoder.prepare(window) for window in flat], samples)
    frames = iter([f[: encoder.num_frames(n)].float().numpy() for f, n in zip(features_BFD, samples, strict=True)])
    return [np.concatenate([next(frames) for _ in clip]) for clip in windows]


def check(encoder, reference, lengths_s, tolerance: float = 1e-5) -> None:
    """Asserts that clips encoded in one batch equal `reference(audio)` of each clip alone."""
    rate_hz = encoder.contract.sample_rate_hz
    clips = [noise(seconds, rate_hz) for seconds in lengths_s]
    for seconds, ours, audio in zip(lengths_s, encode_together(encoder, clips), clips, strict=True):
        theirs = reference(audio)
        assert ours.shape == theirs.shape, seconds
        assert ours.shape[1] == encoder.contract.width
        assert abs(len(ours) - seconds * encoder.contract.frame_rate_hz) <= 16  # a partly filled row of a grid
        np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1, np.abs(theirs).max()))


def chunks(audio: np.ndarray, samples: int) -> list[np.ndarray]:
    return [audio[start : start + samples] for start in range(0, len(audio), samples)]


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=64, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=128, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=100, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, init_std=0.2,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


@variants(None, 2)
def test_whisper(whisper_folder, variant, lengths_s):
    layer = variant
    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder).model.encoder.eval()
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_folder)

    def reference(audio):
        out = []
        for window in chunks(audio, 480000):
            mel = extractor(window, sampling_rate=16000, return_tensors="pt").input_features
            with torch.inference_mode():
                states = model(mel, output_hidden_states=True)
            features = states.last_hidden_state if layer is None else states.hidden_states[layer]
            out.append(features[0, : math.ceil(len(window) / 320)].numpy())
        return np.concatenate(out)

    encoder = build(configs.WhisperConfig(kind="whisper", model=str(whisper_folder), layer=layer))
    assert encoder.contract.frame_rate_hz == 50.0
    check(encoder, reference, lengths_s)


def test_whisper_with_a_shorter_window_is_a_model_with_fewer_positions(whisper_folder):
    window_s = 4.0
    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder).model.encoder.eval()
    tensors = model.state_dict()
    tensors["embed_positions.weight"] = tensors["embed_positions.weight"][:200]
    shorter = WhisperEncoder(WhisperConfig(**{**model.config.to_dict(), "max_source_positions": 200})).eval()
    shorter.load_state_dict(tensors)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=4)

    def reference(audio):
        out = []
        for window in chunks(audio, 64000):
            mel = extractor(window, sampling_rate=16000, return_tensors="pt").input_features
            with torch.inference_mode():
                out.append(shorter(mel).last_hidden_state[0, : math.ceil(len(window) / 320)].numpy())
        return np.concatenate(out)

    encoder = build(configs.WhisperConfig(kind="whisper", model=str(whisper_folder), window_s=window_s))
    assert (encoder.contract.window_s, encoder.contract.frame_rate_hz) == (window_s, 50.0)
    check(encoder, reference, (0.1, 3.0, 9.0))


@pytest.mark.parametrize(("window_s", "fault"), [(31.0, "longer than the model's 30"), (0.015, "multiple of a frame")])
def test_a_window_that_the_encoder_cannot_have_is_refused(whisper_folder, window_s, fault):
    with pytest.raises(UserError, match=fault):
        describe_encoder(configs.WhisperConfig(kind="whisper", model=str(whisper_folder), window_s=window_s))


def test_settings_without_a_window_keep_their_fingerprint(whisper_folder):
    def describe(**values):
        return describe_encoder(configs.WhisperConfig(kind="whisper", model=str(whisper_folder), **values))

    assert "window_s" not in describe().options
    assert describe(window_s=4.0).fingerprint != describe().fingerprint
    contract = describe(window_s=4.0)
    assert config_from_contract(contract) == configs.WhisperConfig(
        kind="whisper", model=str(whisper_folder), window_s=4.0
    )


@variants("alone", "whole_model")
def test_af_whisper(tmp_path, variant, lengths_s):
    torch.manual_seed(0)
    config = Qwen2AudioEncoderConfig(
        num_mel_bins=128, d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128, init_std=0.2
    )
    model = Qwen2AudioEncoder(config).eval()
    model.save_pretrained(tmp_path)
    extractor = WhisperFeatureExtractor(feature_size=128)
    extractor.save_pretrained(tmp_path)
    if variant == "whole_model":  # as inside Audio Flamingo 3: one of several parts
        tensors = {f"audio_tower.{name}": tensor for name, tensor in model.state_dict().items()}
        save_file({**tensors, "language_model.x": torch.zeros(1)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(f'{{"audio_config": {config.to_json_string()}}}')

    def reference(audio):
        out = []
        for window in chunks(audio, 480000):
            batch = extractor(window, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
            after_conv = (int(batch.attention_mask.sum()) - 1) // 2 + 1
            mask = torch.zeros(1, 1, 1500, 1500)
            mask[..., after_conv:] = -torch.inf
            with torch.inference_mode():
                features = model(batch.input_features, attention_mask=mask).last_hidden_state
            out.append(features[0, : (after_conv - 2) // 2 + 1].numpy())
        return np.concatenate(out)

    encoder = build(configs.AfWhisperConfig(kind="af_whisper", model=str(tmp_path)))
    assert (encoder.contract.frame_rate_hz, encoder.contract.width) == (25.0, 64)
    check(encoder, reference, lengths_s)
    # The padding is masked: a shorter window changes no clip that fits into it.
    shorter = build(configs.AfWhisperConfig(kind="af_whisper", model=str(tmp_path), window_s=4.0))
    check(shorter, reference, (0.1, 3.0))


@variants("rand_trunc", "fusion")
def test_clap(tmp_path, variant, lengths_s):
    truncation = variant
    torch.manual_seed(0)
    audio_config = ClapAudioConfig(
        patch_embeds_hidden_size=16, hidden_size=128, depths=[1, 1, 1, 1], num_attention_heads=[2, 2, 4, 4],
        enable_fusion=truncation == "fusion", initializer_factor=3.0,
    )  # fmt: skip
    text_config = ClapTextConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    whole = ClapModel(ClapConfig.from_text_audio_configs(text_config, audio_config))
    for module in whole.audio_model.modules():  # running statistics of training, not zeros and ones
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(-40, 5)
            module.running_var.uniform_(50, 150)
    whole.save_pretrained(tmp_path)
    extractor = ClapFeatureExtractor(truncation=truncation)
    extractor.save_pretrained(tmp_path)
    model = whole.audio_model.eval()

    def reference(audio):
        out = []
        for window in chunks(audio, 480000):
            mel = extractor(window, sampling_rate=48000, return_tensors="pt").input_features
            with torch.inference_mode():
                cells = model(mel.float(), is_longer=torch.zeros(1, 1, dtype=torch.bool)).last_hidden_state
            steps = math.ceil(len(window) / 480000 * 32)
            out.append(cells[0].permute(2, 1, 0).reshape(64, -1)[: steps * 2].numpy())
        return np.concatenate(out)

    encoder = build(configs.ClapConfig(kind="clap", model=str(tmp_path)))
    assert (encoder.contract.grid, encoder.contract.frame_rate_hz) == ((32, 2), 6.4)
    check(encoder, reference, lengths_s)


WIDTH, DEPTH, HEADS = 96, 2, 3


def write_sslam(folder, naming: str, tensors) -> str:
    if naming == "hugging_face":
        save_file(sslam_reference.hugging_face_names(tensors), folder / "model.safetensors")
        return str(folder)
    prefix = "model." if naming == "fine_tuned" else ""
    model = {f"{prefix}{name}": tensor.half() if naming == "fp16" else tensor for name, tensor in tensors.items()}
    if naming == "fine_tuned":
        model |= {"fc_norm.weight": torch.ones(WIDTH), "head.bias": torch.zeros(527)}
    else:
        model["_ema"] = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoint = {"cfg": {"model": {"_name": "data2vec_multi"}}, "args": None, "model": model, "extra_state": {}}
    torch.save(checkpoint, folder / "checkpoint_last.pt")
    return str(folder / "checkpoint_last.pt")


@variants("fairseq", "hugging_face", "fine_tuned", "fp16")
def test_sslam(tmp_path, variant, lengths_s):
    tensors = sslam_reference.official_tensors(WIDTH, DEPTH)
    path = write_sslam(tmp_path, variant, tensors)
    if variant == "fp16":  # as training leaves them: read back what the rounding made of them
        tensors = {name: tensor.half().float() for name, tensor in tensors.items()}
    encoder = build(configs.SslamConfig(kind="sslam", model=path, num_heads=HEADS))
    assert (encoder.contract.grid, encoder.contract.frame_rate_hz, encoder.contract.width) == ((64, 8), 50.0, WIDTH)
    check(encoder, lambda audio: sslam_reference.features(tensors, audio, HEADS), lengths_s)


@pytest.mark.slow
def test_sslam_at_its_real_size(tmp_path):
    tensors = sslam_reference.official_tensors(768, 12)
    inference = [t for name, t in tensors.items() if ".decoder." not in name]
    assert (len(inference), sum(t.numel() for t in inference)) == (150, 89_972_736)
    encoder = build(configs.SslamConfig(kind="sslam", model=write_sslam(tmp_path, "fairseq", tensors)))
    for seconds in (3.0, 10.0):
        audio = noise(seconds, 16000)
        (ours,) = encode_together(encoder, [audio])
        np.testing.assert_allclose(ours, sslam_reference.features(tensors, audio, 12), atol=2e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("blocks.1.mlp.fc2.bias"), r"blocks\.1\.mlp\.fc2\.bias has shape None"),
        (lambda t: t.update({"blocks.0.relative_bias": torch.zeros(1)}), r"blocks\.0\.relative_bias"),
        (lambda t: t.update({"blocks.0.norm1.bias": torch.zeros(5)}), r"blocks\.0\.norm1\.bias has shape \(5,\)"),
        (lambda t: t.pop("modality_encoders.IMAGE.extra_tokens"), "no extra_tokens"),
    ],
)
def test_error_for_an_invalid_sslam_checkpoint_names_the_tensor(tmp_path, change, named):
    tensors = sslam_reference.official_tensors(WIDTH, DEPTH)
    change(tensors)
    with pytest.raises(UserError, match=named):
        build(configs.SslamConfig(kind="sslam", model=write_sslam(tmp_path, "fairseq", tensors), num_heads=HEADS))


def test_pooling_averages_time_steps_after_padding_is_dropped(tmp_path):
    path = write_sslam(tmp_path, "fairseq", sslam_reference.official_tensors(WIDTH, DEPTH))
    plain, pooled = (
        build(configs.SslamConfig(kind="sslam", model=path, num_heads=HEADS, pool=pool)) for pool in (1, 4)
    )
    (window,) = Windower(plain).push(noise(3.0, 16000), True)
    whole, means = (e.encode_windows([e.prepare(window)], [window.samples])[0] for e in (plain, pooled))
    rows = whole.astype(np.float32).reshape(-1, 8, WIDTH)
    assert len(rows) == 19 and means.shape == (5 * 8, WIDTH) and means.dtype == np.float16
    np.testing.assert_allclose(means[:8], rows[:4].mean(axis=0), atol=HALF)
    np.testing.assert_allclose(means[-8:], rows[16:].mean(axis=0), atol=HALF)
    assert pooled.contract.grid == (16, 8) and pooled.contract.frame_rate_hz == 12.5


def test_fingerprint_depends_on_weights_and_settings_not_on_the_path(tmp_path):
    for name in ("a", "b", "other"):
        (tmp_path / name).mkdir()
        write_sslam(
            tmp_path / name, "fairseq", sslam_reference.official_tensors(WIDTH, DEPTH, seed=int(name == "other"))
        )

    def fingerprint(folder, **values):
        model = str(tmp_path / folder / "checkpoint_last.pt")
        return describe_encoder(configs.SslamConfig(kind="sslam", model=model, **values)).fingerprint

    assert fingerprint("a") == fingerprint("b")
    assert len({fingerprint("a"), fingerprint("other"), fingerprint("a", layer=1), fingerprint("a", dtype="bf16")}) == 4
