"""Presets and the rule for audio_layers, against the numbers of the paper."""

from fractions import Fraction

import pytest

from pipeline.core.errors import UserError
from pipeline.core.streams import Connector, LayerRule, Stream, check_streams, preset_streams, resolve_audio_layers


@pytest.mark.parametrize(("num_layers", "third"), [(16, 5), (28, 9), (2, 1), (27, 9)])
def test_one_third_of_the_layers(num_layers: int, third: int) -> None:
    assert resolve_audio_layers(num_layers, num_audio_layers=Fraction(1, 3)) == tuple(range(third))


def test_rule() -> None:
    assert resolve_audio_layers(16, first_audio_layer=2, num_audio_layers=3, layer_stride=4) == (2, 6, 10)
    assert resolve_audio_layers(5, layer_stride=2) == (0, 2, 4)
    assert resolve_audio_layers(5) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "rule", [{"first_audio_layer": 4}, {"num_audio_layers": 5}, {"num_audio_layers": 3, "layer_stride": 2}]
)
def test_layers_beyond_the_model(rule: dict[str, int]) -> None:
    with pytest.raises(UserError, match="layers are 0 to 3"):
        resolve_audio_layers(4, **rule)


def test_presets() -> None:
    mlp = Connector()
    (plits,) = preset_streams("plits", ["log_mel"], 6, connector=mlp)
    assert (plits.integration, plits.audio_layers) == ("plits", ())
    (lal,) = preset_streams("lal", ["log_mel"], 6, connector=mlp)
    assert (lal.integration, lal.audio_layers) == ("lal", (0, 1, 2, 3, 4, 5))
    full, summary = preset_streams("pal_v3", ["af_whisper"], 6, connector=mlp, summary_stride=3)
    assert full.audio_layers == (0, 1)
    assert (summary.integration, summary.summary_of) == ("plits", 0)
    assert (summary.connector.kind, summary.connector.summary_stride) == ("conv", 3)
    delayed = preset_streams("delayed", ["sslam", "clap"], 6, connector=mlp)
    assert [s.audio_layers for s in delayed] == [(4, 5), (4, 5)]
    lfst = Connector(kind="lfst")
    lal_part, sequence_part = preset_streams("pal_v2", ["whisper", "sslam", "clap"], 6, connector=lfst)
    assert (lal_part.encoders, lal_part.integration) == (("sslam", "clap"), "lal")
    assert (sequence_part.encoders, sequence_part.connector.kind) == (("whisper",), "mlp")
    assert preset_streams("lal", ["a"], 6, connector=mlp, layers=LayerRule(audio_layers=(1, 4)))[0].audio_layers == (
        1,
        4,
    )


@pytest.mark.parametrize(
    ("preset", "encoders"), [("pal_v3", ["a", "b"]), ("pal_v2", ["a"]), ("lal", []), ("nonsense", ["a"])]
)
def test_encoders_that_do_not_suit(preset: str, encoders: list[str]) -> None:
    with pytest.raises(UserError):
        preset_streams(preset, encoders, 6, connector=Connector())


@pytest.mark.parametrize("layers", [(), (0, 6), (2, 1), (1, 1), (-1, 0)])
def test_explicit_layers_are_checked(layers: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"model\.audio_layers"):
        preset_streams("lal", ["a"], 6, connector=Connector(), layers=LayerRule(audio_layers=layers))


def test_streams_are_checked() -> None:
    full = Stream(("a",), "lal", audio_layers=(0,))
    assert check_streams([full, Stream(("a",), "plits", summary_of=0)], 2)
    for bad in (
        Stream(("b",), "plits", summary_of=0),
        Stream(("a",), "plits", summary_of=1),
        Stream(("a", "b"), "plits"),
        Stream(("a",), "plits", audio_layers=(0,)),
    ):
        with pytest.raises(UserError, match=r"model\.streams\.1"):
            check_streams([full, bad], 2)


def test_a_summary_of_queries_is_refused() -> None:
    with pytest.raises(UserError, match="covers no particular frames"):
        check_streams(preset_streams("pal_v3", ["a"], 6, connector=Connector(kind="qformer")), 6)


def test_stream_survives_json() -> None:
    for stream in preset_streams("pal_v3", ["a"], 6, connector=Connector(kind="qformer")):
        assert Stream.from_dict(stream.to_dict()) == stream
