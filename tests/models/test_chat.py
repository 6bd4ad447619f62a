"""Chat templates written by the test in three styles: the same ids as tags that are written out."""

import dataclasses

import pytest
from transformers import AutoTokenizer

import data_module
from tofu.models import chat, families
from tofu.models.families import Family
from utils import BadInput

LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: {{ date_string }}"
    "\n\n{{ system }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]
SYSTEM = "You are a helpful assistant."


@pytest.fixture(params=["with a begin token", "without"])
def tokenizer(request, model_folder):
    found = AutoTokenizer.from_pretrained(model_folder)
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    if request.param == "without":
        from tokenizers import processors

        found.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        found.bos_token = None
    return found


def of_template(tokenizer, template, **keys):
    tokenizer.chat_template = template
    family = Family(hf_key="x", chat_template=True, **dict.fromkeys(families.WRITTEN, ""), **keys)
    return chat.resolved("mine", family, tokenizer)


@pytest.mark.parametrize(
    ("template", "keys", "written"),
    [
        (LLAMA3, {"template_system": SYSTEM, "template_date": "10 Apr 2025"}, "ou-llama3.2-1b"),
        (GEMMA, {}, "gemma2-2b"),
    ],
)
def test_the_same_ids_as_written_tags(tokenizer, template, keys, written):
    if "bos_token" in template and tokenizer.bos_token is None:
        template = template.replace("{{ bos_token }}", "")
    asked = of_template(tokenizer, template, **keys)
    theirs, ours = (data_module.prompt_ids(tokenizer, one, "Who is Bo?") for one in (asked, families.family(written)))
    assert theirs == ours
    assert theirs.count(tokenizer.convert_tokens_to_ids("<s>")) == (tokenizer.bos_token is not None)
    sample = data_module.encode(tokenizer, asked, "Who is Bo?", "A man.", 500)
    assert list(sample.input_ids[: len(theirs)]) == theirs


def test_chatml_does_not_think(tokenizer):
    asked = of_template(tokenizer, CHATML, template_system=SYSTEM)
    assert asked.question_start_tag == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    assert asked.question_end_tag == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_written_tags_beside_a_template_must_agree(tokenizer):
    tokenizer.chat_template = CHATML.replace("{% if enable", "{% if false and enable")
    both = dataclasses.replace(families.family("qwen2.5-1.5b"), chat_template=True)
    assert chat.resolved("mine", both, tokenizer) is both
    with pytest.raises(BadInput, match="mine: the tags give other tokens than the tokenizer's template, which writes"):
        chat.resolved("mine", dataclasses.replace(both, question_end_tag="\n"), tokenizer)


@pytest.mark.parametrize(
    ("template", "keys", "said"),
    [
        (None, {}, "the tokenizer has no chat template"),
        (GEMMA, {"template_system": SYSTEM}, "template fails .*System role not supported"),
        ("{{ strftime_now('%d') }}{{ messages[0]['content'] }}", {}, "writes today's date: give template_date"),
        ("{{ messages[0]['role'] }}", {}, "leaves out the question"),
        ("{{ messages[-1]['content'] }}", {"template_system": SYSTEM}, "or the system text"),
    ],
)
def test_refusals(tokenizer, template, keys, said):
    with pytest.raises(BadInput, match=said):
        of_template(tokenizer, template, **keys)


def test_an_entry_may_leave_out_the_tags(monkeypatch):
    monkeypatch.setitem(families.entries(), "mine", {"hf_key": "owner/model", "chat_template": True})
    assert families.family("mine").question_start_tag == ""
    monkeypatch.setitem(families.entries(), "mine", {"hf_key": "owner/model", "chat_template": True, "answer_tag": "A"})
    with pytest.raises(BadInput, match="mine has no question_end_tag"):
        families.family("mine")
