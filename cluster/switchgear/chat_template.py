"""Conversations to prompts: `ChatTemplate`, a checkpoint's own Jinja template in Jinja's immutable sandbox.

A template is text from a model's authors, so it gets no attribute that starts with an underscore, no method that
changes its arguments, no file and no module. Nothing of it ever comes from a request. What it may use is what Hugging
Face's templates do: `messages`, `add_generation_prompt`, the special tokens, `raise_exception`, `strftime_now`,
`tojson`, loop controls, and `{% generation %}` blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from switchgear_runtime.errors import CheckpointError, ConfigError, RequestError

PROMPT_CHARS_MAX = 32 << 20  # what a template may make of a request; the context's limit is far below
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """`render(messages)` gives the prompt. `special_tokens`: by their names in tokenizer_config.json."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{origin} is not a Jinja template: {error}") from None

    @classmethod
    def load(cls, model_dir: Path, override: Path | None = None) -> ChatTemplate | None:
        """The user's own file, or the checkpoint's; None where the model has none, as base models do."""
        config = _read_json(model_dir / "tokenizer_config.json")
        special = special_tokens(model_dir)
        if override is not None:
            try:
                return cls(override.read_text(encoding="utf-8"), special, str(override))
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"chat_template={str(override)!r} cannot be read: {error}") from None
        file = model_dir / "chat_template.jinja"
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"), special, str(file))
        for name, values in (
            ("tokenizer_config.json", config),
            ("chat_template.json", _read_json(model_dir / "chat_template.json")),
        ):
            source = _default_of(values.get("chat_template"))
            if source is not None:
                return cls(source, special, f"chat_template in {model_dir / name}")
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. RequestError where the template refuses the messages. `extra`: variables of this template."""
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false",
                param="continue_final_message",
            )
        values = {**self._special_tokens, **(extra or {})}
        values |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "tools": None}
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(values):
                num_chars += len(piece)
                if num_chars > PROMPT_CHARS_MAX:
                    raise RequestError(
                        f"the chat template makes over {PROMPT_CHARS_MAX} characters of messages", param="messages"
                    )
                pieces.append(piece)
        except RequestError:
            raise
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"the chat template cannot take these messages ({type(error).__name__}: {error})", param="messages"
            ) from None
        prompt = "".join(pieces)
        return _up_to_final(prompt, messages) if continue_final_message else prompt


def special_tokens(model_dir: Path) -> dict[str, str]:
    """By name, those that tokenizer_config.json gives."""
    config = _read_json(model_dir / "tokenizer_config.json")
    return {name: _token_text(config[name]) for name in SPECIAL_TOKENS if config.get(name) is not None}


def _up_to_final(prompt: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Cut what the template puts after the last message, so that the model goes on with it."""
    final = str(messages[-1].get("content") or "").strip()
    at = prompt.rfind(final) if final else -1
    if at < 0:
        raise RequestError(
            "continue_final_message needs a last message whose text the template keeps", param="messages"
        )
    return prompt[: at + len(final)]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant said, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja's base class has it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's filter; Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _default_of(value: Any) -> str | None:
    """One template, or the `default` of several named ones."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        chosen = named.get("default") or next(iter(named.values()), None)
        return chosen if isinstance(chosen, str) else None
    return None


def _token_text(value: Any) -> str:
    """A special token is a string, or an object with the string as `content`."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return values
