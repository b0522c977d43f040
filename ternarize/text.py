"""Text -> windows of token ids, for calibration and for measuring.

Sources, each `NAME` or `NAME@WEIGHT` in a mixture:

    self                       the model writes its own; seeded, cached, needs no download and no licence
    pydoc                      Python's own manual, on every machine (it differs a little between versions)
    file.jsonl  file.txt       records with "text" or "messages", or plain text; .gz too
    owner/name[:config[:split]] a Hub dataset, streamed; its "text" or "messages" column

Shapes: B windows, T tokens in a window.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from ternarize.checkpoint import Checkpoint
from ternarize.errors import TernarizeError, first_line
from ternarize.files import write_tensors
from ternarize.generation import generation_settings
from ternarize.progress import Progress, quiet_transformers
from ternarize.reading import Item, Message, read, read_text
from ternarize.recipe import Calibration
from ternarize.sources import cache_folder

READ_AHEAD = 4  # windows are drawn from a pool this many times larger, where the source has as much
WRITER_BATCH = 64  # windows that a model writes side by side;
LARGER_BATCH = 1024  # on an accelerator, if its memory holds them
WRITER_VERSION = 3  # of the way `write_windows` works: part of the cache's key


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        TernarizeError: the folder has none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise TernarizeError(f"{folder} has no tokenizer that transformers can read: {first_line(error)}") from error


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer starts a text with a beginning-of-sequence token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def window_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What every window begins with: the beginning-of-sequence token where the tokenizer has that habit, or nothing."""
    return [tokenizer.bos_token_id] if adds_bos(tokenizer) else []


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """The tokens that a model of so many has an embedding for, without special ones; int64, ascending."""
    known = set(tokenizer.get_vocab().values()) & set(range(vocabulary))
    return torch.tensor(sorted(known - set(tokenizer.all_special_ids)))


def fingerprint(ids: Tensor) -> str:
    """sha256 of token ids [B, T], shape included."""
    data = f"{list(ids.shape)}".encode() + ids.to(torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def split_source(source: str) -> tuple[str, float]:
    """`NAME@WEIGHT` -> (name, weight); the weight is 1 where none is given.

    Raises:
        TernarizeError: the weight is not a positive number.
    """
    name, at, weight = source.rpartition("@")
    if not at or "/" in weight or Path(source).expanduser().is_file():  # an @ of its own
        return source, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise TernarizeError(
            f"text source {source!r}: the weight after @ is {weight!r}, but must be a positive number."
        )
    return name, value


def read_files(checkpoint: str, texts: tuple[str, ...]) -> list[Path]:
    """What is read of the user's own files and folders, of a checkpoint and of sources of text by their names."""
    paths = [Path(name).expanduser() for name in (checkpoint, *(split_source(text)[0] for text in texts))]
    return [path for path in paths if path.exists()]


def calibration_windows(
    sources: tuple[str, ...],
    folder: Path,
    samples: int,
    length: int,
    seed: int,
    progress: Progress,
    writer: PreTrainedModel | None = None,
    device: str = "cpu",
) -> Tensor:
    """Draw windows from a mixture of sources.

    Args:
        sources: `NAME` or `NAME@WEIGHT`; samples are shared out by weight.
        folder: the teacher's checkpoint, for its tokenizer and for `self`.
        samples, length: B windows of T tokens. A source with less text gives what it has, and the progress says so.
        writer: the teacher itself, where it is loaded: it writes `self`, and nothing is cached.
        device: where the teacher writes if it is not loaded.

    Returns:
        int64 [B, T], shuffled.

    Raises:
        TernarizeError: an unknown or unreadable source, or one too short for a single window.
    """
    parsed = [split_source(source) for source in sources]
    shares = share_out(samples, [weight for _, weight in parsed])
    tokenizer = load_tokenizer(folder)
    parts = []
    for position, ((name, _), wanted) in enumerate(zip(parsed, shares, strict=True)):
        if name == "self" and writer is not None:
            in_float32 = writer if writer.dtype == torch.float32 else deepcopy(writer).float()
            part = write_windows(in_float32, tokenizer, wanted, length, seed, progress)
        elif name == "self":
            part = self_windows(folder, wanted, length, seed, progress, device)
        else:
            part = draw(windows(read(name), tokenizer, length, READ_AHEAD * wanted, name), wanted, seed + position)
        if len(part) < wanted:
            progress.say(f"{name} has text for {len(part)} windows of {length} tokens, not {wanted}; using those.")
        parts.append(part)
    ids = torch.cat(parts)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]


def draw_windows(checkpoint: Checkpoint, wanted: Calibration, progress: Progress, device: str) -> Tensor:
    """Windows int64 [B, T] of the text that a recipe wants; `self` is what the teacher writes, on `device`."""
    return calibration_windows(
        wanted.text,
        checkpoint.folder,
        wanted.samples,
        wanted.length,
        wanted.seed,
        progress,
        checkpoint.model,
        device,
    )


def random_windows(count: int, length: int, tokenizer: PreTrainedTokenizerBase, vocabulary: int, seed: int) -> Tensor:
    """Windows of tokens drawn evenly from the model's vocabulary, special ones left out; int64 [count, length].

    Each starts with the beginning-of-sequence token where the tokenizer has that habit.
    """
    known, start = ordinary_tokens(tokenizer, vocabulary), window_start(tokenizer)
    ids = known[torch.randint(len(known), (count, length), generator=torch.Generator().manual_seed(seed))]
    ids[:, : len(start)] = torch.tensor(start, dtype=torch.int64)
    return ids


def share_out(samples: int, weights: list[float]) -> list[int]:
    """Whole shares of `samples` by weight, by largest remainder; each at least 1, so no named source is dropped."""
    exact = [samples * weight / sum(weights) for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    while sum(shares) < samples:
        shares[max(range(len(shares)), key=lambda i: exact[i] - shares[i])] += 1
    while sum(shares) > samples and max(shares) > 1:
        shares[max(range(len(shares)), key=lambda i: (shares[i] > 1, shares[i] - exact[i]))] -= 1
    return shares


def draw(ids: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of the windows [B, T], chosen by `seed`."""
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:count]]


def windows(
    items: Iterator[Item], tokenizer: PreTrainedTokenizerBase, length: int, most: int, source: str = "the text"
) -> Tensor:
    """Tokenize items, join them with the end-of-text token, and cut windows without overlap.

    Each window starts with the beginning-of-sequence token where the tokenizer has that habit.

    Returns:
        int64 [B, T], B at most `most`; what is left at the end and fills no window is dropped.

    Raises:
        TernarizeError: no window can be filled.
    """
    start = window_start(tokenizer)
    body = length - len(start)
    stream: list[int] = []
    for item in items:
        text = item if isinstance(item, str) else render_chat(item, tokenizer, source)
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if len(stream) >= body * most:
            break
    count = min(most, len(stream) // body)
    if count == 0:
        raise TernarizeError(
            f"{source} holds {len(stream)} tokens, too few for one window of {length}. "
            "Give more text, or a smaller calibration.length."
        )
    return _cut(stream, start, body, count)


def evaluation_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None) -> Tensor:
    """One text cut into windows as the quantization papers do: no overlap, the tail dropped, BOS where it is habit.

    Returns:
        int64 [B, T].

    Raises:
        TernarizeError: the text does not fill one window.
    """
    start = window_start(tokenizer)
    stream = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    body = length - len(start)
    count = len(stream) // body
    if count == 0:
        raise TernarizeError(
            f"the evaluation text holds {len(stream)} tokens, too few for one window of {length}. "
            "Give more text, or a smaller --length."
        )
    count = count if most is None else min(count, most)
    return _cut(stream, start, body, count)


def _cut(stream: list[int], start: list[int], body: int, count: int) -> Tensor:
    """The first `count` windows of a token stream, each `start` and then `body` tokens of it; int64 [B, T]."""
    return torch.tensor([start + stream[i * body : (i + 1) * body] for i in range(count)])


def read_whole(source: str) -> str:
    """A source as one text for measuring: WikiText's raw file by the papers' convention, others joined by blank lines.

    WikiText: each line is a row, an all-white line an empty row; rows are joined by two newlines, as in the Hugging
    Face dataset.

    Raises:
        TernarizeError: unknown or unreadable.
    """
    path = Path(source).expanduser()
    if "wiki" in path.name and ".jsonl" not in path.name and path.is_file():
        lines = read_text(path).split("\n")
        if lines and not lines[-1]:
            lines.pop()
        return "\n\n".join("" if not line.strip() else line + "\n" for line in lines)
    texts = [item if isinstance(item, str) else "\n\n".join(m["content"] for m in item) for item in read(source)]
    return "\n\n".join(texts)


def render_chat(messages: list[Message], tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """A conversation by the model's chat template, or as plain paragraphs where it has none.

    Args:
        source: what to call its origin.

    Raises:
        TernarizeError: the template refuses it.
    """
    if tokenizer.chat_template:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program of the model's author, and raises what it likes
            roles = ", ".join(message["role"] for message in messages)
            raise TernarizeError(
                f"{source}: the model's chat template refuses a conversation of {roles}: {first_line(error)} "
                "Leave such conversations out, or give their text as plain text."
            ) from error
    return "\n\n".join(message["content"] for message in messages)


# -- the model's own text ------------------------------------------------------------------------------------------


def self_windows(folder: Path, samples: int, length: int, seed: int, progress: Progress, device: str = "cpu") -> Tensor:
    """Text that the model writes itself, from the cache where it was written before; int64 [B, T]."""
    from safetensors.torch import load_file

    place = torch.device(device).type
    key = f"{WRITER_VERSION}:{_checkpoint_key(folder)}:{samples}:{length}:{seed}{'' if place == 'cpu' else f':{place}'}"
    path = cache_folder() / "self" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    if path.is_file():
        return load_file(path)["ids"]
    tokenizer = load_tokenizer(folder)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    ids = write_windows(model, tokenizer, samples, length, seed, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"ids": ids})
    return ids


def write_windows(
    model: Any, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int, progress: Progress
) -> Tensor:
    """Sample windows from the model: half from a random first token (LLM-QAT, arXiv 2305.17888), half, where the model
    chats, from the opening of a user's turn (Magpie, arXiv 2406.08464), so that it writes both sides.

    Sampling is at temperature 1 from the 50 likeliest tokens and does not stop at the end of a text.

    Returns:
        int64 [B, T].
    """
    generator = torch.Generator().manual_seed(seed)
    start = window_start(tokenizer)
    chat = chat_opening(tokenizer)
    ordinary = ordinary_tokens(tokenizer, model.config.vocab_size)
    chatting = samples // 2 if chat and len(chat) < length // 2 else 0
    firsts = ordinary[torch.randint(len(ordinary), (samples - chatting,), generator=generator)]
    prompt = torch.tensor([[*start, int(token)] for token in firsts])
    with progress.bar("writing calibration text", total=samples * length, unit="token") as bar:
        bar.update(prompt.numel())
        if chatting:  # bring all beginnings to one length, then go on side by side
            opening = torch.tensor(chat)[None].expand(chatting, -1)
            bar.update(opening.numel())
            shared = max(prompt.shape[1], opening.shape[1])
            both = [opening, prompt]
            prompt = torch.cat(
                [p if p.shape[1] == shared else _sample(model, p, shared, seed, bar.update) for p in both]
            )
        batch = min(len(prompt), WRITER_BATCH if model.device.type == "cpu" else LARGER_BATCH)
        smaller = (batch >> halvings for halvings in itertools.count(1))
        counted = 0

        def count(tokens: int) -> None:
            nonlocal counted
            counted += tokens
            bar.update(tokens)

        @find_executable_batch_size(starting_batch_size=batch, reduce_batch_size_fn=lambda: next(smaller))
        def write(side_by_side: int) -> Tensor:
            count(-counted)  # what a larger batch came to before memory ran out
            parts = enumerate(prompt.split(side_by_side))
            return torch.cat([_sample(model, part, length, seed + 1 + number, count) for number, part in parts])

        ids: Tensor = write()
    return ids


def _sample(model: Any, prompt: Tensor, length: int, seed: int, advance: Callable[[int], object]) -> Tensor:
    class Advance(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
            advance(len(ids))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    with torch.random.fork_rng(devices=[]), torch.no_grad(), generation_settings(model):
        torch.manual_seed(seed)
        prompt = prompt.to(model.device)
        written: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            max_length=length,
            eos_token_id=[],
            pad_token_id=0,
            stopping_criteria=[Advance()],
        )
        return written.cpu()


def chat_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens before the first word of a user's turn, or none where the model has no chat template."""
    if not tokenizer.chat_template:
        return []
    mark = "\u2042here\u2042"
    try:
        text = str(tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False))
    except Exception:  # a template is a program of the model's author; one that refuses this turn is no error of ours
        return []
    return tokenizer(text.partition(mark)[0], add_special_tokens=False)["input_ids"] if mark in text else []


def _checkpoint_key(folder: Path) -> str:
    """Names, sizes and times of a checkpoint's weights and config: cheap, and changes when they do."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    return ";".join(f"{f.resolve()}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
