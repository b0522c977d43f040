"""A conversation with a model in the terminal: its chat template, the history, answers as they come.

Keys and values of what was said are kept, so that a turn costs what it adds to the conversation. What follows the first
token that the template writes otherwise than before is computed again; after an answer that was stopped, everything.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.cache_utils import DynamicLayer

from ternarize.decoder.cache import CACHE
from ternarize.errors import TernarizeError
from ternarize.generation import TASTE, generation_settings
from ternarize.progress import quiet_transformers

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/system": "/system TEXT: what the model is told first; begins anew. /system alone takes it back",
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


class Printer(TextStreamer):  # type: ignore[misc]
    """Shows an answer as it comes, and remembers it.

    Args:
        show: gets each piece of text.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.text = show, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece that will not change any more."""
        self.text += text
        self.show(text)


class Chat:
    """A model and what has been said.

    Args:
        tokens: at most so many in an answer.
        temperature: 0 takes the likeliest token.
        system: what the model is told first.

    Raises:
        TernarizeError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: int = 512,
        temperature: float = 0.7,
        system: str | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise TernarizeError(
                f"{model.name_or_path} has no chat template: it was not made to converse. "
                "ternarize generate goes on from a text instead."
            )
        self.model, self.tokenizer = model, tokenizer
        self.tokens, self.temperature = tokens, temperature
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Begin anew."""
        self.system = system
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._forget()

    def answer(self, text: str, show: Callable[[str], object]) -> str:
        """What the model says to `text`; Ctrl-C ends it early. Both go into the history.

        Raises:
            TernarizeError: the conversation is too long for the model, or against its template; it stays as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            inputs: Any = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise TernarizeError(f"the model's chat template refuses this conversation: {error}") from error
        room = self._room(inputs["input_ids"].shape[1])
        settings: dict[str, Any] = {"do_sample": self.temperature > 0, "max_new_tokens": min(self.tokens, room)}
        settings |= {"temperature": self.temperature} if self.temperature else {}
        printer = Printer(self.tokenizer, show)
        cache = self._recall(inputs["input_ids"][0])
        self._forget()  # until the answer is complete
        try:
            with quiet_transformers(), generation_settings(self.model, TASTE):
                out: Any = self.model.generate(  # type: ignore[operator]
                    **inputs.to(self.model.device),
                    **settings,
                    **{CACHE: cache},
                    streamer=printer,
                    tokenizer=self.tokenizer,
                    return_dict_in_generate=True,
                )
            self._remember(out.sequences[0].cpu(), out[CACHE])
        except KeyboardInterrupt:
            pass  # what was said stands
        self.messages = [*messages, {"role": "assistant", "content": printer.text}]
        return printer.text

    def _forget(self) -> None:
        self._seen: Tensor = torch.empty(0, dtype=torch.int64)
        self._cache: Cache | None = None

    def _remember(self, ids: Tensor, cache: Any) -> None:
        """Keep what the model holds of a conversation's tokens int64 [T]: all but the last one."""
        if isinstance(cache, Cache):
            self._seen, self._cache = ids[: cache.get_seq_length()], cache

    def _recall(self, ids: Tensor) -> Cache | None:
        """What the model holds of the tokens that a prompt int64 [T] begins with; its last one is computed anew."""
        both = min(len(self._seen), len(ids) - 1)
        same = int((ids[:both] == self._seen[:both]).long().cumprod(0).sum())
        if self._cache is None or not same:
            return None
        if same < len(self._seen):
            if any(type(layer) is not DynamicLayer for layer in self._cache.layers):
                return None  # sliding windows and states cannot go back
            self._cache.crop(same - len(self._seen))
        return self._cache

    def _room(self, length: int) -> int:
        """Tokens that an answer may take behind so many."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            return self.tokens
        if length >= context:
            raise TernarizeError(
                f"the conversation takes {length} tokens, and the model's context holds {context}. "
                "Say less, or forget what was said with /reset."
            )
        return int(context) - length


def converse(chat: Chat, lines: Iterable[str], show: Callable[[str], object], say: Callable[[str], object]) -> None:
    """Answer line by line until /exit or the end.

    Args:
        show: gets the answers, piece by piece.
        say: gets everything else, line by line.
    """
    for line in lines:
        text = line.strip()
        word, _, rest = text.partition(" ")
        if not text:
            continue
        if word == "/exit":
            return
        if text.startswith("/"):
            say(_obey(chat, word, rest.strip()))
            continue
        try:
            chat.answer(text, show)
            show("\n")
        except TernarizeError as error:
            say(f"error: {error}")


def _obey(chat: Chat, word: str, rest: str) -> str:
    """Carry out a command; what to tell about it."""
    if word == "/help":
        return "\n".join(f"{name:8} {what}" for name, what in COMMANDS.items())
    if word == "/reset":
        chat.reset(chat.system)
        return "Forgotten."
    if word == "/system":
        chat.reset(rest or None)
        return f"The model is told first: {rest}" if rest else "The model is told nothing first."
    near = difflib.get_close_matches(word, COMMANDS, 1)
    return f"There is no command {word}. " + (f"Did you mean {near[0]}?" if near else "/help lists those there are.")
