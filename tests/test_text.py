"""Text: reading every kind of source, cutting windows, mixtures by weight, and the text that a model writes itself.

The tokenizer is the tiny one of `tiny.py`, one token a character, so that a test can say which tokens it expects.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import struct
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import characters, make_checkpoint, make_model, make_text, make_tokenizer
from tokenizers import processors
from torch import Tensor

from ternarize import text
from ternarize.errors import TernarizeError
from ternarize.progress import Bar, Progress
from ternarize.text import (
    adds_bos,
    calibration_windows,
    chat_opening,
    draw,
    evaluation_windows,
    fingerprint,
    load_tokenizer,
    random_windows,
    read,
    read_whole,
    self_windows,
    split_source,
    windows,
    write_windows,
)

PAD, BOS, EOS = 0, 1, 2
QUIET = Progress(quiet=True)
PLAIN, CHAT = make_tokenizer(), make_tokenizer(chat=True)


def with_bos(chat: bool = False) -> Any:
    """The tiny tokenizer with the habit of Llama's: every text starts with <s>."""
    tokenizer = make_tokenizer(chat)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def spelled(words: str) -> list[int]:
    """The tokens of a text, from the vocabulary's list: the reference for the tokenizer."""
    known = {"\n": "Ċ", " ": "Ġ"}
    return [characters().index(known.get(letter, letter)) for letter in words]


class Recorder(Progress):
    """Remembers what was said, and how far the bar went."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.total = self.done = 0

    def say(self, message: str) -> None:
        self.said.append(message)

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        self.total, self.done = total, 0
        yield self

    def update(self, n: int = 1) -> None:
        self.done += n


# -- windows -------------------------------------------------------------------------------------------------------


def test_random_windows_hold_the_vocabulary_but_no_special_token() -> None:
    ids = random_windows(40, 50, PLAIN, 64, seed=0)
    assert set(ids.flatten().tolist()) == set(PLAIN.get_vocab().values()) - set(PLAIN.all_special_ids)
    assert random_windows(40, 50, PLAIN, 20, seed=0).max() == 19  # a tokenizer may have more tokens than its model
    begun = random_windows(3, 50, with_bos(), 64, seed=0)
    assert begun[:, 0].tolist() == [BOS] * 3
    assert BOS not in begun[:, 1:]


def test_the_tiny_tokenizer_spells() -> None:
    assert PLAIN("ab c\nZ")["input_ids"] == spelled("ab c\nZ") == [5, 6, 4, 7, 3, 56]
    assert not adds_bos(PLAIN)
    assert adds_bos(with_bos())


def test_documents_are_joined_by_the_end_of_text_and_the_tail_is_dropped() -> None:
    ids = windows(iter(["abc", "de", "fghij"]), PLAIN, length=4, most=100)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[*spelled("abc"), EOS], [*spelled("de"), EOS, *spelled("f")], spelled("ghij")]


def test_every_window_starts_with_the_token_that_the_tokenizer_puts_before_a_text() -> None:
    ids = windows(iter(["abc", "de", "fghij"]), with_bos(), length=4, most=100)
    assert ids.tolist() == [
        [BOS, *spelled("abc")],
        [BOS, EOS, *spelled("de")],
        [BOS, EOS, *spelled("fg")],
        [BOS, *spelled("hij")],
    ]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.text("abc XYZ\n", max_size=30), min_size=1, max_size=8),
    st.integers(2, 9),
    st.integers(1, 20),
    st.booleans(),
)
def test_windows_do_not_overlap_and_leave_nothing_out(documents: list[str], length: int, most: int, bos: bool) -> None:
    tokenizer = with_bos() if bos else PLAIN
    stream = [token for document in documents for token in [*spelled(document), EOS]]
    body = length - bos
    if len(stream) < body:
        with pytest.raises(TernarizeError, match="too few for one window"):
            windows(iter(documents), tokenizer, length, most)
        return
    ids = windows(iter(documents), tokenizer, length, most)
    assert ids.shape == (min(most, len(stream) // body), length)
    assert ids[:, int(bos) :].flatten().tolist() == stream[: len(ids) * body]
    assert not bos or ids[:, 0].tolist() == [BOS] * len(ids)


def test_no_more_is_read_than_needed() -> None:
    def endless() -> Iterator[str]:
        for count in range(10**9):
            assert count < 10
            yield "abc"

    assert windows(endless(), PLAIN, length=4, most=5).tolist() == [[*spelled("abc"), EOS]] * 5


def test_a_tokenizer_without_an_end_of_text_joins_documents_directly() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert windows(iter(["abc", "de"]), tokenizer, length=5, most=9).tolist() == [spelled("abcde")]


def test_a_conversation_is_cut_as_its_template_renders_it() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    with_template = windows(iter([messages]), CHAT, length=22, most=1)
    assert with_template.tolist() == [[*spelled("user hi assistant yo "), EOS]]
    without = windows(iter([messages]), PLAIN, length=7, most=1)
    assert without.tolist() == [[*spelled("hi\n\nyo"), EOS]]


def test_too_little_text_is_refused_with_its_length_and_its_source() -> None:
    with pytest.raises(TernarizeError, match=r"notes\.txt holds 4 tokens, too few for one window of 5.*Give more text"):
        windows(iter(["abc"]), PLAIN, length=5, most=1, source="notes.txt")
    with pytest.raises(TernarizeError, match="holds 0 tokens"):
        windows(iter([]), PLAIN, length=5, most=1)


def test_one_text_is_measured_in_windows_without_overlap_and_without_its_tail() -> None:
    assert evaluation_windows("abcdefg", PLAIN, 3, None).tolist() == [spelled("abc"), spelled("def")]
    assert evaluation_windows("abcdefg", with_bos(), 3, None).tolist() == [
        [BOS, *spelled(part)] for part in ("ab", "cd", "ef")
    ]
    assert evaluation_windows("abcdefg", PLAIN, 3, 1).tolist() == [spelled("abc")]
    assert evaluation_windows("abcdefg", PLAIN, 3, 9).shape == (2, 3)


def test_a_text_too_short_to_measure_is_refused() -> None:
    assert evaluation_windows("abc", PLAIN, 3, None).shape == (1, 3)
    with pytest.raises(TernarizeError, match=r"holds 2 tokens, too few for one window of 3.*--length"):
        evaluation_windows("ab", PLAIN, 3, None)
    with pytest.raises(TernarizeError, match="too few for one window of 4"):
        evaluation_windows("ab", with_bos(), 4, None)


def test_the_fingerprint_is_that_of_shape_and_ids() -> None:
    ids = torch.tensor([[5, 6], [7, 8]])
    assert fingerprint(ids) == hashlib.sha256(b"[2, 2]" + struct.pack("<4q", 5, 6, 7, 8)).hexdigest()
    assert fingerprint(ids) == fingerprint(ids.int()) == fingerprint(ids.t().contiguous().t())
    assert len({fingerprint(ids), fingerprint(ids.t()), fingerprint(ids.view(1, 4))}) == 3


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TernarizeError, match=re.escape(f"{tmp_path} has no tokenizer that transformers can read")):
        load_tokenizer(tmp_path)


# -- sources -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("self", ("self", 1.0)),
        ("self@3", ("self", 3.0)),
        ("a.jsonl@0.5", ("a.jsonl", 0.5)),
        ("owner/name:config:split@2", ("owner/name:config:split", 2.0)),
        ("odd@name.txt@2", ("odd@name.txt", 2.0)),
        ("/home/me@corp/a.txt", ("/home/me@corp/a.txt", 1.0)),
        ("/home/me@corp/a.txt@3", ("/home/me@corp/a.txt", 3.0)),
    ],
)
def test_a_source_may_carry_a_weight(source: str, expected: tuple[str, float]) -> None:
    assert split_source(source) == expected


@pytest.mark.parametrize("weight", ["0", "-1", "many", "", "nan", "inf"])
def test_a_weight_that_is_not_positive_is_refused(weight: str) -> None:
    with pytest.raises(TernarizeError, match=rf"'self@{weight}'.*is '{weight}', but must be a positive number"):
        split_source(f"self@{weight}")


def write_jsonl(path: Path, records: list[Any], compress: bool = False) -> str:
    """Records as people write them, letters not escaped; the path."""
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if compress else data)
    return str(path)


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize("compress", [False, True])
def test_a_jsonl_file_gives_texts_and_conversations(tmp_path: Path, compress: bool) -> None:
    extra = [{**message, "name": "x"} for message in MESSAGES]
    records = [{"text": "a\nb", "id": 1}, {"messages": MESSAGES}, "bare", {"conversations": extra, "text": "other"}]
    path = write_jsonl(tmp_path / ("data.jsonl.gz" if compress else "data.jsonl"), records, compress)
    assert list(read(path)) == ["a\nb", MESSAGES, "bare", MESSAGES]


def test_empty_lines_of_a_jsonl_file_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}')
    assert list(read(str(path))) == ["a", "b"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_only_a_newline_ends_a_record(tmp_path: Path, separator: str) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": f"a{separator}b"}, {"text": "c"}])
    assert list(read(path)) == [f"a{separator}b", "c"]


@pytest.mark.parametrize("compress", [False, True])
def test_a_text_file_is_one_text(tmp_path: Path, compress: bool) -> None:
    path = tmp_path / ("data.txt.gz" if compress else "data.txt")
    data = "one\n\ntwo é\n".encode()
    path.write_bytes(gzip.compress(data) if compress else data)
    assert list(read(str(path))) == ["one\n\ntwo é\n"]


def test_pythons_manual_is_always_there() -> None:
    items = list(read("pydoc"))
    assert len(items) > 50
    assert all(isinstance(item, str) for item in items)
    assert items == list(read("pydoc"))


def test_a_path_may_start_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("abc")
    assert list(read("~/notes.txt")) == ["abc"]


@pytest.mark.parametrize("line", ["{'text': 1}", '{"text": "a"', "abc"])
def test_a_line_that_is_not_json_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(TernarizeError, match=re.escape(f"{path}, line 3 is not JSON")):
        list(read(str(path)))


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"body": "a", "title": "b"}, "body, title"),
        ({"text": 3}, "text"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "messages"),
        ({"messages": "hi"}, "messages"),
        (["a"], "list"),
        (3, "int"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_a_record_without_text_is_refused_with_its_line_and_keys(tmp_path: Path, record: Any, found: str) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}, record])
    with pytest.raises(TernarizeError, match=re.escape(f"{path}, line 2 has neither") + f".*found: {found}"):
        list(read(path))


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/missing/file", "~/missing", "missing.jsonl.gz"])
def test_a_file_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(TernarizeError, match=re.escape(f"text source {name!r}: no such file")):
        list(read(name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "é".encode("latin-1")),
        ("data.jsonl", b'{"text": "\xff"}'),
        ("plain.txt.gz", b"not compressed"),
        ("cut.txt.gz", gzip.compress(b"abc" * 100)[:-12]),
        ("sum.txt.gz", gzip.compress(b"abc")[:-8] + bytes(8)),
        ("damaged.txt.gz", gzip.compress(b"abc")[:10] + b"\xff" * 20),
    ],
    ids=["not UTF-8", "not UTF-8 in JSON", "not gzip", "cut", "wrong sum", "damaged"],
)
def test_a_file_that_cannot_be_decoded_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TernarizeError, match=re.escape(f"{path} cannot be read as UTF-8 text")):
        list(read(str(path)))


class FakeHub(types.ModuleType):
    """Stands for the `datasets` package: remembers the question, gives records or raises."""

    def __init__(self, answer: list[Any] | Exception) -> None:
        super().__init__("datasets")
        self.answer, self.asked = answer, []

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> list[Any]:
        self.asked.append((name, config, split, streaming))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train", True)),
        ("owner/name:en", ("owner/name", "en", "train", True)),
        ("owner/name:en:test", ("owner/name", "en", "test", True)),
        ("owner/name::test", ("owner/name", None, "test", True)),
    ],
)
def test_a_dataset_is_named_with_its_config_and_split(
    source: str, asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub([{"text": "a"}, {"messages": MESSAGES}])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert list(read(source)) == ["a", MESSAGES]
    assert hub.asked == [asked]


def test_a_dataset_that_cannot_be_read_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason in (RuntimeError("no such repository\nand more"), RuntimeError()):
        monkeypatch.setitem(sys.modules, "datasets", FakeHub(reason))
        with pytest.raises(TernarizeError) as caught:
            list(read("owner/name"))
        assert "'owner/name'" in str(caught.value)
        assert (str(reason).split("\n")[0] or "RuntimeError") in str(caught.value)
        assert caught.value.__cause__ is reason
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([{"body": "a"}]))
    with pytest.raises(TernarizeError, match=r"^dataset owner/name has neither .* found: body"):
        list(read("owner/name"))


# -- whole texts for measuring -------------------------------------------------------------------------------------

WIKI_FILE = " \n = Title = \n \n First line .\n Second line .\n\t\n"  # 6 lines; the piece after the last is no line
WIKI_ROWS = ["", " = Title = \n", "", " First line .\n", " Second line .\n", ""]


@pytest.mark.parametrize("name", ["wiki.test.raw", "wikitext2_raw_test.txt", "wikitext2_raw_test.txt.gz"])
def test_wikitext_is_joined_as_the_rows_of_the_dataset(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(WIKI_FILE.encode()) if name.endswith("gz") else WIKI_FILE.encode())
    expected = "\n\n = Title = \n\n\n\n\n First line .\n\n\n Second line .\n\n\n"
    assert expected == "\n\n".join(WIKI_ROWS)
    assert read_whole(str(path)) == expected


def test_wikitext_in_the_home_folder_is_joined_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "wiki.test.raw").write_text(WIKI_FILE)
    assert read_whole("~/wiki.test.raw") == "\n\n".join(WIKI_ROWS)


def test_other_sources_are_joined_by_blank_lines(tmp_path: Path) -> None:
    plain = tmp_path / "notes.txt"
    plain.write_text(WIKI_FILE)
    assert read_whole(str(plain)) == WIKI_FILE
    records = write_jsonl(tmp_path / "wiki.jsonl", [{"text": "a\nb"}, {"messages": MESSAGES}, {"text": "c"}])
    assert read_whole(records) == "a\nb\n\nhi\n\nyo\n\nc"


# -- mixtures ------------------------------------------------------------------------------------------------------


def test_a_draw_is_decided_by_its_seed_and_takes_no_window_twice() -> None:
    ids = torch.arange(40).view(20, 2)
    drawn = draw(ids, 8, seed=3)
    assert torch.equal(drawn, draw(ids, 8, seed=3))
    assert not torch.equal(drawn, draw(ids, 8, seed=4))
    assert drawn.shape == (8, 2)
    rows = [tuple(row) for row in drawn.tolist()]
    assert len(set(rows)) == 8
    assert set(rows) <= {tuple(row) for row in ids.tolist()}
    assert sorted(draw(ids, 99, seed=3).flatten().tolist()) == list(range(40))


@pytest.fixture
def letters(tmp_path: Path) -> list[str]:
    """Three long files, each of one letter."""
    for letter in "abc":
        (tmp_path / f"{letter}.txt").write_text(letter * 2000)
    make_tokenizer().save_pretrained(tmp_path)
    return [str(tmp_path / f"{letter}.txt") for letter in "abc"]


def mixture(sources: list[str], samples: int, seed: int = 0, progress: Progress = QUIET, length: int = 8) -> Tensor:
    return calibration_windows(tuple(sources), Path(sources[0]).parent, samples, length, seed, progress)


def count(ids: Tensor, letter: str) -> int:
    return int((ids[:, 0] == spelled(letter)[0]).sum())


def test_a_list_of_records_is_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "ab"}, {"messages": MESSAGES}]))
    assert list(read(str(path))) == ["ab", MESSAGES]
    for wrong, words in (
        ('{"text": "ab"}', "holds a dict, but must hold a list"),
        ("[", "is not JSON"),
        ("[3]", "record 1"),
    ):
        path.write_text(wrong)
        with pytest.raises(TernarizeError, match=words):
            list(read(str(path)))


def test_parts_of_text_are_a_messages_text_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    parts: list[Any] = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]})
    )
    assert list(read(str(path))) == [[{"role": "user", "content": "abc"}, {"role": "assistant", "content": ""}]]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [*parts, {"type": "image", "url": "x"}]}]}))
    with pytest.raises(TernarizeError, match="line 1 has a message whose content is neither text nor parts of text"):
        list(read(str(path)))


@pytest.mark.parametrize("template", ["{{ raise_exception('no system') }}", "{{ 1 + 'a' }}", "{{ nothing.at.all }}"])
def test_a_conversation_that_the_template_refuses_is_named(template: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    words = r"mine\.jsonl: the model's chat template refuses a conversation of system, user"
    with pytest.raises(TernarizeError, match=words):
        windows(iter([[{"role": role, "content": "a"} for role in ("system", "user")]]), tokenizer, 4, 1, "mine.jsonl")


@pytest.mark.parametrize(
    ("weights", "samples", "expected"),
    [
        (("", "", ""), 12, (4, 4, 4)),
        (("@3", "@1", ""), 10, (6, 2, 2)),
        (("@0.5", "@0.25", "@0.25"), 8, (4, 2, 2)),
        (("@1000", "", ""), 20, (18, 1, 1)),  # a source that is named is in the mixture
    ],
)
def test_samples_are_shared_out_by_weight(
    letters: list[str], weights: tuple[str, ...], samples: int, expected: tuple[int, ...]
) -> None:
    ids = mixture([path + weight for path, weight in zip(letters, weights, strict=True)], samples)
    assert ids.shape == (samples, 8)
    assert tuple(count(ids, letter) for letter in "abc") == expected


@pytest.mark.parametrize(("sources", "samples"), [(3, 10), (3, 64), (2, 5), (3, 7), (2, 8)])
def test_a_mixture_has_as_many_windows_as_asked_for(letters: list[str], sources: int, samples: int) -> None:
    ids = mixture(letters[:sources], samples)
    assert len(ids) == samples
    shares = [count(ids, letter) for letter in "abc"[:sources]]
    assert max(shares) - min(shares) <= 1


def test_a_mixture_is_shuffled_and_decided_by_its_seed(tmp_path: Path, letters: list[str]) -> None:
    sources = [str(make_text(tmp_path / "random.txt")), letters[0]]
    ids = mixture(sources, 16)
    assert torch.equal(ids, mixture(sources, 16))
    assert not torch.equal(ids, mixture(sources, 16, seed=1))
    order = ids[:, 0] == spelled("a")[0]
    assert order.tolist() not in (sorted(order.tolist()), sorted(order.tolist(), reverse=True))


def test_windows_are_drawn_from_more_text_than_needed(letters: list[str]) -> None:
    path = Path(letters[0]).with_name("parts.txt")
    path.write_text("a" * 32 + "b" * 32 + "c" * 2000)
    ids = mixture([str(path)], 8)  # the first 8 windows are a and b; the pool is 4 times as large
    assert count(ids, "c") > 0


def test_a_source_with_too_little_text_gives_what_it_has_and_says_so(letters: list[str]) -> None:
    Path(letters[1]).write_text("b" * 17)
    progress = Recorder()
    ids = mixture(letters[:2], 12, progress=progress)
    assert (count(ids, "a"), count(ids, "b")) == (6, 2)
    assert progress.said == [f"{letters[1]} has text for 2 windows of 8 tokens, not 6; using those."]


def test_a_source_too_short_for_one_window_is_named(letters: list[str]) -> None:
    Path(letters[1]).write_text("b" * 5)
    with pytest.raises(TernarizeError, match=re.escape(letters[1]) + " holds 6 tokens"):
        mixture(letters[:2], 4)


# -- the model's own text ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def written(model: Any, tokenizer: Any, samples: int = 6, length: int = 12, seed: int = 0) -> Tensor:
    return write_windows(model, tokenizer, samples, length, seed, QUIET)


def test_a_model_writes_windows_that_its_seed_decides(model: Any) -> None:
    ids = written(model, PLAIN)
    assert ids.dtype == torch.int64
    assert ids.shape == (6, 12)
    assert torch.equal(ids, written(model, PLAIN))
    assert not torch.equal(ids, written(model, PLAIN, seed=1))
    assert len({tuple(row) for row in ids.tolist()}) == 6


# What checkpoints hold beside their weights, and would change the text, its length, or what comes back.
GENERATION: dict[str, Any] = {
    "max_new_tokens": 5,
    "min_new_tokens": 40,
    "repetition_penalty": 5.0,
    "temperature": 0.01,
    "top_p": 0.1,
    "num_beams": 3,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "stop_strings": ["a"],
    "cache_implementation": "static",
}


@pytest.mark.parametrize("name", GENERATION)
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_the_models_own_settings_do_not_change_what_it_writes(name: str, tokenizer: Any, model: Any) -> None:
    expected = written(model, tokenizer)
    other = make_model()
    given = other.generation_config
    setattr(given, name, GENERATION[name])
    assert torch.equal(written(other, tokenizer), expected)
    assert other.generation_config is given


def test_writing_leaves_the_global_random_state_alone(model: Any) -> None:
    before = torch.random.get_rng_state()
    written(model, PLAIN)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("samples", [1, 5, 6])
def test_half_of_the_windows_open_a_users_turn_where_the_model_chats(model: Any, samples: int) -> None:
    opening = spelled("user ")
    assert chat_opening(CHAT) == opening
    ids = written(model, CHAT, samples)
    assert ids.shape == (samples, 12)
    assert ids[: samples // 2, : len(opening)].tolist() == [opening] * (samples // 2)
    firsts = ids[samples // 2 :, 0].tolist()
    assert not set(firsts) & {PAD, BOS, EOS}
    assert samples < 5 or len(set(firsts)) > 1


def test_a_chat_opening_too_long_for_the_window_is_left_out(model: Any) -> None:
    ids = written(model, CHAT, samples=4, length=10)
    assert ids.shape == (4, 10)
    assert not any(row[:5] == spelled("user ") for row in ids.tolist())


def test_written_windows_start_as_the_tokenizer_starts_a_text(model: Any) -> None:
    ids = written(model, with_bos())
    assert ids[:, 0].tolist() == [BOS] * 6
    assert not set(ids[:, 1].tolist()) & {PAD, BOS, EOS}
    assert not set(written(model, PLAIN)[:, 0].tolist()) & {PAD, BOS, EOS}


def test_writing_goes_on_after_the_end_of_a_text() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    ids = written(model, PLAIN, samples=16, length=24)
    rest = [row[row.index(EOS) + 1 :] for row in ids.tolist() if EOS in row[:-4]]
    assert rest  # the end of the text was written somewhere
    assert all(any(token not in (PAD, EOS) for token in row) for row in rest)


def test_writing_in_batches_repeats_nothing_and_counts_every_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "WRITER_BATCH", 2)
    progress = Recorder()
    ids = write_windows(model, CHAT, 10, 12, 0, progress)
    assert ids.shape == (10, 12)
    assert ids[:5, :5].tolist() == [spelled("user ")] * 5
    assert len({tuple(row) for row in ids.tolist()}) == 10
    assert progress.done == progress.total == 120


def test_what_memory_does_not_hold_side_by_side_is_written_in_smaller_batches(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    original = text._sample

    def sample(model: Any, prompt: Tensor, length: int, seed: int, advance: Any) -> Tensor:
        tried.append(len(prompt))
        if len(prompt) > 2:
            advance(len(prompt))
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(model, prompt, length, seed, advance)

    monkeypatch.setattr(text, "_sample", sample)
    progress = Recorder()
    assert write_windows(model, PLAIN, 5, 12, 0, progress).shape == (5, 12)
    assert tried == [5, 2, 2, 1]
    assert progress.done == progress.total == 60


def test_a_template_that_refuses_or_hides_the_users_words_opens_nothing() -> None:
    tokenizer = make_tokenizer(chat=True)
    assert chat_opening(make_tokenizer()) == []
    tokenizer.chat_template = "{{ raise_exception('no user turn') }}"
    assert chat_opening(tokenizer) == []
    tokenizer.chat_template = "nothing of yours"
    assert chat_opening(tokenizer) == []


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkpoint, and an empty cache."""
    monkeypatch.setenv("TERNARIZE_CACHE", str(tmp_path / "cache"))
    return make_checkpoint(tmp_path / "model")


def test_what_a_model_wrote_is_kept_and_not_written_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = self_windows(checkpoint, 4, 12, 0, QUIET)
    assert torch.equal(ids, written(make_model(), PLAIN, samples=4))
    cached = list((checkpoint.parent / "cache").rglob("*.safetensors"))
    assert len(cached) == 1

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("written a second time")

    monkeypatch.setattr(text, "write_windows", refuse)
    assert torch.equal(self_windows(checkpoint, 4, 12, 0, QUIET), ids)
    for arguments in ((5, 12, 0), (4, 13, 0), (4, 12, 1)):
        with pytest.raises(AssertionError, match="a second time"):
            self_windows(checkpoint, *arguments, QUIET)


def test_another_model_in_the_same_folder_writes_anew(checkpoint: Path) -> None:
    ids = self_windows(checkpoint, 4, 12, 0, QUIET)
    make_checkpoint(checkpoint, seed=1)
    renewed = self_windows(checkpoint, 4, 12, 0, QUIET)
    assert not torch.equal(renewed, ids)
    assert torch.equal(renewed, written(make_model(seed=1), PLAIN, samples=4))


def test_the_model_itself_can_be_one_source_of_a_mixture(checkpoint: Path) -> None:
    file = checkpoint.parent / "a.txt"
    file.write_text("a" * 500)
    ids = calibration_windows((f"{file}@3", "self"), checkpoint, 8, 12, 0, QUIET)
    own = {tuple(row) for row in self_windows(checkpoint, 2, 12, 0, QUIET).tolist()}
    assert ids.shape == (8, 12)
    assert len(own & {tuple(row) for row in ids.tolist()}) == 2
    assert int((ids == spelled("a")[0]).all(1).sum()) == 6
