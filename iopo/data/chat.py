"""The chat template: text of a prompt, text of a response after it, and where a turn ends.

Training, generation, evaluation and serving render through this one class, so that a model is
trained on the exact text that it is asked with.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from jinja2 import TemplateError, meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from iopo.constraints.text import THINK_START
from iopo.data.columns import Prompt, messages_of
from iopo.files import sha256_text

ASKS_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
BEHAVIOUR = (  # attributes of a tokenizer that its backend does not hold
    *("split_special_tokens", "clean_up_tokenization_spaces"),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)
TODAY = date(2024, 7, 26)  # what Llama 3.1's template writes when it is told no date
# what apply_chat_template gives to a template by itself
GIVEN = {"messages", "add_generation_prompt", "tools", "documents"}


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template with everything fixed that changes its text.

    system: the system prompt of rows that have none of their own; None leaves it to the template
    (some write a default one).
    options: further variables of the template, such as {"enable_thinking": False} for Qwen3.
    Templates that ask for the current date get TODAY: with the real one, prompts, caches and
    resumed runs would change at midnight.
    Raises ValueError for a tokenizer without a template, a date that cannot be fixed, and options
    that the template never reads.
    """

    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    template: str = field(init=False)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer is a {type(self.tokenizer).__name__} without a tokenizer.json, "
                "which cannot be hashed: convert it with AutoTokenizer.from_pretrained(...)."
                "save_pretrained(...)"
            )
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template (a base model?): use the instruction-tuned "
                "model, or put a chat_template.jinja beside its tokenizer.json"
            )
        asking = self.tokenizer.get_chat_template()
        template = ASKS_DATE.sub(lambda call: json.dumps(TODAY.strftime(call[2])), asking)
        given = GIVEN | {*self.tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
        reads = sorted(_variables(template) - given)
        if unknown := sorted(self.options.keys() - reads):
            raise ValueError(
                f"model.template_options: the chat template never reads {', '.join(unknown)}; "
                f"expected {'some of ' + ', '.join(reads) if reads else 'none, as it reads none'}"
            )
        if "strftime_now(" in template:
            raise ValueError(
                "the chat template asks for the current date in a format that is not a plain string"
                ", so its text changes from day to day: replace strftime_now(...) by a fixed date"
            )
        object.__setattr__(self, "template", template)

    def record(self) -> dict[str, Any]:
        """What is fixed, for manifests and reports; date: None where the template writes none."""
        dated = self.template != self.tokenizer.get_chat_template()
        end = self.end_of_turn()
        return {
            "date": TODAY.isoformat() if dated else None,
            "template_options": self.options,
            "system": self.system,
            "end_of_turn": None if end is None else self.tokenizer.convert_ids_to_tokens(end),
        }

    def notes(self) -> list[str]:
        """What a person must know before training on it."""
        prompt = self.prompt("Question")
        header = self.response(prompt, "Question", "Answer").partition("Answer")[0]
        notes = []
        if day := self.record()["date"]:
            notes.append(f"chat: the template asks for the date: always {day}, in the export too")
        if header.strip():
            notes.append(f"chat: the template puts {header!r} before responses, which is trained")
        return notes

    def saved_template(self) -> str:
        """The template for an export: the date fixed, the options as defaults.

        A server that renders it asks with the text that the model was trained on.
        """
        # The line breaks vanish, as transformers and vLLM trim them after a tag.
        defaults = "".join(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}\n"
            for name, value in self.options.items()
        )
        return defaults + self.template

    def prompt(self, x: Prompt, system: str | None = None) -> str:
        """The text up to where the response begins."""
        return self.render(self.messages(x, system), add_generation_prompt=True)

    def messages(self, x: Prompt, system: str | None = None) -> list[dict[str, str]]:
        """The messages of a prompt. Its own first turn of the system goes before the row's system
        prompt, and that before the configured one.
        """
        turns = messages_of(x)
        system = self.system if system is None else system
        if system is None or turns[0]["role"] == "system":
            return turns
        return [{"role": "system", "content": system}, *turns]

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The template's text for any conversation. Raises ValueError if it refuses it."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.options,
            )
        except TemplateError as error:  # Gemma 2: "System role not supported"
            roles = [message["role"] for message in messages]
            raise ValueError(f"the chat template refuses the roles {roles}: {error}") from error
        assert isinstance(text, str)  # tokenize=False
        return text

    def opens_thinking(self) -> bool:
        """Whether the prompt ends with a <think>, which answers then close without opening it."""
        return self.prompt("Question").rstrip().endswith(THINK_START)

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the answer begins."""
        text = self.render(messages, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def response(self, prompt: str, x: Prompt, y: str, system: str | None = None) -> str:
        """The text that follows `prompt` = self.prompt(x, system): y, the end of the turn, and what
        the template writes after it.

        Raises ValueError when the conversation's text does not begin with the prompt's (prefix
        property) or does not hold y. The text is checked, not the tokens.
        """
        messages = [*self.messages(x, system), {"role": "assistant", "content": y}]
        whole = self.render(messages, add_generation_prompt=False)
        if not whole.startswith(prompt):
            pairs = enumerate(zip(prompt, whole, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
            raise ValueError(
                "the template's text of the whole conversation does not begin with that of the "
                f"prompt: at character {at} the prompt has {prompt[at : at + 30]!r} and the "
                f"conversation {whole[at : at + 30]!r}, so the model would be trained on a prompt "
                "that it is never asked with; use another template, or model.template_options"
            )
        text = whole[len(prompt) :]
        if (y := y.strip()) not in text:
            raise ValueError(f"the template changes the response {y[:60]!r} to {text[:60]!r}")
        return text

    def end_of_turn(self) -> int | None:
        """Id of the token that ends a response: the first special token that the template writes
        after it, if any. Not always the eos token (Gemma: <end_of_turn>).
        """
        messages = [*self.messages("Question"), {"role": "assistant", "content": "Answer"}]
        whole = self.render(messages, add_generation_prompt=False)
        _, found, tail = whole.rpartition("Answer")
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        ids = self.tokenizer(tail if found else "", add_special_tokens=False)["input_ids"]
        return next((token for token in ids if token in special), None)

    def trained_end_of_turn(self) -> int:
        """`end_of_turn` of a template that can be trained on.

        Raises ValueError when it writes none, as the model could not learn to stop, and when the
        prompt ends before the header of the response, which would then be scored.
        """
        prompt = self.prompt("Question")
        header, _, tail = self.response(prompt, "Question", "Answer").partition("Answer")
        without = self.render(self.messages("Question"), add_generation_prompt=False)
        if prompt == without and any(text in header for text in special_texts(self.tokenizer)):
            raise ValueError(
                "the chat template ignores add_generation_prompt: its prompt ends "
                f"{prompt[-20:]!r} and the response begins with the header {header!r}: write the "
                "header at the end of the template under {% if add_generation_prompt %}"
            )
        if (end := self.end_of_turn()) is None:
            raise ValueError(
                f"the chat template writes no special token after a response, only {tail!r}: end "
                "the assistant turn of the template with {{ eos_token }}"
            )
        return end


def _variables(template: str) -> set[str]:
    """Names that a template reads and does not set itself."""
    # transformers' own environment: it knows tags that jinja does not, such as {% generation %}
    environment = _compile_jinja_template(template).environment
    return meta.find_undeclared_variables(environment.parse(template))


def special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The strings of the special tokens: a text that holds one could forge the end of a turn."""
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}


def tokenizer_hash(chat: Chat) -> str:
    """sha256 (hex) of what turns text into ids and back: vocabulary, merges, normalisation, special
    tokens, blanks taken out of decoded text, template, system prompt, date and options, hence also
    where a turn ends. Padding and truncation settings, which a call changes, do not count.
    """
    backend = json.loads(chat.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    for changing in ("padding", "truncation"):
        backend.pop(changing, None)
    tokens = {key: str(value) for key, value in chat.tokenizer.special_tokens_map.items()}
    parts = [backend, chat.template, tokens, chat.system, chat.options]
    parts += [getattr(chat.tokenizer, name, None) for name in BEHAVIOUR]
    return sha256_text(json.dumps(parts, sort_keys=True))
