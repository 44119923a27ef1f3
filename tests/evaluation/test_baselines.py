"""The control with swapped audio takes another sound, not another name of the same one."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.core.errors import UserError, run_command
from pipeline.data.feature_set import FeatureSet
from pipeline.evaluate import main
from pipeline.evaluation.baselines import swap_audio, swap_within_domains
from tests.helpers.corpora import tone
from tests.helpers.feature_sets import write_rows
from tests.helpers.published import write_text


def write_sounds(folder: Path, sounds: list[int], domains: list[str]) -> FeatureSet:
    """Writes a feature set of equally long clips; equal numbers are copies of one sound, encoded in another batch."""
    rows = [
        {"clip_id": f"clip-{n}", "duration_s": 1.0, "dataset": "d", "domain": domain, "questions": []}
        for n, domain in enumerate(domains)
    ]
    question = {"question_id": "q", "question": "What?", "answer": "x", "task": "t"}
    rows = [{**row, "questions": [{**question, "question_id": f"q{n}"}]} for n, row in enumerate(rows)]
    frames = []
    for n, sound in enumerate(sounds):
        values = np.random.default_rng(sound).normal(size=(20, 8))
        frames.append((values * (1 + 1e-3 * (n % 2))).astype(np.float16))
    return FeatureSet(write_rows(folder, rows, {"log_mel": frames}), ["log_mel"])


def test_a_copy_of_a_sound_is_no_control_for_it(tmp_path: Path) -> None:
    sounds = [0, 0, 1, 0, 2, 3, 3]
    domains = ["a", "a", "a", "a", "a", "b", "b"]
    features = write_sounds(tmp_path / "set", sounds, domains)
    pairing = swap_audio(features, range(len(sounds)))
    assert sorted(pairing) == list(range(len(sounds)))
    assert all(sounds[clip] != sounds[other] for clip, other in pairing.items())
    assert {domains[pairing[clip]] for clip in range(5)} == {"a"}, "the domain still holds other sounds"


def test_without_copies_the_pairing_is_that_of_the_domains(tmp_path: Path) -> None:
    domains = ["a", "a", "a", "b", "b", "c"]
    features = write_sounds(tmp_path / "set", list(range(6)), domains)
    assert swap_audio(features, range(6)) == swap_within_domains(dict(enumerate(domains)))


def test_copies_of_one_sound_alone_are_refused(tmp_path: Path) -> None:
    features = write_sounds(tmp_path / "set", [0, 0, 0], ["a", "a", "b"])
    with pytest.raises(UserError, match="all 3 clips are copies of one sound"):
        swap_audio(features, range(3))


def test_every_clip_gets_another_sound_where_there_is_one() -> None:
    for seed in range(300):
        generator = random.Random(seed)
        count = generator.randint(2, 10)
        domains = {clip: generator.choice("ab") for clip in range(count)}
        sounds = [generator.randint(0, generator.choice([1, 3, 20])) for _ in range(count)]
        if len(set(sounds)) == 1:
            continue
        pairing = swap_within_domains(domains, lambda clip, other, sounds=sounds: sounds[clip] == sounds[other])
        assert all(sounds[clip] != sounds[other] for clip, other in pairing.items()), (domains, sounds)


def test_audio_files_that_are_copies_are_no_controls(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("a.wav", "b.wav", "c.flac")
    for name in names:
        soundfile.write(tmp_path / name, tone(1.0, 16000), 16000)
    row = {"question": "?", "choices": ["high", "low"], "answer": "low", "modality": "sound", "sub-category": "s"}
    rows = [{**row, "id": name, "audio_path": name} for name in names]
    write_text(tmp_path / "MMAR-meta.json", json.dumps(rows))
    arguments = [str(exported / "model"), f"mmar={tmp_path}", "--swap-audio", "--max-new-tokens=2"]
    assert run_command(main, arguments) == 2
    assert "all 3 clips are copies of one sound" in capsys.readouterr().err.splitlines()[-1]
    soundfile.write(tmp_path / "a.wav", tone(1.0, 16000)[::-1] ** 3, 16000)
    assert run_command(main, [*arguments, "--json", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["mmar"]["swapped_audio"]["questions"] == 3


@pytest.mark.parametrize("singletons", [0, 1, 2, 3])
def test_every_clip_gets_the_audio_of_another_clip_of_its_domain(singletons: int) -> None:
    domains = {clip: ("sound", "music")[clip % 2] for clip in range(20)}
    domains |= {100 + clip: f"domain-{clip}" for clip in range(singletons)}
    swapped = swap_within_domains(domains)
    assert swapped.keys() == domains.keys() == set(swapped.values()), "each audio is used once"
    assert all(clip != other for clip, other in swapped.items())
    assert swapped == swap_within_domains(dict(reversed(domains.items())))
    crossing = [clip for clip, other in swapped.items() if domains[clip] != domains[other]]
    assert len(crossing) <= max(singletons, 2 * (singletons == 1))
