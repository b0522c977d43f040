"""llama.cpp itself, by the package llama-cpp-python: what it makes of a file."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternarize.errors import TernarizeError

_ERROR = 4  # ggml's level of messages
_FLOAT32 = 0  # ggml's number of the type


def logits(file: Path, ids: Tensor) -> Tensor:
    """What llama.cpp predicts, float32 [B, T, V], for token ids int64 [B, T].

    Keys and values are kept in float32. llama.cpp rounds activations to 8 bits before a product with
    blocks; what a file says without that is seen in its `float_copy`.

    Raises:
        TernarizeError: llama-cpp-python is not installed, or refuses the file.
    """
    with _context(file, ids.shape[1]) as (native, state, vocabulary):
        return torch.stack([_read(native, state, vocabulary, window.tolist()) for window in ids])


@contextmanager
def float_copy(file: Path) -> Iterator[Path]:
    """The same model with every weight as llama.cpp reads it from its block, in float32: a file beside, for a while.

    Raises:
        TernarizeError: as `logits`.
    """
    native = _load()
    with tempfile.TemporaryDirectory(prefix=f"{file.name}.", dir=file.parent) as scratch, _messages(native) as reasons:
        copy = Path(scratch) / "float32.gguf"
        params = native.llama_model_quantize_default_params()
        params.ftype = native.LLAMA_FTYPE_ALL_F32
        params.allow_requantize = True
        params.nthread = torch.get_num_threads()
        if native.llama_model_quantize(str(file).encode(), str(copy).encode(), ctypes.byref(params)):
            raise TernarizeError(
                f"{file}: llama.cpp cannot read its weights: {'; '.join(reasons) or 'no reason given'}"
            )
        yield copy


def greedy(file: Path, ids: list[int], count: int) -> list[int]:
    """The `count` tokens that llama.cpp writes behind `ids`, each the likeliest.

    Raises:
        TernarizeError: as `logits`.
    """
    with _context(file, len(ids) + count) as (native, state, vocabulary):
        written = [int(_read(native, state, vocabulary, ids)[-1].argmax())]
        while len(written) < count:
            at = len(ids) + len(written) - 1
            written.append(int(_read(native, state, vocabulary, written[-1:], at)[-1].argmax()))
    return written


def tokenize(file: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, special tokens in them read as such, with what the file says to add.

    Raises:
        TernarizeError: as `logits`.
    """
    native = _load()
    with _model(native, file, vocabulary_only=True) as model:
        vocabulary = native.llama_model_get_vocab(model)
        found = []
        for text in texts:
            data = text.encode()
            room = len(data) + 8
            tokens = (native.llama_token * room)()
            count = native.llama_tokenize(vocabulary, data, len(data), tokens, room, True, True)
            found.append(list(tokens[:count]))
        return found


def _load() -> Any:
    try:
        from llama_cpp import llama_cpp as native
    except ImportError as error:
        raise TernarizeError(
            f"reading a GGUF export needs llama.cpp ({error}). Run: pip install 'ternarize[llama]'"
        ) from error
    return native


@contextmanager
def _messages(native: Any) -> Iterator[list[str]]:
    """llama.cpp's error messages go to this list, all others nowhere."""
    found: list[str] = []

    @native.llama_log_callback  # type: ignore[untyped-decorator]
    def note(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            found.append(text.decode(errors="replace").strip())

    native.llama_log_set(note, None)
    try:
        yield found
    finally:
        native.llama_log_set(native.llama_log_callback(), None)


@contextmanager
def _model(native: Any, file: Path, vocabulary_only: bool = False) -> Iterator[Any]:
    with _messages(native) as reasons:
        native.llama_backend_init()
        params = native.llama_model_default_params()
        params.vocab_only = vocabulary_only
        model = native.llama_model_load_from_file(str(file).encode(), params)
        if not model:
            raise TernarizeError(f"{file}: llama.cpp cannot load it: {'; '.join(reasons) or 'no reason given'}")
        try:
            yield model
        finally:
            native.llama_model_free(model)


@contextmanager
def _context(file: Path, tokens: int) -> Iterator[tuple[Any, Any, int]]:
    native = _load()
    with _model(native, file) as model:
        params = native.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = tokens
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.type_k = params.type_v = _FLOAT32
        params.flash_attn_type = 0
        state = native.llama_init_from_model(model, params)
        if not state:
            raise TernarizeError(f"{file}: llama.cpp cannot run it with {tokens} tokens.")
        try:
            yield native, state, native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
        finally:
            native.llama_free(state)


def _read(native: Any, state: Any, vocabulary: int, ids: list[int], at: int = 0) -> Tensor:
    """Logits [T, V] of tokens at positions from `at` on; from 0 on, what was read before is forgotten."""
    if at == 0:
        native.llama_memory_clear(native.llama_get_memory(state), True)
    batch = native.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, at + i, 1, 0
            batch.logits[i] = True
        if code := native.llama_decode(state, batch):
            raise TernarizeError(f"llama.cpp's llama_decode returned {code}.")
        found = native.llama_get_logits(state)
        return torch.from_numpy(np.ctypeslib.as_array(found, (len(ids), vocabulary)).copy())
    finally:
        native.llama_batch_free(batch)
