"""GGUF: every block type against the package gguf, whole models against llama.cpp, and the way back."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import TEXTS, byte_level, copy_folder, make_checkpoint, make_recipe, make_tokenizer, random_ternary
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ternarize
from ternarize import conversion, sources
from ternarize.errors import FormatError, TernarizeError, UnsupportedModelError
from ternarize.export import find_targets
from ternarize.export.export import Exported, export
from ternarize.export.gguf import llama
from ternarize.export.gguf.blocks import Q2_0, Q2_K, Q4_0, TQ1_0, TQ2_0, TYPES, BlockType, pack, stored, unpack
from ternarize.export.gguf.vocabulary import read_vocabulary
from ternarize.export.regroup import regroup
from ternarize.export.target import TernaryFolder
from ternarize.export.verify import verify
from ternarize.importing.gguf import import_gguf
from ternarize.progress import Progress
from ternarize.tensor import TernaryTensor

pytest.importorskip("gguf")
from ternarize.export.gguf.package import load_gguf

QUIET = Progress(quiet=True)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
SYMMETRIC = (TQ1_0, TQ2_0, Q2_0, Q4_0)
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="GGUF files are read by llama-cpp-python, not installed"
)


WITHOUT_DATA: dict[str, Any] = {"feedback": False, "curvature": False, "refit": False, "correction": 0.0}
WITHOUT_DATA |= {"grid": "symmetric", "group_size": 256, "int8_group_size": 64, "scale_bits": 16, "shift_bits": 16}


def read_blocks(record: Tensor, kind: BlockType) -> Tensor:
    """What a reader that is not ours makes of the bytes; of Q2_0, which gguf lacks, written out from ggml-quants.c."""
    if kind is not Q2_0:
        gguf = load_gguf()
        return torch.from_numpy(gguf.quants.dequantize(record.numpy(), gguf.GGMLQuantizationType[kind.name]))
    rows = []
    for row in record.tolist():
        values = []
        for start in range(0, len(row), 18):
            d = torch.tensor(row[start : start + 2], dtype=torch.uint8).view(torch.float16).item()
            values += [((row[start + 2 + j // 4] >> (2 * (j % 4))) & 3) * d - d for j in range(64)]
        rows.append(values)
    return torch.tensor(rows)


# -- blocks ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TYPES), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.booleans(), st.integers(0, 9)
)
def test_a_reader_sees_the_weight(kind: BlockType, rows: int, count: int, size: int, shift: bool, seed: int) -> None:
    group = (kind.width, 2 * kind.width, count * kind.width, 5000)[size]
    tensor = random_ternary(rows, count * kind.width, group, shift and kind.shift, seed)
    assert kind.holds(tensor.shape[1], group, shift and kind.shift)
    record = pack(tensor, kind)
    assert record.shape == (rows, count * kind.size)
    read = read_blocks(record, kind)
    assert torch.equal(read, stored(tensor, kind))
    if tensor.shift is None:
        assert torch.equal(read, tensor.dequantize())
    else:
        level = tensor.scale.float().max() + tensor.shift.float().abs().max()
        assert (read - tensor.dequantize()).abs().max() <= 2**-10 * level


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SYMMETRIC), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_unpacking_gives_back_trits_scales_and_groups(kind: BlockType, rows: int, count: int, seed: int) -> None:
    tensor = random_ternary(rows, count * kind.width, kind.width, seed=seed)
    back = unpack(pack(tensor, kind), kind, "x")
    assert torch.equal(back.trits, tensor.trits)
    assert torch.equal(back.scale, tensor.scale)
    assert back.group_size == tensor.group_size
    coarse = random_ternary(rows, 4 * kind.width, 4 * kind.width, seed=seed)
    assert unpack(pack(coarse, kind), kind, "x").group_size == 4 * kind.width


@pytest.mark.parametrize("shift", [False, True])
def test_q2_k_keeps_groups_whose_scales_are_multiples_of_one(shift: bool) -> None:
    tensor = random_ternary(2, 512, 32, shift)
    step = torch.tensor([[0.01], [0.02]]).half()
    scale = step * torch.randint(1, 16, tensor.scale.shape)
    scale[:, [0, 8]] = 15 * step  # that the step is found
    even = TernaryTensor(tensor.trits, scale.half(), None if not shift else torch.zeros_like(scale), 32)
    torch.testing.assert_close(stored(even, Q2_K), even.dequantize(), rtol=2**-10, atol=0)
    error = (stored(tensor, Q2_K) - tensor.dequantize()).norm() / tensor.dequantize().norm()
    assert 1e-3 < error < 0.1


# One block of each type, as bytes: trits -1, 0, 1, -1, ... under the scale 1.5, which is 0x3e00; Q4_1 and Q2_K with the
# shift 0.25: least level -1.25 (0xbd00), of Q2_K 1.25 (0x3d00) to subtract.
GOLDEN = {
    "TQ1_0": "456ccf" * 10 + "456c" + "94bb31" * 5 + "94" + "3092bb30" + "003e",
    "TQ2_0": "186186" * 21 + "18" + "003e",
    "Q2_0": "003e" + "244992" * 5 + "24",
    "Q4_0": "003e" + "879879" * 5 + "87",
    "Q4_1": "003e" + "00bd" + "102102" * 5 + "10",
    "Q2_K": "11" * 16 + "186186" * 21 + "18" + "003e" + "003d",
}


def golden(kind: BlockType) -> Tensor:
    trits = (torch.arange(kind.width) % 3 - 1).to(torch.int8)[None]
    scale = torch.full((1, 1), 1.5).half()
    shift = torch.full((1, 1), 0.25).half() if kind.shift else None
    return pack(TernaryTensor(trits, scale, shift, kind.width), kind)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_bytes_of_one_block(kind: BlockType) -> None:
    assert golden(kind).numpy().tobytes().hex() == GOLDEN[kind.name]


def test_what_is_no_trit_is_refused() -> None:
    record = golden(Q2_0)
    record[0, 2] = 0b11  # the code of +2
    with pytest.raises(FormatError, match="not ternary"):
        unpack(record, Q2_0, "x")
    record = golden(TQ2_0)
    record[0, -2:] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)  # infinity
    with pytest.raises(FormatError, match="damaged"):
        unpack(record, TQ2_0, "x")


def test_zero_and_negative_scales_of_other_software_are_read() -> None:
    record = torch.cat([golden(Q4_0), golden(Q4_0)], 1)
    record[0, 0:2] = 0
    record[0, 19] ^= 0x80  # -1.5
    found = unpack(record, Q4_0, "x").dequantize()
    assert torch.equal(found, read_blocks(record, Q4_0))


# -- whole models ----------------------------------------------------------------------------------------------------


WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "sliding_window": None}
IDS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(5))


def convert(place: Path, text: Path, family: str, shape: dict[str, Any], tokenizer: Any = None, **changes: Any) -> Path:
    """A tiny model made ternary without calibration."""
    source = make_checkpoint(place / "source", family, chat=True, **shape)
    if tokenizer is not None:
        tokenizer.save_pretrained(source)
    conversion.convert(source, place / "student", make_recipe(text, **(WITHOUT_DATA | changes)), progress=QUIET)
    return place / "student"


@pytest.fixture(scope="module")
def folders(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One converted folder for each family, `shifted`, a llama with shifts, and `mixed`, one of several widths."""
    made = {}
    for name in FAMILIES:
        shape = WIDE | ({"sliding_window": 16} if name == "gemma3_text" else {})
        shape |= {"query_pre_attn_scalar": 64} if name == "gemma3_text" else {}
        made[name] = convert(tmp_path_factory.mktemp(name), text, name, shape)
    made["shifted"] = convert(tmp_path_factory.mktemp("shifted"), text, "llama", WIDE, grid="dlt")
    mixed = {"hidden_size": 96, "intermediate_size": 256, "head_dim": 80}  # 96, 256 and 4 * 80 columns
    made["mixed"] = convert(tmp_path_factory.mktemp("mixed"), text, "llama", mixed, group_size=64)
    return made


def differences(folder: Path, exported: Exported, ids: Tensor = IDS) -> Tensor:
    """Differences of the logits, as shares of their spread."""
    (target,) = find_targets([exported.format])
    with torch.no_grad():
        expected = ternarize.load(folder, dtype=torch.float32)[0](input_ids=ids, use_cache=False).logits
    return (target.logits(exported.readable, ids) - expected).abs() / expected.std()


def difference(folder: Path, exported: Exported) -> float:
    """Their mean."""
    return float(differences(folder, exported).mean())


@needs_llama
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_says_what_the_student_says(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    (done,) = export(folders[family], ["gguf-tq2_0"], tmp_path / "out", progress=QUIET)
    assert done.exact
    assert done.error == 0
    assert difference(folders[family], done) < (5e-3 if family == "gemma3_text" else 1e-5)


@needs_llama
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("name", [f"gguf-{kind.name.lower()}" for kind in TYPES])
def test_every_type_holds_groups_of_256(name: str, family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    (done,) = export(folders[family], [name], tmp_path / "out", progress=QUIET)
    assert done.exact
    assert differences(folders[family], done).max() < (2e-2 if family == "gemma3_text" else 1e-4)  # GELU out of a table
    (found,) = verify(done.path, text=str(_text(tmp_path)), windows=1, length=8, progress=QUIET)
    assert found.ok


def _text(place: Path) -> Path:
    (place / "words.txt").write_text("the quick brown fox jumps over the lazy dog " * 9)
    return place / "words.txt"


@needs_llama
@pytest.mark.parametrize("name", ["gguf-q4_1", "gguf-q2_k"])
def test_types_with_a_shift_hold_one(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    (done,) = export(folders["shifted"], [name], tmp_path / "out", progress=QUIET)
    assert done.exact
    assert 0 < done.error < 2**-11
    assert difference(folders["shifted"], done) < 2e-3


def test_the_licence_goes_along_into_the_folder_of_one_file(folders: dict[str, Path], tmp_path: Path) -> None:
    student = copy_folder(folders["llama"], tmp_path / "student")
    (student / "LICENSE.txt").write_text("terms")
    (done,) = export(student, ["gguf-q2_0"], progress=QUIET)
    assert {path.name for path in done.path.iterdir()} == {done.file, "LICENSE.txt", "README.md", "export.json"}
    assert (done.path / "LICENSE.txt").read_text() == "terms"


def test_a_shift_is_refused_where_there_is_none_and_measured_when_asked_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(TernarizeError, match=r"(?s)shifts, which gguf-q2_0 cannot hold.*Nothing was written"):
        export(folders["shifted"], ["gguf-q2_0"], tmp_path / "out", progress=QUIET)
    (done,) = export(folders["shifted"], ["gguf-q2_0"], tmp_path / "out", allow_lossy=True, progress=QUIET)
    assert not done.exact
    folder = TernaryFolder(folders["shifted"])
    errors = []
    for name in folder.linears:
        tensor = folder.ternary(name)
        written = read_blocks(pack(regroup(tensor, 64, False), Q2_0), Q2_0)
        errors.append(float((tensor.dequantize() - written).norm() / tensor.dequantize().norm()))
    assert done.error == pytest.approx(max(errors), rel=1e-4)


def test_groups_finer_than_a_block_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TernarizeError, match="groups of 64, gguf-tq2_0 one scale for 256"):
        export(folders["mixed"], ["gguf-tq2_0"], tmp_path / "out", progress=QUIET)
    assert not (tmp_path / "out").exists()


@needs_llama
def test_rows_of_no_whole_blocks_are_written_in_another_exact_type(folders: dict[str, Path], tmp_path: Path) -> None:
    (done,) = export(folders["mixed"], ["gguf-q2_0"], tmp_path / "out", progress=QUIET)
    assert done.exact
    assert "10 linears as Q4_0, exact too: rows of 96 columns are no multiple of 64" in done.reason
    assert difference(folders["mixed"], done) < 1e-5
    gguf = load_gguf()
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(done.readable).tensors}
    assert types["blk.0.ffn_down.weight"] == "Q2_0"
    assert types["blk.1.attn_q.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"


def test_a_type_that_no_row_fits_is_refused(ternary: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks of 256 weights, and no linear of .* 32, 56 columns"):
        export(ternary, ["gguf-tq2_0"], tmp_path / "out", progress=QUIET)


def test_other_architectures_are_refused_by_name(text: Path, tmp_path: Path) -> None:
    folder = convert(tmp_path, text, "stablelm", {"hidden_size": 64, "intermediate_size": 64}, group_size=64)
    with pytest.raises(UnsupportedModelError, match="of type 'stablelm'; GGUF files are written of llama, mistral"):
        export(folder, ["gguf-q2_0"], tmp_path / "out", progress=QUIET)


def test_settings_that_llama_cpp_lacks_are_refused(text: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "hidden_act": "gelu"}
    folder = convert(tmp_path, text, "llama", shape, group_size=64)
    with pytest.raises(UnsupportedModelError, match=r"hidden_act 'gelu', and llama\.cpp's llama has 'silu', always"):
        export(folder, ["gguf-q2_0"], tmp_path / "out", progress=QUIET)


@needs_llama
def test_llama_3_positions(text: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    shape = {"hidden_size": 64, "intermediate_size": 64, "rope_parameters": rope}
    folder = convert(tmp_path, text, "llama", shape, group_size=64)
    (done,) = export(folder, ["gguf-q2_0"], tmp_path / "out", progress=QUIET)
    assert difference(folder, done) < 1e-5


@needs_llama
def test_greedy_text_is_the_students(folders: dict[str, Path], tmp_path: Path) -> None:
    (done,) = export(folders["llama"], ["gguf-q2_0"], tmp_path / "out", progress=QUIET)
    model, _ = ternarize.load(folders["llama"], dtype=torch.float32)
    ids = IDS[:1, :8]
    expected = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)[0, 8:].tolist()
    with llama.float_copy(done.readable) as copy:
        assert llama.greedy(copy, ids[0].tolist(), 16) == expected


@needs_llama
def test_a_damaged_file_is_reported_in_llama_cpps_words(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(TernarizeError, match=r"llama\.cpp cannot load it: "):
        llama.logits(tmp_path / "x.gguf", IDS)


# -- tokenizers ------------------------------------------------------------------------------------------------------


def sentencepiece() -> PreTrainedTokenizerFast:
    """One as Gemma's: characters, with bytes for those that are not known."""
    from tokenizers.trainers import BpeTrainer

    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    words.train_from_iterator(TEXTS[:4] * 3, trainer)
    vocabulary = words.get_vocab()
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    # Every pair that makes a token is a merge, as where a SentencePiece model was taken over.
    merges = [
        (token[:i], token[i:])
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary and not token.startswith("<")
    ]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens(["<extra>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def split(pattern: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), "isolated")


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TOKENIZERS = {
    "gpt-2": lambda: byte_level(LEVEL),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), LEVEL),
    "qwen2": lambda: byte_level(split(_WORD + r"\p{N}" + _REST), PLAIN),
    "llama-bpe": lambda: byte_level(split(_WORD + r"\p{N}{1,3}" + _REST), PLAIN, ignore_merges=True),
    "smaug-bpe": lambda: byte_level(split(_WORD + r"\p{N}{1,3}" + _REST), PLAIN),
    "default": sentencepiece,
}


@needs_llama
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_reads_the_same_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert vocabulary.pre == name
    writer = load_gguf().GGUFWriter(tmp_path / "x.gguf", "llama")
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert llama.tokenize(tmp_path / "x.gguf", TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_rows_without_a_token_and_the_chat_template_are_there() -> None:
    vocabulary = read_vocabulary(make_tokenizer(chat=True), 70)
    assert vocabulary.tokens[64:] == [f"[PAD{i}]" for i in range(64, 70)]
    assert vocabulary.chat_template == make_tokenizer(chat=True).chat_template
    assert vocabulary.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 0}
    assert not vocabulary.add_bos


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"(?s)prepares text as .*Whitespace.* nor one of gpt-2"):
        read_vocabulary(byte_level(pre_tokenizers.Whitespace()), 300)


# -- and back --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worded(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted folders with a tokenizer that has merges, as all that there are."""
    made = {}
    for name in ("llama", "qwen2", "gemma3_text"):
        place = tmp_path_factory.mktemp(f"worded-{name}")
        shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "bos_token_id": 0}
        shape |= {"query_pre_attn_scalar": 64} if name == "gemma3_text" else {}
        tokenizer = sentencepiece() if name == "gemma3_text" else TOKENIZERS["smollm"]()
        tables = {"embeddings": "int6", "head": "int6"} if name == "qwen2" else {}
        made[name] = convert(place, text, name, shape, group_size=64, tokenizer=tokenizer, **tables)
    return made


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_an_export_comes_back_bit_for_bit(family: str, worded: dict[str, Path], tmp_path: Path) -> None:
    (done,) = export(worded[family], ["gguf-q2_0"], tmp_path / "out", progress=QUIET)
    found = import_gguf(done.readable, tmp_path / "back", progress=QUIET)
    assert found.linears == len(TernaryFolder(worded[family]).linears)
    assert found.group_sizes == {64: found.linears}
    before, after = TernaryFolder(worded[family]), TernaryFolder(tmp_path / "back")
    for name in before.linears:
        assert torch.equal(before.ternary(name).trits, after.ternary(name).trits)
        assert torch.equal(before.ternary(name).scale, after.ternary(name).scale)
    assert before.rest == after.rest
    assert before.tables.keys() == after.tables.keys()  # which hold int6 in int8
    for name in before.rest:
        one = float(family == "gemma3_text" and name.endswith("norm.weight"))  # which llama.cpp adds, and Gemma uses
        assert torch.equal(before.tensor(name).float() + one, after.tensor(name).float() + one)
    model, tokenizer = ternarize.load(worded[family], dtype=torch.float32)
    again, same = ternarize.load(tmp_path / "back", dtype=torch.float32)
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [same(text)["input_ids"] for text in TEXTS]
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("apart", "tied"), [(0.05, True), (1.0, False)], ids=["quantized apart", "strangers"])
def test_a_head_that_is_the_embedding_quantized_apart_is_tied_again(
    apart: float,
    tied: bool,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TERNARIZE_CACHE", str(tmp_path / "cache"))
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}
    source = make_checkpoint(tmp_path / "source", "llama", chat=True, **shape)
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    noise = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    table = model.model.embed_tokens.weight.data
    model.lm_head.weight.data.copy_((1 - apart) * table + apart * noise * table.std())
    model.save_pretrained(source)
    TOKENIZERS["smollm"]().save_pretrained(source)
    conversion.convert(source, tmp_path / "student", make_recipe(text, **WITHOUT_DATA), progress=QUIET)
    (done,) = export(tmp_path / "student", ["gguf-q4_0"], tmp_path / "out", allow_lossy=True, progress=QUIET)
    capfd.readouterr()
    folder = sources.resolve(str(done.readable))
    assert capfd.readouterr().err == ""  # where that is no terminal, no bar
    names = load_file(folder / "model.safetensors").keys()
    assert ("lm_head.weight" not in names) == tied
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.config.tie_word_embeddings == tied
    assert (found.model.embed_tokens.weight is found.lm_head.weight) == tied
    expected = model.lm_head.weight.data
    torch.testing.assert_close(found.lm_head.weight.data.float(), expected, rtol=0, atol=0.02 * float(expected.max()))


def test_other_exact_types_come_back_too(worded: dict[str, Path], tmp_path: Path) -> None:
    before = TernaryFolder(worded["llama"])
    for name in ("gguf-q4_0", "gguf-q4_1", "gguf-tq2_0"):  # the last by allowing loss: 64 columns are no group of 256
        (done,) = export(worded["llama"], [name], tmp_path / name, allow_lossy=True, progress=QUIET)
        import_gguf(done.readable, tmp_path / f"back-{name}", progress=QUIET)
        after = TernaryFolder(tmp_path / f"back-{name}")
        same = [torch.equal(before.ternary(n).dequantize(), after.ternary(n).dequantize()) for n in before.linears]
        assert all(same) == done.exact


@needs_llama
def test_what_llama_cpp_quantized_is_imported_or_refused_by_name(worded: dict[str, Path], tmp_path: Path) -> None:
    (done,) = export(worded["llama"], ["gguf-q2_0"], tmp_path / "out", progress=QUIET)
    quantize(done.readable, tmp_path / "q2_0.gguf", "Q2_0")
    import_gguf(tmp_path / "q2_0.gguf", tmp_path / "back", progress=QUIET)
    before, after = TernaryFolder(worded["llama"]), TernaryFolder(tmp_path / "back")
    for name in before.linears:
        assert torch.equal(before.ternary(name).dequantize(), after.ternary(name).dequantize())
    quantize(done.readable, tmp_path / "q5_0.gguf", "Q5_0")
    with pytest.raises(TernarizeError, match=r"q_proj is Q5_0 in q5_0\.gguf, and not ternary.*--skip"):
        import_gguf(tmp_path / "q5_0.gguf", tmp_path / "no", progress=QUIET)
    assert not (tmp_path / "no").exists()


def quantize(before: Path, after: Path, kind: str) -> None:
    """As llama.cpp's own quantizer does."""
    import ctypes

    from llama_cpp import llama_cpp as native

    params = native.llama_model_quantize_default_params()
    params.ftype = getattr(native, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = params.pure = True
    assert native.llama_model_quantize(str(before).encode(), str(after).encode(), ctypes.byref(params)) == 0


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind, but long enough to be looked at" * 9)
    for name, said in (("x.gguf", "is not a GGUF file, or damaged"), ("absent.gguf", "no such file")):
        with pytest.raises(TernarizeError, match=said):
            import_gguf(tmp_path / name, tmp_path / "out", progress=QUIET)
