"""Chat templates: Hugging Face's ways of writing them, and a sandbox around what they may do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from switchgear.chat_template import ChatTemplate
from switchgear.config import bundled_model
from switchgear.conversation import chat_prompt
from switchgear.tokenizer import Tokenizer
from switchgear_runtime.errors import CheckpointError, ConfigError, RequestError

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Ho"}]
# The shapes of widespread templates: ChatML, Llama 2's, and one with all the extras.
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endif %}"
)
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'].strip() }} [/INST]"
    "{% else %}{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "test")


def test_chatml() -> None:
    text = "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    assert template(CHATML).render(MESSAGES) == text + "<|im_start|>assistant\n"
    assert template(CHATML).render(MESSAGES, add_generation_prompt=False) == text
    silent = template(CHATML).render(MESSAGES, extra={"enable_thinking": False})
    assert silent.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    going_on = template(CHATML).render(MESSAGES, add_generation_prompt=False, continue_final_message=True)
    assert going_on.endswith("<|im_start|>assistant\nHo")


def test_a_template_that_refuses() -> None:
    assert template(STRICT).render(MESSAGES, add_generation_prompt=False) == "<s>[INST] Hi <b> [/INST] Ho</s>"
    with pytest.raises(RequestError, match="roles must alternate"):
        template(STRICT).render(MESSAGES[1:])


def test_extras() -> None:
    source = (
        "{{ {'a': '<é>'} | tojson }}{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    assert template(source).render(MESSAGES) == '{"a": "<é>"}01'
    assert len(template("{{ strftime_now('%Y') }}").render(MESSAGES)) == 4


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ (messages | map(attribute='__class__') | list)[0] }}",
    "{{ ''['__cla' + 'ss__'] }}",
    "{{ '%s' | attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages.clear() }}",
    "{% for i in range(10000000) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.mark.parametrize("source", ATTACKS)
def test_the_sandbox(source: str) -> None:
    """Each is refused, or gives nothing; the messages are as they were."""
    messages: list[dict[str, Any]] = [dict(message) for message in MESSAGES]
    try:
        text = template(source).render(messages)
    except RequestError:
        text = ""
    assert "class" not in text and "root:" not in text and "uid=" not in text and len(text) < 1000
    assert messages == MESSAGES


def test_a_template_that_never_ends_its_prompt() -> None:
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="characters"):
        template(source).render(MESSAGES)


def test_where_it_comes_from(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from chat_template.json"}))
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "from {{ eos_token }}"}]
    config = {"chat_template": named, "eos_token": {"content": "<end>", "lstrip": False}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = ChatTemplate.load(tmp_path)
    assert found is not None and found.render(MESSAGES) == "from <end>"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    found = ChatTemplate.load(tmp_path)
    assert found is not None and found.render(MESSAGES) == "from the file"
    (tmp_path / "mine.jinja").write_text("mine")
    found = ChatTemplate.load(tmp_path, tmp_path / "mine.jinja")
    assert found is not None and found.render(MESSAGES) == "mine"
    with pytest.raises(ConfigError, match="chat_template"):
        ChatTemplate.load(tmp_path, tmp_path / "none.jinja")
    with pytest.raises(CheckpointError, match="not a Jinja template"):
        template("{% if %}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        ChatTemplate.load(tmp_path)


def test_the_bundled_model_has_a_plain_one() -> None:
    tokenizer = Tokenizer.load(bundled_model())
    assert chat_prompt(tokenizer, MESSAGES[:1]) == "User: Hi <b>\n\nAssistant:"


def test_agrees_with_transformers() -> None:
    """The same text as apply_chat_template, for templates of every shape above."""
    transformers = pytest.importorskip("transformers")
    model = bundled_model()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    own = (model / "chat_template.jinja").read_text()
    for source in (CHATML, STRICT, own):
        for add in (True, False):
            expected = theirs.apply_chat_template(
                MESSAGES, chat_template=source, tokenize=False, add_generation_prompt=add
            )
            assert template(source).render(MESSAGES, add_generation_prompt=add) == expected


def test_bytes_of_tokens() -> None:
    tokenizer = Tokenizer.load(bundled_model())
    assert tokenizer is not None
    text = "Grüße 😀\n naïve"
    pieces = [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode(text)]
    assert b"".join(pieces) == text.encode()
    assert tokenizer.token_bytes(0) == b"<|endoftext|>"
