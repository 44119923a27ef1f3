"""Compares the model with the oracle: logits, loss and the gradient of every parameter, in float64 to 1e-10."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch

from pipeline.core.streams import Connector, Gain, LayerRule, Stream, preset_streams, with_gain
from tests.oracle import model as oracle
from tests.parity.batches import batches, grid_batch
from tests.parity.comparison import Case, answers, build, differences, of_oracle, of_product, oracle_method
from tests.parity.families import FAMILIES, SIZE

TOLERANCE = 1e-10
BATCHES = {**batches(), "grids": grid_batch()}
LAYERS = SIZE["num_hidden_layers"]
# Encoders and rule of each preset; a third of three layers is one, so pal_v3 takes two thirds to have more than one.
PRESETS: dict[str, tuple[tuple[str, ...], LayerRule]] = {
    "plits": (("whisper",), LayerRule()),
    "lal": (("sslam",), LayerRule()),
    "pal_v2": (("whisper", "sslam", "clap"), LayerRule()),
    "pal_v3": (("whisper",), LayerRule(num_audio_layers=Fraction(2, 3))),
    "delayed": (("sslam", "clap"), LayerRule(first_audio_layer=1)),
    "flamingo": (("whisper", "clap"), LayerRule(audio_layers=(0, 2))),
}


def preset(name: str, connector: Connector = Connector("mlp"), **settings: Any) -> tuple[Stream, ...]:  # noqa: B008
    encoders, layers = PRESETS[name]
    return preset_streams(name, encoders, LAYERS, connector=connector, layers=layers, **settings)  # type: ignore[arg-type]


def check(case: Case, situation: str, loss_on: str = "answer") -> None:
    model = build(case)
    rows = BATCHES[situation]
    method = oracle_method(case)
    expected = of_oracle(model, method, rows, loss_on)
    worst = differences(of_product(model, case, rows, loss_on), expected)
    assert {name: value for name, value in worst.items() if not value < TOLERANCE} == {}
    if situation != "text_only_batch" and not any(method.language_model.windows):  # a window may hide a whole stream
        unused = [name for name, gradient in expected.gradients.items() if gradient is None or not gradient.any()]
        assert unused == [], "the comparison does not test these parameters"


@pytest.mark.parametrize("situation", batches())
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name: str, situation: str) -> None:
    check(Case("llama", preset(name)), situation)


@pytest.mark.parametrize("name", ["lal", "pal_v3"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_every_family(family: str, name: str) -> None:
    check(Case(family, preset(name)), "everything")


@pytest.mark.slow
@pytest.mark.parametrize("situation", batches())
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_preset_of_every_family(family: str, name: str, situation: str) -> None:
    check(Case(family, preset(name)), situation, loss_on="text")


@pytest.mark.parametrize("situation", ["everything", "dialogue"])
@pytest.mark.parametrize("name", PRESETS)
def test_loss_on_all_text(name: str, situation: str) -> None:
    check(Case("llama", preset(name)), situation, loss_on="text")


def test_a_mixture_of_integrations_reads_a_dialogue() -> None:
    streams = (*preset("lal"), *preset("plits"))
    check(Case("llama", streams), "dialogue", loss_on="text")


@pytest.mark.parametrize(
    ("name", "connector"),
    [
        ("plits", Connector("linear")),
        ("lal", Connector("linear", width=5)),
        ("lal", Connector("mlp", width=9)),
        ("plits", Connector("conv", summary_stride=2)),
        ("lal", Connector("conv", summary_stride=3, width=7)),
        ("pal_v3", Connector("conv", summary_stride=2)),
    ],
)
def test_every_connector(name: str, connector: Connector) -> None:
    check(Case("llama", preset(name, connector)), "everything")


QFORMER = Connector("qformer", num_queries=3, num_layers=3, num_heads=2, hidden_size=8)
LFST = Connector("lfst", num_layers=2, num_heads=2, hidden_size=8)


@pytest.mark.parametrize("name", ["plits", "lal"])
def test_qformer(name: str) -> None:
    check(Case("llama", preset(name, QFORMER)), "everything")


@pytest.mark.parametrize("integration", ["plits", "lal"])
@pytest.mark.parametrize("encoders", [("sslam", "clap"), ("clap", "sslam")])
def test_lfst(encoders: tuple[str, ...], integration: Literal["plits", "lal"]) -> None:
    layers = () if integration == "plits" else (0, 2)
    check(Case("llama", (Stream(encoders, integration, LFST, layers),)), "grids")


@pytest.mark.parametrize("summary_stride", [1, 2, 5])
def test_summaries_of_other_strides(summary_stride: int) -> None:
    check(Case("llama", preset("pal_v3", summary_stride=summary_stride)), "everything")


@pytest.mark.parametrize("family", ["llama", "mistral_window", "olmo2", "gemma3"])
@pytest.mark.parametrize(
    ("switch", "value"), [("norm_audio_tokens", False), ("system_text_sees_audio", True), ("audio_queries", True)]
)
@pytest.mark.parametrize("name", ["pal_v2", "pal_v3"])
def test_every_switch(name: str, switch: str, value: bool, family: str) -> None:
    check(Case(family, preset(name), ((switch, value),)), "everything")


@pytest.mark.parametrize("target", ["keys_values", "values"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma3"])
@pytest.mark.parametrize("name", ["lal", "pal_v2", "pal_v3"])
def test_gain(name: str, family: str, target: Literal["keys_values", "values"]) -> None:
    streams = with_gain(preset(name), Gain(0.3, target))
    check(Case(family, streams), "everything")
    check(Case(family, streams, (("audio_queries", True),)), "everything")


def test_streams_at_different_layers() -> None:
    streams = (
        Stream(("sslam",), "lal", Connector("mlp"), audio_layers=(0, 2)),
        Stream(("clap",), "lal", Connector("linear"), audio_layers=(1,)),
        Stream(("whisper",), "plits", Connector("linear")),
        Stream(("whisper",), "lal", Connector("mlp"), audio_layers=(2,)),
    )
    check(Case("llama", streams), "everything")
    check(Case("llama", streams, (("audio_queries", True),)), "everything")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_float32(family: str, name: str) -> None:
    """A stock float32 model errs by 4e-6 of its largest logit; 1e-5 allows the streams as much again."""
    case = Case(family, preset(name))
    model = build(case, dtype=torch.float32)
    rows = BATCHES["everything"]
    expected = of_oracle(model, oracle_method(case), rows)
    worst = differences(of_product(model, case, rows), expected)
    assert worst["logits"] < 1e-5 * max(float(logits.abs().max()) for logits in expected.logits)


@pytest.mark.parametrize(
    ("name", "family"),
    [*((name, "llama") for name in PRESETS), ("pal_v2", "mistral_window"), ("pal_v3", "gemma2"), ("lal", "gemma3")],
)
def test_greedy_answers(name: str, family: str) -> None:
    """Cached decoding of prompts of unequal length generates what the oracle, without a cache, finds most likely."""
    case = Case(family, preset(name))
    model = build(case)
    rows = BATCHES["several_clips"]
    method = oracle_method(case)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = []
    for row in rows:
        (items,) = row.alone()
        answer: list[int] = []
        for _ in range(5):
            _, scores = oracle.run(method, weights, [*items, *answer])
            answer.append(int(scores[-1].argmax()))
        expected.append(answer)
    assert answers(model, case, rows, new_tokens=5) == expected


MISTAKES = {
    "no gap": {"position_gap": False},
    "audio one position late": {"audio_delay": 1},
    "system text sees audio": {"system_text_sees_audio": True},
}
# A mistake needs something to be wrong about: plits has no audio layers, and flamingo takes no positions.
SENSITIVE = [
    (name, mistake)
    for name in PRESETS
    for mistake in [*MISTAKES, "a layer missing"]
    if (name, mistake) not in {("plits", "a layer missing"), ("flamingo", "no gap")}
]


@pytest.mark.parametrize(("name", "mistake"), SENSITIVE)
def test_a_planted_mistake_is_detected(name: str, mistake: str) -> None:
    """The comparison is sensitive: an oracle with one planted mistake no longer agrees."""
    case = Case("llama", preset(name))
    model = build(case)
    wrong = oracle_method(case, **MISTAKES.get(mistake, {}))
    if mistake == "a layer missing":
        first = next(i for i, stream in enumerate(wrong.streams) if stream.audio_layers)
        cut = replace(wrong.streams[first], audio_layers=wrong.streams[first].audio_layers[:-1])
        wrong = replace(wrong, streams=(*wrong.streams[:first], cut, *wrong.streams[first + 1 :]))
    rows = BATCHES["padding"]
    worst = differences(of_product(model, case, rows), of_oracle(model, wrong, rows))
    assert worst["logits"] > 1e-3
    assert worst["loss"] > 1e-5
