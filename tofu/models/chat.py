"""The tags of a family whose entry leaves them to its tokenizer's own chat template."""

import dataclasses
from typing import Any

from transformers import PreTrainedTokenizerBase

from tofu.models.families import WRITTEN, Family
from utils import BadInput, one_line

MARK = "QUESTION"  # stands for the question while the template is written out


def resolved(name: str, family: Family, tokenizer: PreTrainedTokenizerBase) -> Family:
    """The family with its tags written out; the family itself without `chat_template`.

    What the template writes before the question becomes `question_start_tag`, system text included, what it writes
    after it `question_end_tag`. The begin token is the tokenizer's to add, where it adds one. A template that thinks
    first is asked not to.

    Raises:
        BadInput: no template, one that fails, changes the question or takes no system text; tags beside it in the entry
            that give other tokens.
    """
    if not family.chat_template:
        return family
    start, end = _around(name, family, tokenizer)
    written = dataclasses.replace(family, system_prompt="", question_start_tag=start, question_end_tag=end)
    if any(getattr(family, key) for key in WRITTEN):
        ours, theirs = (
            tokenizer(one.system_prompt + one.question_start_tag + MARK + one.question_end_tag)["input_ids"]
            for one in (family, written)
        )
        if ours != theirs:
            raise BadInput(
                f"config/model_config.yaml: {name}: the tags give other tokens than the tokenizer's template, which "
                f"writes {start!r} before the question and {end!r} after it: leave out the tags, or chat_template"
            )
        return family
    return written


def _around(name: str, family: Family, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before and after a question, without the begin token that the tokenizer adds."""
    said = f"config/model_config.yaml: {name}: chat_template: true, but"
    if not tokenizer.chat_template:
        raise BadInput(f"{said} the tokenizer has no chat template: write the tags out, or take the -Instruct model")
    if family.template_date is None and "strftime_now" in str(tokenizer.chat_template):
        raise BadInput(f"{said} the tokenizer's template writes today's date: give template_date: 26 Jul 2024, say")
    turns = [{"role": "user", "content": MARK}]
    if family.template_system is not None:
        turns.insert(0, {"role": "system", "content": family.template_system})
    more: dict[str, Any] = {} if family.template_date is None else {"date_string": family.template_date}
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False, **more
        )
    except Exception as error:  # a template may raise whatever its author wrote
        raise BadInput(f"{said} the tokenizer's template fails ({one_line(error)})") from None
    if text.count(MARK) != 1 or (family.template_system or "") not in text:
        raise BadInput(f"{said} the tokenizer's template leaves out the question or the system text")
    start, end = text.split(MARK)
    added = tokenizer("a")["input_ids"]
    if tokenizer.bos_token is not None and added and added[0] == tokenizer.bos_token_id:
        start = start.removeprefix(tokenizer.bos_token)
    return start, end
