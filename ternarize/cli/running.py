"""generate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ternarize.cli.app import app
from ternarize.cli.options import AnyFolder, DeviceOption, DtypeOption, RevisionOption, check_device, dtype_of
from ternarize.errors import TernarizeError
from ternarize.progress import quiet_transformers


@app.command()
def generate(
    folder: AnyFolder,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many new tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    revision: RevisionOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Generate text, printed as it comes."""
    import torch
    from transformers import TextStreamer

    from ternarize.evaluate import load_any
    from ternarize.sources import resolve
    from ternarize.text import load_tokenizer

    class Printer(TextStreamer):  # type: ignore[misc]
        def __init__(self, tokenizer: Any) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            typer.echo(text, nl=stream_end)

    check_device(device)
    path = resolve(folder, revision)
    model: Any = load_any(path, device, dtype_of(dtype), activations=None)
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
        with quiet_transformers():
            model.generate(**inputs.to(model.device), max_new_tokens=tokens, streamer=Printer(tokenizer), **settings)
    except IndexError as error:
        raise TernarizeError(f"{folder} cannot take so long a text: {error}. Choose fewer --tokens.") from error
