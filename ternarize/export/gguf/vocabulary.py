"""A tokenizer as llama.cpp has it: byte-level BPE ("gpt2"), or SentencePiece's BPE over characters ("llama").

llama.cpp knows how a text is split before the merges by a name. Its own converter finds the name by a hash of what a
tokenizer makes of a fixed text; here it is found by the patterns in tokenizer.json, so that a tokenizer with other
words but the same patterns is found too, and an unknown one is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ternarize.errors import UnsupportedModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (patterns one after the other, whether whole words are looked up before merging) -> llama.cpp's name
PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_WORD + r"|\p{N}" + _TAIL,), False): "qwen2",
    ((_WORD + r"|\p{N}{1,3}" + _TAIL,), True): "llama-bpe",
    ((_WORD + r"|\p{N}{1,3}" + _TAIL,), False): "smaug-bpe",
    ((_TEKKEN,), True): "tekken",
}

_NEVER = "<no> <merges>"  # of two texts that are no tokens: llama.cpp wants one merge at least
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; the fields are its metadata's."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space: bool
    chat_template: str | list[dict[str, str]] | None

    def add_to(self, writer: Any) -> None:
        """Write it as metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Args:
        tokenizer: one with a tokenizer.json.
        rows: of the embedding; those that have no token are named so.

    Raises:
        UnsupportedModelError: llama.cpp has no such tokenizer.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which GGUF files are written from. "
            "Export to another format."
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre_tokenizer = spec["model"], spec.get("pre_tokenizer")
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"the tokenizer is of type {model.get('type')}; GGUF files are written with BPE. Export to another format."
        )
    pieces = model.get("byte_fallback", False)
    pre = _pre_tokenizer(spec.get("normalizer"), pre_tokenizer, model)
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens, types = _tokens(model, spec["added_tokens"], rows)
    sample = tokenizer("a")["input_ids"]
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if pieces else None,
        merges=None if pieces else [" ".join(pair) for pair in merges] or [_NEVER],
        special=_special(tokenizer, rows),
        add_bos=len(sample) > 1 and sample[0] == tokenizer.bos_token_id,
        add_eos=len(sample) > 1 and sample[-1] == tokenizer.eos_token_id,
        add_space=pieces
        and tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("\u2581"),
        chat_template=_template(tokenizer.chat_template),
    )


def _pre_tokenizer(normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None, model: Any) -> str:
    """llama.cpp's name for how a text is split; "default" for SentencePiece's, which is not."""
    if model.get("byte_fallback", False):
        kinds = {step["type"] for step in (*_steps(normalizer), *_steps(pre_tokenizer))}
        if kinds <= {"Replace", "Prepend", "Metaspace", "Split"}:
            return "default"
    else:
        key = (tuple(_patterns(pre_tokenizer) or ()), bool(model.get("ignore_merges", False)))
        if key in PRE_TOKENIZERS and all(step["type"] == "NFC" for step in _steps(normalizer)):
            return PRE_TOKENIZERS[key]  # NFC: llama.cpp takes text to be that already
    raise UnsupportedModelError(
        f"the tokenizer prepares text as {json.dumps([normalizer, pre_tokenizer])[:300]}, which is neither "
        f"SentencePiece's way nor one of {', '.join(PRE_TOKENIZERS.values())}. Export to another format."
    )


def pre_tokenizer_of(name: str) -> Any:
    """The pre-tokenizer of byte-level BPE that llama.cpp calls so.

    Raises:
        UnsupportedModelError: none of `PRE_TOKENIZERS`.
    """
    from tokenizers import Regex, pre_tokenizers

    for (patterns, _), known in PRE_TOKENIZERS.items():
        if known == name:
            splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
            level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            return pre_tokenizers.Sequence([*splits, level])
    raise UnsupportedModelError(
        f"the tokenizer splits text in the way {name!r}; known are {', '.join(PRE_TOKENIZERS.values())}."
    )


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one after the other."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for one in step.get("normalizers") or step.get("pretokenizers") or [] for inner in _steps(one)]


def _patterns(pre_tokenizer: dict[str, Any] | None) -> list[str] | None:
    """The patterns that a pre-tokenizer splits by, one after the other; None where it does anything else."""
    patterns = []
    for step in _steps(pre_tokenizer):
        match step:
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(_DIGIT)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                patterns += [_GPT2] if step.get("use_regex", True) else []
            case _:
                return None
    return patterns


def _tokens(model: dict[str, Any], added: list[dict[str, Any]], rows: int) -> tuple[list[str], list[int]]:
    """The text and the type of every row's token."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    pieces = model.get("byte_fallback", False)
    for token, i in model["vocab"].items():
        if i < rows:
            tokens[i] = token
            types[i] = BYTE if pieces and len(token) == 6 and token.startswith("<0x") else NORMAL
            if pieces and token == model.get("unk_token"):
                types[i] = UNKNOWN
    for entry in added:
        if entry["id"] < rows:
            tokens[entry["id"]] = entry["content"].replace("\u2581", " ") if not entry["special"] else entry["content"]
            types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores that make llama.cpp merge in the merges' order: it joins what makes the best token first."""
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank) + 1)
    return [-float(rank.get(token, len(rank) + 1)) for token in tokens]


def _special(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    names = ("bos", "eos", "unk", "pad")
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    return {name: number for name, number in found.items() if number is not None and number < rows}


def _template(template: Any) -> str | list[dict[str, str]] | None:
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template or None
