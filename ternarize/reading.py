"""Sources of text that lie in files, in Python's manual or on the Hub -> texts and conversations.

    pydoc                      Python's own manual, on every machine (it differs a little between versions)
    file.jsonl  file.txt       records with "text" or "messages", or plain text; .json (a list) and .gz too
    owner/name[:config[:split]] a Hub dataset, streamed; its "text" or "messages" column

Where a record has both, the conversation counts.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ternarize.errors import TernarizeError, first_line

Message = dict[str, str]
Item = str | list[Message]


def read(source: str) -> Iterator[Item]:
    """The items of one source other than `self`: texts, or conversations.

    Raises:
        TernarizeError: unknown, unreadable, or a record without text.
    """
    path = Path(source).expanduser()
    if source == "pydoc":
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    elif path.is_file():
        if ".jsonl" in path.name:
            yield from _read_jsonl(path)
        elif path.name.removesuffix(".gz").endswith(".json"):
            yield from _read_json(path)
        else:
            yield read_text(path)
    elif path.suffix or source.startswith((".", "/", "~")):
        raise TernarizeError(f"text source {source!r}: no such file.")
    else:
        yield from _read_hub(source)


def read_text(path: Path) -> str:
    """A file as UTF-8, unpacked where its name ends in .gz.

    Raises:
        TernarizeError: unreadable, damaged or not UTF-8.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TernarizeError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Item]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TernarizeError(f"{path}, line {number} is not JSON: {error}") from error
        yield _item(record, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[Item]:
    try:
        records = json.loads(read_text(path))
    except ValueError as error:
        raise TernarizeError(f"{path} is not JSON: {error} A file with a record on each line is a .jsonl.") from error
    if not isinstance(records, list):
        raise TernarizeError(f"{path} holds a {type(records).__name__}, but must hold a list of records.")
    for number, record in enumerate(records, start=1):
        yield _item(record, f"{path}, record {number}")


def _item(record: Any, where: str) -> Item:
    """A record's text or conversation."""
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        for key in ("messages", "conversations"):
            messages = record.get(key)
            if isinstance(messages, list) and all(
                isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
            ):
                return [{"role": str(m["role"]), "content": _content(m["content"], where)} for m in messages]
        if isinstance(record.get("text"), str):
            return record["text"]
    keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise TernarizeError(f'{where} has neither "text" nor "messages" with role and content; found: {keys}.')


def _content(content: Any, where: str) -> str:
    """What a message says: a text, nothing, or a list of parts of text."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise TernarizeError(f"{where} has a message whose content is neither text nor parts of text: {str(content)[:60]}")


def _read_hub(source: str) -> Iterator[Item]:
    from datasets import load_dataset

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split or "train", streaming=True)
        for record in dataset:
            yield _item(record, f"dataset {source}")
    except TernarizeError:
        raise
    except Exception as error:  # datasets raises whatever its readers raise; name the source, keep the cause
        raise TernarizeError(
            f"text source {source!r} is not self, pydoc or a file, and could not be read as a Hub dataset: "
            f"{first_line(error)} Check the spelling or the connection; self needs neither."
        ) from error
