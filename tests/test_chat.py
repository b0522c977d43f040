"""Talking in the terminal, and over HTTP with the real OpenAI client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import copy_folder, make_checkpoint

import ternarize
from ternarize.chat import Chat, converse

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chat(ternary: Path) -> Chat:
    """Greedy, with short answers."""
    model, tokenizer = ternarize.load(ternary)
    return Chat(model, tokenizer, tokens=5, temperature=0)


def talk(chat: Chat, *lines: str) -> tuple[str, list[str]]:
    """What was shown and what was said."""
    shown: list[str] = []
    said: list[str] = []
    converse(chat, lines, shown.append, said.append)
    return "".join(shown), said


def expected(chat: Chat, messages: list[dict[str, str]]) -> str:
    """The answer by transformers alone."""
    inputs: Any = chat.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out: Any = chat.model.generate(**inputs, max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    return chat.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_each_answer_is_to_all_that_was_said(chat: Chat) -> None:
    first = expected(chat, [{"role": "user", "content": "abc"}])
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": first}]
    second = expected(chat, [*turns, {"role": "user", "content": "def"}])
    shown, said = talk(chat, "abc\n", "\n", " def \n")
    assert (shown, said) == (f"{first}\n{second}\n", [])
    assert [message["content"] for message in chat.messages] == ["abc", first, "def", second]


def test_a_turn_computes_what_it_adds(chat: Chat) -> None:
    lengths: list[int] = []
    chat.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))

    def computed(text: str) -> int:
        """Tokens of the prompt that go through the model."""
        lengths.clear()
        chat.answer(text, lambda _: None)
        assert set(lengths[1:]) == {1}
        return lengths[0]

    def prompt() -> int:
        inputs: Any = chat.tokenizer.apply_chat_template(chat.messages[:-1], add_generation_prompt=True)
        return len(inputs["input_ids"])

    first = computed("abc")
    assert first == prompt()
    assert computed("def") <= prompt() - first
    chat.messages[0]["content"] = "xyz"  # rewritten, as some templates do
    third = computed("ghi")
    assert prompt() - first < third < prompt()  # the template's own beginning is as it was


def test_reset_and_system_begin_anew(chat: Chat) -> None:
    told = {"role": "system", "content": "be kind"}
    alone = expected(chat, [{"role": "user", "content": "abc"}])
    led = expected(chat, [told, {"role": "user", "content": "abc"}])
    shown, said = talk(chat, "x", "/reset", "abc", "/system be kind", "abc", "/reset", "abc", "/system", "abc")
    first = expected(chat, [{"role": "user", "content": "x"}])
    assert shown == "".join(f"{answer}\n" for answer in (first, alone, led, led, alone))
    assert len({first, alone, led}) == 3
    assert len(said) == 4


def test_commands_are_not_sent_and_exit_ends(chat: Chat) -> None:
    shown, said = talk(chat, "/help", "/rest", "/other", "/exit", "abc")
    assert shown == ""
    assert all(name in said[0] for name in ("/help", "/reset", "/system", "/exit"))
    assert said[1:] == [
        "There is no command /rest. Did you mean /reset?",
        "There is no command /other. /help lists those there are.",
    ]
    assert chat.messages == []


def test_interrupt_ends_the_answer_and_keeps_what_was_said(chat: Chat) -> None:
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 1:
            raise KeyboardInterrupt

    kept = chat.answer("abc", show)
    assert chat.messages[-1] == {"role": "assistant", "content": kept}
    assert kept == pieces[0]
    assert len(kept) < len(expected(chat, [{"role": "user", "content": "abc"}]))
    assert talk(chat, "def")[1] == []


def test_conversation_beyond_the_context_is_answered_with_a_message(chat: Chat) -> None:
    shown, said = talk(chat, "a" * 122, "abc")  # 122, the template's own 6, of 128
    assert said == [f"error: {said[0].removeprefix('error: ')}"]
    assert "takes 128 tokens, and the model's context holds 128" in said[0]
    assert shown == f"{chat.messages[1]['content']}\n"
    assert len(chat.messages) == 2  # the long one is not in the history
    chat.reset(None)
    assert len(chat.tokenizer(chat.answer("a" * 120, lambda _: None))["input_ids"]) <= 2  # the room that is left


def test_template_that_refuses_is_said(chat: Chat) -> None:
    chat.tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    assert talk(chat, "abc") == ("", ["error: the model's chat template refuses this conversation: no system here"])


def test_settings_of_the_checkpoint_that_do_not_suit_a_conversation_do_not_count(chat: Chat) -> None:
    plain = talk(chat, "abc", "def")
    chat.reset(None)
    own = chat.model.generation_config
    settings = {"num_beams": 3, "num_return_sequences": 2, "cache_implementation": "static", "max_length": 7}
    for name, value in settings.items():
        setattr(own, name, value)
    assert talk(chat, "abc", "def") == plain
    chat.reset(None)
    own.repetition_penalty = 100.0  # what its authors recommend for writing does
    assert talk(chat, "abc", "def") != plain
    assert chat.model.generation_config is own


def test_model_without_a_template_is_refused(ternary: Path, run: Run, tmp_path: Path) -> None:
    folder = copy_folder(ternary, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    code, _, err = run("chat", folder)
    assert code == 2
    assert "has no chat template" in err


def test_lines_may_be_piped_in(ternary: Path) -> None:
    line = [sys.executable, "-m", "ternarize.cli", "chat", str(ternary), "--tokens", "4", "--temperature", "0"]
    lines = b"abc\n/nothing\n\xff def\n/exit\n"  # not all of it is UTF-8
    done = subprocess.run(line, input=lines, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    chat = Chat(*ternarize.load(ternary), 4, 0)
    answers = [chat.answer(text, lambda _: None) for text in ("abc", "\ufffd def")]
    assert done.stdout.decode().splitlines() == "\n".join(answers).splitlines()
    assert "There is no command /nothing." in done.stderr.decode()


# -- over HTTP --------------------------------------------------------------------------------------------------------


def test_openai_client_gets_the_models_answers(ternary: Path, tmp_path: Path) -> None:
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    openai = pytest.importorskip("openai")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "ternarize.cli", "serve", str(ternary), "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stderr is not None
        for text in server.stderr:
            if "Application startup complete" in text:
                break
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=5)
        client.models.list()
        asked: dict[str, Any] = {"model": str(ternary), "messages": [{"role": "user", "content": "abc"}]}
        asked |= {"max_tokens": 6, "temperature": 0}
        whole = client.chat.completions.create(**asked).choices[0].message.content
        pieces = client.chat.completions.create(**asked, stream=True)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    finally:
        server.terminate()
        server.communicate(timeout=60)
    model, tokenizer = ternarize.load(ternary, dtype=torch.float32)
    assert whole == streamed == Chat(model, tokenizer, 6, 0).answer("abc", lambda _: None)


def test_serving_refuses_what_it_cannot_do(ternary: Path, run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    code, _, err = run("serve", ternary)
    assert code == 2
    assert "pip install 'ternarize[serve]'" in err
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    assert run("serve", make_checkpoint(tmp_path / "model").parent / "none")[0] == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run("serve", ternary, "--host", "127.0.0.1", "--port", taken.getsockname()[1])
    assert code == 2
    assert "cannot be listened on" in err
