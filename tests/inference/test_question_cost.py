"""A further question about a clip costs little more than the same question to the language model without audio.

`pytest -m slow -s tests/inference/test_question_cost.py` prints the figures."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM

from pipeline.core.feature_contract import Question, read_encoders
from pipeline.inference.encode_audio import AudioEncoders
from pipeline.inference.responder import load_responder
from tests.helpers.corpora import tone
from tests.helpers.exported_models import write_model

QUESTION = "Which instrument plays the second note, and how long does it last?"
CLIP_S, NEW_TOKENS, PAIRS = 10.0, 16, 30
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_layers": 8, "num_heads": 8}


def processor_s(work: Callable[[], object]) -> float:
    """Processor time of this thread, so that other load on the machine counts little."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("integration", ["plits", "lal", "pal_v3"])
def test_a_further_question_costs_what_a_text_only_one_does(tmp_path: Path, integration: str) -> None:
    folder = write_model(tmp_path, integration, **SIZES)
    responder = load_responder(folder / "model", NEW_TOKENS)
    bare = AutoModelForCausalLM.from_pretrained(folder / "lm").eval()
    chat = responder.chat_template
    chat.end_token_id = chat.audio_token_id  # never generated: all answers are equally long
    soundfile.write(tmp_path / "clip.wav", tone(CLIP_S, 16000), 16000)
    audio_encoders = AudioEncoders(read_encoders(folder / "model", responder.feature_fingerprints, "no set"), {}, "cpu")
    prefix = responder.prefill([audio_encoders.encode(tmp_path / "clip.wav").features])
    prompt = chat.prompt_of(Question(question_id="q", question=QUESTION, answer=""))
    text = torch.tensor([[token for token in prompt.prefix + prompt.suffix if token != chat.audio_token_id]])

    def further_question() -> None:
        responder.answer(prefix, [QUESTION], [0])

    @torch.inference_mode()
    def text_only() -> None:
        end = chat.end_token_id
        answer = bare.generate(text, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end)
        assert answer.shape[1] == text.shape[1] + NEW_TOKENS

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        further_question(), text_only()
        pairs = []
        for number in range(PAIRS):  # alternating order: a slow minute of the machine slows both
            order = (further_question, text_only) if number % 2 else (text_only, further_question)
            times = {work: processor_s(work) for work in order}
            pairs.append((times[further_question], times[text_only]))
    finally:
        torch.set_num_threads(threads)
    ratio = median(audio_s / bare_s for audio_s, bare_s in pairs)
    audio_ms, bare_ms = (1e3 * median(column) for column in zip(*pairs, strict=True))
    print(f"\n{integration}: {audio_ms:.0f} ms, text alone {bare_ms:.0f} ms; median of {PAIRS} pairs x{ratio:.3f}")
    assert ratio < 1.10
