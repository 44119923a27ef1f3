import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_prep.synth import main
from data_prep.synth.corpus import DOMAINS, plan_corpus, render
from data_prep.synth.questions import WORDINGS
from data_prep.synth.signals import shaped
from pipeline.core.errors import UserError

CLIPS = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "corpus"
    assert main([str(out), "--clips", str(CLIPS), "--json", str(out.parent / "figures.json")]) == 0
    return out


@pytest.fixture(scope="module")
def planned():
    return plan_corpus(1200, seed=1)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def bytes_by_name(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truth(clip) -> dict[str, str]:
    return {fact.task: fact.answer for fact in clip.plan.facts()}


def spectrum_peaks_hz(wave, rate_hz, step_s=0.02):
    """Returns the strongest frequency and the level (dB) of each 40 ms frame."""
    size = int(0.04 * rate_hz)
    frames = np.lib.stride_tricks.sliding_window_view(wave, size)[:: int(step_s * rate_hz)]
    spectra = np.abs(np.fft.rfft(frames * np.hanning(size), 4 * size))
    level_db = 20 * np.log10(np.sqrt((frames**2).mean(1)) + 1e-9)
    return spectra.argmax(1) * rate_hz / (4 * size), level_db


def stretches(loud, longest_gap):
    """Returns (start, end) of the runs of True, with gaps of up to `longest_gap` frames closed."""
    frames = np.flatnonzero(loud)
    cuts = np.flatnonzero(np.diff(frames) > longest_gap + 1)
    starts = frames[np.concatenate(([0], cuts + 1))]
    ends = frames[np.concatenate((cuts, [len(frames) - 1]))] + 1
    return list(zip(starts, ends, strict=True))


def test_the_manifest_lists_files_that_exist_and_the_figures_agree(corpus):
    rows = read_lines(corpus / "train.jsonl") + read_lines(corpus / "test.jsonl")
    figures = json.loads((corpus.parent / "figures.json").read_text())
    infos = [soundfile.info(corpus / row["audio"]) for row in rows]
    assert len(rows) == figures["clips"] == CLIPS
    assert sum(len(row["questions"]) for row in rows) == figures["questions"]
    assert sum(info.duration for info in infos) / 3600 == pytest.approx(figures["audio_hours"], abs=1e-4)
    assert len({question["question_id"] for row in rows for question in row["questions"]}) == figures["questions"]
    assert {path.name for path in (corpus / "audio").iterdir()} == {Path(row["audio"]).name for row in rows}


def test_files_are_mixed_in_rate_depth_channels_and_format(corpus):
    infos = [soundfile.info(path) for path in (corpus / "audio").iterdir()]
    assert {info.samplerate for info in infos} == {16000, 22050, 32000, 44100, 48000}
    assert {(info.format, info.subtype) for info in infos} == {
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("FLAC", "PCM_24"),
    }
    assert {info.channels for info in infos} == {1, 2}
    assert all(1.99 < info.duration < 4.01 for info in infos)


def test_a_file_holds_what_was_rendered_and_never_clips(corpus):
    for clip in plan_corpus(CLIPS, seed=0)[:15]:
        samples, rate_hz = soundfile.read(corpus / clip.audio, always_2d=True)
        assert (rate_hz, samples.shape[1]) == (clip.rate_hz, clip.channels)
        assert np.abs(samples - render(clip)).max() < 2**-15
        assert 0.01 < np.abs(samples).max() < 0.99


def test_held_out_clips_are_a_sixth_and_in_no_other_file(corpus, planned):
    train = {row["clip_id"] for row in read_lines(corpus / "train.jsonl")}
    test = {row["clip_id"] for row in read_lines(corpus / "test.jsonl")}
    assert len(train) + len(test) == len(train | test) == CLIPS
    for domain in DOMAINS:
        share = np.mean([clip.held_out for clip in planned if clip.domain == domain])
        assert share == pytest.approx(0.15, abs=0.01)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(corpus, tmp_path):
    assert main([str(tmp_path / "again"), "--clips", str(CLIPS)]) == 0
    assert bytes_by_name(tmp_path / "again") == bytes_by_name(corpus)
    assert main([str(tmp_path / "other"), "--clips", str(CLIPS), "--seed", "1"]) == 0
    assert (tmp_path / "other/test.jsonl").read_bytes() != (corpus / "test.jsonl").read_bytes()


def test_a_killed_run_leaves_no_corpus_and_the_next_one_writes_the_same_bytes(corpus, tmp_path, monkeypatch):
    written = []

    def encode_some(clip):
        if len(written) == 10:
            raise KeyboardInterrupt
        written.append(clip.clip_id)
        return encode(clip)

    from data_prep.synth import corpus as module

    encode = module.encode
    monkeypatch.setattr(module, "encode", encode_some)
    out = tmp_path / "corpus"
    with pytest.raises(KeyboardInterrupt):
        main([str(out), "--clips", str(CLIPS)])
    assert not out.exists()
    remade = []
    monkeypatch.setattr(module, "encode", lambda clip: remade.append(clip) or encode(clip))
    assert main([str(out), "--clips", str(CLIPS)]) == 0
    assert len(remade) == CLIPS - 10
    assert bytes_by_name(out) == bytes_by_name(corpus)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_leftovers_of_other_settings_are_not_used(tmp_path):
    stale = tmp_path / ".corpus.unfinished"
    (stale / "audio").mkdir(parents=True)
    (stale / "audio/stale.wav").write_bytes(b"")
    (stale / "settings.json").write_text("{}")
    assert main([str(tmp_path / "corpus"), "--clips", "30"]) == 0
    assert not (tmp_path / "corpus/audio/stale.wav").exists()


def test_a_finished_corpus_is_kept_and_other_settings_are_refused(corpus):
    hashes_before = bytes_by_name(corpus)
    assert main([str(corpus), "--clips", str(CLIPS)]) == 0
    for other in (["--seed", "5"], ["--clips", "90"]):
        with pytest.raises(UserError, match="other settings"):
            main([str(corpus), "--clips", str(CLIPS), *other])
    assert bytes_by_name(corpus) == hashes_before


def test_a_folder_with_other_content_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        main([str(tmp_path / "file/corpus"), "--clips", "30"])


@pytest.mark.parametrize("arguments", [["--clips", "3"], ["--seed", "-1"], ["--clips", "3", "--dry-run"]])
def test_invalid_settings_are_errors_that_name_their_argument(tmp_path, arguments):
    with pytest.raises(UserError, match=r"--clips|--seed"):
        main([str(tmp_path / "out"), *arguments])
    assert not list(tmp_path.iterdir())


def test_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    assert main([str(tmp_path / "out"), "--clips", "30", "--dry-run"]) == 0
    assert "would hold 30 clips" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom data_prep.synth import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nprint({'numpy', 'torch', 'soundfile'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_guessing_without_the_audio_scores_low(planned):
    """Takes the most frequent answer to each wording in the training clips as the guess for the held-out clips."""
    answers = defaultdict(Counter)
    for clip in planned:
        for question in clip.questions if not clip.held_out else ():
            answers[question["question"]][question["answer"]] += 1
    right = defaultdict(list)
    for clip in planned:
        for question in clip.questions if clip.held_out else ():
            guess = answers[question["question"]].most_common(1)[0][0]
            right[clip.domain].append(guess == question["answer"])
    assert set(right) == set(DOMAINS)
    assert all(np.mean(hits) < 0.40 for hits in right.values())


def test_no_answer_of_a_task_is_common(planned):
    answers = defaultdict(Counter)
    for clip in planned:
        for question in clip.questions:
            answers[question["task"]][question["answer"]] += 1
    assert set(answers) == set(WORDINGS)
    for task, counts in answers.items():
        assert max(counts.values()) / counts.total() < 1.4 / min(len(counts), 3), task


def test_questions_are_five_or_six_a_clip_and_never_the_same_twice(planned):
    assert np.mean([len(clip.questions) for clip in planned]) > 5
    for clip in planned:
        texts = [question["question"] for question in clip.questions]
        assert len(set(texts)) == len(texts)


def test_sounds_are_as_many_as_the_answer_says(planned):
    """Counts the stretches well above the noise, with gaps inside a rhythmic sound closed."""
    names = {"one": 1, "two": 2, "three": 3}
    for clip in [clip for clip in planned if clip.domain == "sound"][:60]:
        _, level_db = spectrum_peaks_hz(render(clip)[:, 0], clip.rate_hz)
        runs = stretches(level_db > np.median(np.sort(level_db)[:15]) + 4, longest_gap=7)
        assert len(runs) == names[truth(clip)["sound.count"]], clip.clip_id


def test_whistles_move_as_the_answer_says(planned):
    clips = [clip for clip in planned if "sound.direction" in truth(clip)]
    for clip in clips[:40]:
        event = next(event for event in clip.plan.events if event.direction)
        wave = render(clip)[:, 0]
        start, end = (round(s * clip.rate_hz) for s in (event.start_s, event.start_s + event.duration_s))
        peaks_hz, _ = spectrum_peaks_hz(wave[start:end], clip.rate_hz)
        octaves = np.log2(peaks_hz[-2] / peaks_hz[1])
        direction = "rising" if octaves > 0.4 else "falling" if octaves < -0.4 else "steady"
        assert direction == event.direction, clip.clip_id


def test_the_loudest_sound_is_the_loudest_part(planned):
    clips = [clip for clip in planned if "sound.loudest" in truth(clip)]
    for clip in clips[:40]:
        wave = render(clip)[:, 0]
        size = round(0.05 * clip.rate_hz)
        energy = np.convolve(wave**2, np.ones(size), "valid")
        at_s = (int(energy.argmax()) + size / 2) / clip.rate_hz
        event = [event for event in clip.plan.events if event.start_s < at_s][-1]
        assert event.kind == truth(clip)["sound.loudest"], clip.clip_id


def test_melodies_follow_their_contour(planned):
    for clip in [clip for clip in planned if clip.domain == "music"][:60]:
        answers, notes, wave = truth(clip), clip.plan.notes, render(clip)[:, 0]
        fundamentals_hz = []
        for note in notes:
            start = round(note.start_s * clip.rate_hz)
            part = wave[start : start + round(note.duration_s * clip.rate_hz)]
            spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part))))
            bins_hz = np.fft.rfftfreq(len(part), 1 / clip.rate_hz)
            near = np.abs(np.log2(np.maximum(bins_hz, 1) / note.frequency_hz)) < 0.12
            fundamentals_hz.append(bins_hz[near][spectrum[near].argmax()])
        highest = int(np.argmax(fundamentals_hz))
        position = "first" if highest == 0 else "last" if highest == len(notes) - 1 else "middle"
        assert position == answers["music.highest"]
        signs = np.sign(np.diff(fundamentals_hz))
        turns = [int(sign) for sign, previous in zip(signs, [0, *signs], strict=False) if sign != previous]
        contours = {(1,): "rising", (-1,): "falling", (1, -1): "up then down"}
        assert contours[tuple(turns)] == answers["music.contour"], clip.clip_id


def test_syllables_are_as_many_as_the_answer_says(planned):
    """Counts the voiced stretches with energy below 1.5 kHz that are longer than the hum of an m."""
    for clip in [clip for clip in planned if clip.domain == "speech"][:60]:
        words = truth(clip)["speech.transcribe"].split()
        assert ("one", "two", "three")[len(words) - 1] == truth(clip)["speech.count"]
        wave = render(clip)[:, 0]
        voiced = shaped(wave, clip.rate_hz, {1200: 1, 1500: 0})
        _, level_db = spectrum_peaks_hz(voiced, clip.rate_hz, step_s=0.01)
        runs = stretches(level_db > np.median(np.sort(level_db)[:10]) + 8, longest_gap=2)
        assert len(runs) == len(words), clip.clip_id


def test_speakers_differ_in_pitch_as_the_answer_says(planned):
    """Measures the pitch by autocorrelation in the middle of the first vowel."""
    for clip in [clip for clip in planned if clip.domain == "speech"][:60]:
        syllable = clip.plan.syllables[0]
        middle = round((syllable.start_s + syllable.duration_s - syllable.vowel_s / 2) * clip.rate_hz)
        part = render(clip)[middle : middle + round(0.06 * clip.rate_hz), 0]
        spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 4 * len(part)))
        correlation = np.fft.irfft(spectrum**2)
        lags = np.arange(round(clip.rate_hz / 400), round(clip.rate_hz / 90))
        pitch_hz = clip.rate_hz / lags[correlation[lags].argmax()]
        speaker = "man" if pitch_hz < 150 else "woman" if pitch_hz < 240 else "child"
        assert speaker == truth(clip)["speech.speaker"], clip.clip_id
