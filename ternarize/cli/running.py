"""generate, chat, serve."""

from __future__ import annotations

import contextlib
import io
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ternarize.cli.app import app
from ternarize.cli.options import AnyFolder, DeviceOption, DtypeOption, RevisionOption, check_device, dtype_of
from ternarize.errors import TernarizeError
from ternarize.progress import quiet_transformers
from ternarize.recipe import LARGEST_SEED


@app.command()
def generate(
    folder: AnyFolder,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many new tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="For temperatures above 0.")] = 0,
    revision: RevisionOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Generate text, printed as it comes."""
    import torch

    from ternarize.chat import Printer
    from ternarize.evaluate import load_any
    from ternarize.generation import TASTE, generation_settings
    from ternarize.sources import resolve
    from ternarize.text import load_tokenizer

    check_device(device)
    kind = dtype_of(dtype)
    path = resolve(folder, revision)
    model: Any = load_any(path, device, kind, activations=None)
    tokenizer = load_tokenizer(path)
    inputs: Any
    if chat:
        if not tokenizer.chat_template:
            raise TernarizeError(f"{folder} has no chat template. Leave --chat out.")
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
        typer.echo(prompt, nl=False)
    if inputs["input_ids"].shape[1] == 0:
        raise TernarizeError("the prompt is empty. Give some text to go on from.")
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature else {})
    try:
        with quiet_transformers(), generation_settings(model, TASTE):
            printer = Printer(tokenizer, _show)
            inputs = inputs.to(model.device)
            model.generate(**inputs, max_new_tokens=tokens, streamer=printer, tokenizer=tokenizer, **settings)
            _show("\n")
    except IndexError as error:
        raise TernarizeError(f"{folder} cannot take so long a text: {error}. Choose fewer --tokens.") from error


@app.command()
def chat(
    folder: AnyFolder,
    system: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What the model is told first.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many tokens in an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="For temperatures above 0.")] = 0,
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Talk with a model, through its chat template.

    One line is one message; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves. Lines may be piped in.
    """
    import torch

    from ternarize.chat import Chat, converse
    from ternarize.evaluate import load_any
    from ternarize.sources import resolve
    from ternarize.text import load_tokenizer

    check_device(device)
    kind = dtype_of(dtype)
    path = resolve(folder, revision)
    tokenizer = load_tokenizer(path)
    conversation = Chat(load_any(path, device, kind, None), tokenizer, tokens, temperature, system)
    torch.manual_seed(seed)
    converse(conversation, _lines(), _show, lambda text: typer.echo(text, err=True))


@app.command()
def serve(
    folder: AnyFolder,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Answer over HTTP as OpenAI's API does.

    By transformers' own server, until Ctrl-C. Needs pip install 'ternarize[serve]'. The API is at
    http://HOST:PORT/v1, and the model is called as it was given here.
    """
    from huggingface_hub import constants
    from transformers.utils.import_utils import is_serve_available

    from ternarize.quantizer import QUANT_METHOD, check_folder, quant_method
    from ternarize.sources import resolve

    if not is_serve_available():
        raise TernarizeError("serving needs transformers' server. Run: pip install 'ternarize[serve]'")
    from transformers.cli.serve import Serve

    check_device(device)
    dtype_of(dtype)
    path = resolve(folder, revision)
    if quant_method(path) == QUANT_METHOD:
        check_folder(path)
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise TernarizeError(
            f"{host}:{port} cannot be listened on: {error.strerror}. Choose another --port."
        ) from error
    Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # /v1/models lists it, and fails without
    name = str(path) if Path(folder).is_dir() else f"{folder}@{revision}" if revision else folder
    typer.echo(f"http://{host}:{port}/v1 answers as model {name!r}. Ctrl-C ends it.", err=True)
    Serve(force_model=name, device=device, dtype=dtype, host=host, port=port)


def _show(text: str) -> None:
    typer.echo(text, nl=False)


def _lines() -> Iterator[str]:
    """What is typed, until Ctrl-D; or what is piped in."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 are no reason to end the conversation
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - gives `input` its keys and its history
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo("")
            return
        except KeyboardInterrupt:
            typer.echo("\nCtrl-D leaves.", err=True)
