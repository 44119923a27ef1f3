import numpy as np
import pytest

from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.core.labels import IGNORE_INDEX
from pipeline.data.chat_template import AUDIO_TOKEN, ChatTemplate, load_tokenizer
from pipeline.data.template_parts import describe_system_text
from tests.helpers.feature_sets import CHATML, byte_tokenizer

SYSTEM = "You listen."
QUESTIONS = [
    Question(question_id=f"q{number}", question=question, answer=answer)
    for number, (question, answer) in enumerate(
        [("What is it?", "A dog."), (" How many? ", "two\n"), ("Où?", "là-bas")]
    )
]
# How other families write their turns; written here from the documented formats.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n"
    "{% if m['role'] == 'system' %}Today Date: {{ date_string }}\n\n{% endif %}"
    "{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}{% set t = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set t = messages %}{% endif %}{% for m in t %}"
    "{% if m['role'] == 'user' %}[INST] {{ s + m['content'] }} [/INST]{% else %} {{ m['content'] | trim }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
).replace(
    "{{ message['content'] | trim }}",
    "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] | trim }}",
)
NO_SYSTEM = "{% for m in messages %}{% if m['role'] != 'system' %}" + CHATML.removeprefix(
    "{% for message in messages %}"
).replace("message[", "m[").replace("{% endfor %}", "{% endif %}{% endfor %}")
# As SmolLM2's and Qwen2.5's: a system text of the template's own where a conversation has none.
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Smol.<|im_end|>\n{% endif %}" + CHATML
)
STUBBORN = WITH_DEFAULT.replace(
    "{% if messages[0]['role'] != 'system' %}", "{% if messages[0]['role'] != 'system' or not messages[0]['content'] %}"
)
TEMPLATES = {
    "with_default": WITH_DEFAULT,
    "no_system": NO_SYSTEM,
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "thinking": THINKING,
    "ltu": None,
}


@pytest.fixture(params=list(TEMPLATES))
def tokenizer(request, tmp_path):
    byte_tokenizer(TEMPLATES[request.param]).save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def chatml(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


def template(tokenizer, system=SYSTEM, max_text_tokens=1000, **options) -> ChatTemplate:
    return ChatTemplate(tokenizer, system, max_text_tokens=max_text_tokens, **options)


def test_placeholder_is_one_token_beyond_the_vocabulary(chatml):
    assert chatml.encode(f"a{AUDIO_TOKEN}b", add_special_tokens=False)[1] == len(byte_tokenizer())


def test_labels_decode_to_the_answer_and_the_end_of_its_turn(tokenizer):
    chat_template = template(tokenizer)
    for question in QUESTIONS:
        row = chat_template.row([question])
        labelled = row.labels[row.labels != IGNORE_INDEX]
        assert chat_template.decode(labelled) == question.answer.strip()
        assert labelled[-1] == chat_template.end_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert (row.labels[-len(labelled) :] == row.input_ids[-len(labelled) :]).all()  # one run, at the end
        assert (row.segment_ids == 0).all()


def test_audio_is_between_system_text_and_question(tokenizer):
    text = tokenizer.decode(template(tokenizer).row(QUESTIONS[:1]).input_ids)
    assert text.count(AUDIO_TOKEN) == 1
    assert text.index(SYSTEM) < text.index(AUDIO_TOKEN) < text.index("What is it?") < text.index("A dog.")


def test_the_row_equals_the_rendered_template(chatml):
    rendered = chatml.apply_chat_template(
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": AUDIO_TOKEN + "What is it?"},
            {"role": "assistant", "content": "A dog."},
        ],
        tokenize=False,
    )
    assert chatml.decode(template(chatml).row(QUESTIONS[:1]).input_ids) == rendered.rstrip()


def test_the_prompt_is_the_row_up_to_the_answer(tokenizer):
    chat_template = template(tokenizer)
    row = chat_template.row(QUESTIONS[:1])
    prompt = chat_template.prompt_of(QUESTIONS[0])
    assert prompt.prefix + prompt.suffix == row.input_ids[row.labels == IGNORE_INDEX].tolist()


@pytest.mark.parametrize("loss_on", ["answer", "all_text"])
def test_packed_rows_equal_the_conversations_token_by_token(tokenizer, loss_on):
    chat_template = template(tokenizer, loss_on=loss_on)
    packed = chat_template.row(QUESTIONS)
    for number, question in enumerate(QUESTIONS, start=1):
        alone = chat_template.row([question])
        seen = np.isin(packed.segment_ids, [0, number])
        assert (packed.input_ids[seen] == alone.input_ids).all()
        assert (packed.labels[seen] == alone.labels).all()
    assert (packed.input_ids == chat_template.audio_token_id).sum() == 1
    assert packed.input_ids[packed.segment_ids == 0].tolist() == chat_template.prefix


def test_loss_on_all_text_leaves_out_the_prefix_and_the_first_token_after_the_audio(chatml):
    row = template(chatml, loss_on="all_text").row(QUESTIONS[:1])
    start = len(template(chatml).prefix) + 1
    assert (row.labels[:start] == IGNORE_INDEX).all()
    assert (row.labels[start:] == row.input_ids[start:]).all()


def test_no_system_prompt_means_no_system_turn(chatml):
    assert "system" not in chatml.decode(template(chatml, system="").prefix)


def _tokenizer_with(chat_template, folder):
    byte_tokenizer(chat_template).save_pretrained(folder)
    return load_tokenizer(folder)


def test_an_empty_system_prompt_is_empty_where_the_template_has_a_default_one(tmp_path):
    tokenizer = _tokenizer_with(WITH_DEFAULT, tmp_path)
    prefix = tokenizer.decode(template(tokenizer, system="").prefix)
    assert prefix == f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{AUDIO_TOKEN}"
    of_question = template(tokenizer).prefix_of(QUESTIONS[0].model_copy(update={"system": ""}))
    assert tokenizer.decode(of_question) == prefix


def test_null_is_the_default_system_text_of_the_template(tmp_path):
    tokenizer = _tokenizer_with(WITH_DEFAULT, tmp_path)
    assert "You are Smol." in tokenizer.decode(template(tokenizer, system=None).prefix)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "no_system", "ltu"])
def test_without_a_default_text_null_and_empty_are_the_same(tmp_path, name):
    tokenizer = _tokenizer_with(TEMPLATES[name], tmp_path)
    assert template(tokenizer, system=None).prefix == template(tokenizer, system="").prefix
    assert describe_system_text(tokenizer, "") == "data.system_prompt is empty: there is no system text"


def test_a_template_that_replaces_an_empty_system_text_refuses_it_by_name(tmp_path):
    tokenizer = _tokenizer_with(STUBBORN, tmp_path)
    with pytest.raises(UserError, match=r"own system text also .* empty: 'You are Smol\.'; set .* null"):
        template(tokenizer, system="")
    assert "You are Smol." in tokenizer.decode(template(tokenizer, system=None).prefix)


def test_what_stands_in_place_of_an_empty_system_prompt_is_reported(tmp_path):
    tokenizer = _tokenizer_with(WITH_DEFAULT, tmp_path)
    assert "writes its own system text, 'You are Smol.'" in describe_system_text(tokenizer, None)
    assert "in place of the template's own, 'You are Smol.'" in describe_system_text(tokenizer, "")
    assert describe_system_text(tokenizer, "Listen.") is None


def test_a_prompt_does_not_depend_on_the_day(tmp_path):
    byte_tokenizer(LLAMA3).save_pretrained(tmp_path)
    assert "Today Date: 26 Jul 2024" in load_tokenizer(tmp_path).decode(template(load_tokenizer(tmp_path)).prefix)


@pytest.mark.parametrize(
    ("source", "date"),
    [
        ("{{ strftime_now('%d %B %Y') }}", "26 July 2024"),
        ("{% set date_string = strftime_now('%Y-%m-%d') %}{{ date_string }}", "2024-07-26"),
        ("{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}",
         "26 Jul 2024"),
    ],
)  # fmt: skip
def test_a_template_that_reads_the_clock_gets_a_fixed_date(tmp_path, source, date):
    byte_tokenizer(f"Today is {source}.{CHATML}").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(template(tokenizer).prefix).startswith(f"Today is {date}.")


def test_long_conversations_are_named_and_never_truncated(chatml):
    length = len(template(chatml).row(QUESTIONS[:1]).input_ids)
    template(chatml, max_text_tokens=length).row(QUESTIONS[:1])
    with pytest.raises(UserError, match=f"question 'q0': is {length} text tokens long.*raise data.max_text_tokens"):
        template(chatml, max_text_tokens=length - 1).row(QUESTIONS[:1])
    with pytest.raises(UserError, match="text tokens long"):
        template(chatml, max_text_tokens=120).prompt_of(Question(question_id="q", question="x" * 120, answer=""))


def test_a_placeholder_in_a_text_is_plain_text(chatml):
    row = template(chatml).row([Question(question_id="q", question="is <audio> loud?", answer="<audio> is")])
    assert (row.input_ids == chatml.convert_tokens_to_ids(AUDIO_TOKEN)).sum() == 1
    assert template(chatml).decode(row.labels[row.labels != IGNORE_INDEX]) == "<audio> is"
    assert chatml.decode(row.input_ids).count(AUDIO_TOKEN) == 3


@pytest.mark.parametrize("marker", [AUDIO_TOKEN, "[[question]]", "[[answer]]"])
def test_a_marker_in_the_system_prompt_is_refused(chatml, marker):
    with pytest.raises(UserError, match=r"data\.system_prompt: contains .*remove it"):
        template(chatml, system=f"Listen to {marker}.")


@pytest.mark.parametrize(
    ("jinja_template", "fault"),
    [
        ("{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}", "renders no"),
        ("{% for m in messages %}{{ m['content'] * 2 }}<|im_end|>{% endfor %}", "once each"),
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}", "once each"),
        ("{{ raise_exception('no') }}", "renders no"),
        (CHATML.replace("<|im_start|>assistant\n{% endif", "Your answer:{% endif"), "another prompt for generation"),
    ],
)
def test_unusable_templates_are_refused(tmp_path, jinja_template, fault):
    byte_tokenizer(jinja_template).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=fault):
        template(load_tokenizer(tmp_path))


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_row_about_no_clip_is_the_same_without_the_placeholder(tokenizer):
    chat_template = template(tokenizer)
    for questions in (QUESTIONS[:1], QUESTIONS):
        with_audio, without = chat_template.row(questions), chat_template.row(questions, audio=False)
        text = with_audio.input_ids != chat_template.audio_token_id
        for name in ("input_ids", "labels", "segment_ids"):
            assert (getattr(without, name) == getattr(with_audio, name)[text]).all()
