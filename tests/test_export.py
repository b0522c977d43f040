"""Exports: what each format holds is known before it is written, and its own reader says the same as the student.

Three families on every format; what is not exact is refused, measured and written when asked for; nothing is lost.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import copy_folder, edit_tensors, make_checkpoint, make_recipe, read_config, read_tensors
from torch import Tensor

import ternarize
from ternarize import Recipe, conversion
from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.export import find_targets, targets
from ternarize.export.export import EXPORT_FILE, Exported, export
from ternarize.export.packed import pack_words, unpack_words
from ternarize.export.regroup import regroup, relative_error
from ternarize.export.target import TernaryFolder
from ternarize.export.verify import verify
from ternarize.progress import Progress
from ternarize.publish import prepare
from ternarize.tensor import TernaryTensor, expand_groups

QUIET = Progress(quiet=True)
FAMILIES = ("llama", "qwen3", "gemma3_text")
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
FLOATS = {"dense": torch.bfloat16, "metal": torch.float16, "metal-bf16": torch.bfloat16, "mlx": torch.float16}
FLOATS |= {"mlx-bf16": torch.bfloat16, "compressed-tensors": torch.float32}  # of what each file holds
READERS = {"compressed-tensors": "compressed_tensors", "gptq": "gptqmodel", "mlx": "mlx_lm", "mlx-bf16": "mlx_lm"}


def needs_reader(name: str) -> None:
    """Skip where the format's reader is not installed."""
    if name in READERS and importlib.util.find_spec(READERS[name]) is None:
        pytest.skip(f"{name} is read by {READERS[name]}, which is not installed")


def quick(text: Path, **changes: Any) -> Recipe:
    """No calibration; groups that every format has."""
    free = {"feedback": False, "curvature": False, "refit": False, "correction": 0.0}
    return make_recipe(text, **({"grid": "symmetric", "group_size": 32, "int8_group_size": 32} | free | changes))


@pytest.fixture(scope="module")
def folders(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One converted folder for each family, and `shifted`, a llama with shifts."""
    made = {}
    for name in (*FAMILIES, "shifted"):
        place = tmp_path_factory.mktemp(name)
        grid = "dlt" if name == "shifted" else "symmetric"
        source = make_checkpoint(place / "source", "llama" if name == "shifted" else name, **WIDE)
        made[name] = place / "student"
        conversion.convert(source, made[name], quick(text, grid=grid, scale_bits=4, shift_bits=4), progress=QUIET)
    return made


@torch.no_grad()
def student_logits(folder: Path, ids: Tensor, dtype: torch.dtype | None = None, tables: bool = True) -> Tensor:
    """The student's, in float32; with `dtype`, after all its floats went through that type, which is all that a reader
    of a file in it may lose. In float16 the ternary weights are the same after it.

    Args:
        tables: whether embeddings and heads do, too.
    """
    model: Any = ternarize.load(folder, dtype=torch.float32)[0]
    if dtype is not None:
        model.dequantize()
        for name, parameter in model.named_parameters():
            if tables or not any(part in name for part in ("embed_tokens", "lm_head")):
                parameter.copy_(parameter.to(dtype))
    return model(input_ids=ids, use_cache=False).logits


IDS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(5))


# -- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["dense", "metal", "metal-bf16", "mlx", "mlx-bf16", "compressed-tensors", "gptq"])
def test_the_reader_says_what_the_student_says(
    name: str, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    needs_reader(name)
    (done,) = export(folders[family], [name], tmp_path / "out", progress=QUIET)
    assert done.exact
    (target,) = find_targets([name])
    found, expected = target.logits(done.readable, IDS), student_logits(folders[family], IDS)
    assert float(((found - expected).abs() / expected.std()).mean()) < target.tolerance
    if name != "gptq":  # its reader keeps tables and norms in a type of its own
        same = student_logits(folders[family], IDS, FLOATS[name], tables=name != "mlx")
        assert float(((found - same).abs() / same.std()).max()) < 1e-5


def test_shifts_are_exact_where_the_format_has_biases(folders: dict[str, Path], tmp_path: Path) -> None:
    (done,) = export(folders["shifted"], ["metal"], tmp_path / "out", progress=QUIET)
    assert done.exact
    assert 0 < done.error < 2**-10  # biases are a rounded difference
    expected = student_logits(folders["shifted"], IDS)
    difference = (targets()["metal"].logits(done.readable, IDS) - expected).abs()
    assert float(difference.mean()) < 2e-3 * float(expected.std())


@pytest.mark.parametrize("name", ["metal", "mlx", "compressed-tensors", "gptq"])
def test_packed_tensors_mean_the_weights(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """By the formulas in each format's drawing, without its reader."""
    (done,) = export(folders["qwen3"], [name], tmp_path / "out", progress=QUIET)
    tensors, folder = read_tensors(done.path), TernaryFolder(folders["qwen3"])
    size = 32
    for linear in folder.linears:
        own = {key.removeprefix(f"{linear}."): t for key, t in tensors.items() if key.startswith(f"{linear}.")}
        if name in ("metal", "mlx"):
            codes = unpack_words(own["weight"].view(torch.int32), 2).float()
            columns = codes.shape[1]
            bias = own["qbiases" if name == "metal" else "biases"].float()
            weight = codes * expand_groups(own["scales"].float(), columns, size) + expand_groups(bias, columns, size)
        elif name == "gptq":
            codes = unpack_words(own["qweight"].t(), 2).float()
            zeros = unpack_words(own["qzeros"], 2).float().t()[:, own["g_idx"].long()] + 1
            weight = own["scales"].t().float()[:, own["g_idx"].long()] * (codes - zeros)
        else:
            codes = unpack_words(own["weight_packed"], 2).float() - 2
            weight = codes * expand_groups(own["weight_scale"].float(), codes.shape[1], size)
            assert own["weight_shape"].tolist() == list(folder.linears[linear])
        assert torch.equal(weight, folder.ternary(linear).dequantize())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2"])
def test_dense_takes_what_the_packed_formats_refuse(family: str, text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", family)
    conversion.convert(source, tmp_path / "student", quick(text, group_size=12), progress=QUIET)
    with pytest.raises(UnsupportedModelError, match="dense export"):
        export(tmp_path / "student", ["compressed-tensors"], progress=QUIET)
    (done,) = export(tmp_path / "student", ["dense"], progress=QUIET)
    assert done.path == tmp_path / "student-dense"
    expected = student_logits(tmp_path / "student", IDS)
    difference = (targets()["dense"].logits(done.path, IDS) - expected).abs() / expected.std()
    assert float(difference.mean()) < 0.02


def test_sizes_are_foretold(folders: dict[str, Path], tmp_path: Path) -> None:
    names = ["dense", "metal", "mlx", "mlx-bf16", "compressed-tensors", "gptq"]
    folder = TernaryFolder(folders["gemma3_text"])
    for done in export(folders["gemma3_text"], names, tmp_path, progress=QUIET):
        ternary, total = targets()[done.format].sizes(folder)
        tensors = read_tensors(done.path)
        own = [t.nbytes for key, t in tensors.items() if key.rpartition(".")[0] in folder.linears]
        assert sum(own) == ternary, done.format
        assert sum(t.nbytes for t in tensors.values()) == total, done.format
        assert done.bits_per_ternary_weight == 8 * ternary / sum(rows * c for rows, c in folder.linears.values())
        assert total < done.bytes < total + 40_000  # names in the headers


def test_mlx_config_says_where_rotary_settings_are_to_be_found(folders: dict[str, Path], tmp_path: Path) -> None:
    """mlx-lm reads the fields that configs had before transformers 5, and goes on with its defaults without them."""
    (done,) = export(folders["gemma3_text"], ["mlx"], tmp_path / "out", progress=QUIET)
    config = read_config(done.path)
    assert config["rope_theta"] == config["rope_parameters"]["full_attention"]["rope_theta"]
    assert config["rope_local_base_freq"] == config["rope_parameters"]["sliding_attention"]["rope_theta"]


# -- not exact -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "bitnet"])
def test_a_lossy_format_is_refused_and_writes_nothing(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TernarizeError, match=rf"{name} cannot hold.*model.layers.0.*--allow-lossy"):
        export(folders["shifted"], ["dense", name], tmp_path / "out", progress=QUIET)
    assert not list(tmp_path.iterdir())


def test_a_lossy_format_says_by_how_much(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = TernaryFolder(folders["shifted"])
    (done,) = export(folders["shifted"], ["compressed-tensors"], tmp_path / "o", allow_lossy=True, progress=QUIET)
    assert not done.exact
    tensors = read_tensors(done.path)
    worst = 0.0
    for name in folder.linears:
        codes = unpack_words(tensors[f"{name}.weight_packed"], 2).float() - 2
        weight = codes * expand_groups(tensors[f"{name}.weight_scale"].float(), codes.shape[1], 32)
        worst = max(worst, relative_error(folder.ternary(name).dequantize(), weight))
    assert done.error == pytest.approx(worst)
    assert 0.01 < worst < 0.9


def test_groups_are_cut_joined_or_fitted_again() -> None:
    generator = torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (6, 48), generator=generator, dtype=torch.int8)
    tensor = TernaryTensor(trits, torch.rand(6, 3, generator=generator).half() + 0.5, None, 16)
    for size in (4, 8, 16):
        assert torch.equal(regroup(tensor, size, False).dequantize(), tensor.dequantize())
    cut = regroup(tensor, 4, False)
    assert torch.equal(regroup(cut, 16, False).scale, tensor.scale)
    fitted = regroup(tensor, 48, False)
    assert fitted.scale.shape == (6, 1)
    assert 0 < relative_error(tensor.dequantize(), fitted.dequantize()) < 0.5


def test_words_hold_their_first_code_lowest() -> None:
    codes = torch.tensor([[1, 2, 0, 3] + [0] * 11 + [2], [3] * 16])
    assert pack_words(codes, 2).tolist() == [[-2147483648 + 0b11001001], [-1]]
    assert torch.equal(unpack_words(pack_words(codes, 2), 2).long(), codes)


# -- before calibration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "names", "refused"),
    [
        ({}, ["metal", "compressed-tensors", "gptq", "dense"], None),
        ({"grid": "dlt"}, ["metal"], None),
        ({"grid": "dlt"}, ["metal", "compressed-tensors"], "compressed-tensors"),
        ({}, ["bitnet"], "bitnet"),
        ({"group_size": 24}, ["metal"], "metal"),
        ({}, ["gguf-tq7"], "gguf-tq7"),
    ],
)
def test_convert_refuses_before_it_calibrates(
    changes: dict[str, Any],
    names: list[str],
    refused: str | None,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def calibrating(*_: Any, **__: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(conversion, "_convert", calibrating)
    source = make_checkpoint(tmp_path / "source", **WIDE)
    with pytest.raises(TernarizeError if refused else InterruptedError, match=refused):
        conversion.convert(source, tmp_path / "out", quick(text, **changes), formats=names, progress=QUIET)
    assert not (tmp_path / "out").exists()


def test_convert_writes_the_exports_beside_its_output(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", **WIDE)
    conversion.convert(source, tmp_path / "out", quick(text), formats=["metal", "dense"], progress=QUIET)
    assert {Exported.read(tmp_path / name).format for name in ("out-metal", "out-dense")} == {"metal", "dense"}


# -- nothing is lost -----------------------------------------------------------------------------------------------


def test_what_is_there_is_kept_unless_force_says_otherwise(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(TernarizeError, match="--force"):
        export(folders["llama"], ["dense"], output, progress=QUIET)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ternarize.export.stock.copy_side_files", full)
        with pytest.raises(OSError, match="No space"):
            export(folders["llama"], ["dense"], output, force=True, progress=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "mine.txt").read_text() == "mine"
    export(folders["llama"], ["dense"], output, force=True, progress=QUIET)
    assert (output / EXPORT_FILE).is_file()
    assert not (output / "mine.txt").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [("dense", "from_pretrained("), ("metal", 'device_map="cpu"'), ("mlx", "mlx_lm"), ("gptq", "GPTQModel.load(")],
)
def test_an_export_has_a_card_that_says_how_to_load_it(
    name: str, says: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    student = copy_folder(folders["llama"], tmp_path / "student")
    card = student / "README.md"
    table = "| text | KL |\n| --- | --- |\n| a | 1.5 |\n"
    card.write_text(card.read_text().replace("## Size", f"## Quality\n\n{table}\nmore\n\n## Size", 1))
    export(student, [name], tmp_path / "out", allow_lossy=True, progress=QUIET)
    parcel = prepare(tmp_path / "out", "me/it")
    assert says in parcel.card
    assert '("me/it"' in parcel.card
    assert table in parcel.card
    assert "more" not in parcel.card
    assert name in ModelCard(parcel.card).data.tags


def test_an_export_of_an_imported_folder_has_a_card_too(folders: dict[str, Path], tmp_path: Path) -> None:
    student = copy_folder(folders["llama"], tmp_path / "student")
    (student / "README.md").unlink()
    export(student, ["dense"], tmp_path / "out", progress=QUIET)
    assert prepare(tmp_path / "out", "me/it").card.count("## ") == 1


def test_an_export_cannot_take_the_place_of_its_source(folders: dict[str, Path]) -> None:
    for place in (folders["llama"], folders["llama"].parent, folders["llama"] / "inside"):
        with pytest.raises(TernarizeError, match="inside each other"):
            export(folders["llama"], ["dense"], place, force=True, progress=QUIET)


def test_a_float_checkpoint_is_no_ternarize_folder(llama: Path) -> None:
    with pytest.raises(TernarizeError, match="not a ternarize folder"):
        export(llama, ["dense"], progress=QUIET)


# -- verify --------------------------------------------------------------------------------------------------------


@pytest.fixture
def student(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with two exports beside it."""
    folder = copy_folder(folders["llama"], tmp_path / "student")
    export(folder, ["metal", "dense"], progress=QUIET)
    return folder


def test_verify_finds_what_lies_beside_a_folder(student: Path, text: Path) -> None:
    found = verify(student, text=str(text), progress=QUIET)
    assert [(c.format, c.exact, c.ok, c.error) for c in found] == [("dense", True, True, ""), ("metal", True, True, "")]
    assert all(c.largest is not None and c.agreement is not None and c.agreement > 0.8 for c in found)
    (alone,) = verify(student.with_name("student-metal"), text=str(text), progress=QUIET)
    assert alone == found[1]


def test_verify_finds_a_changed_export(student: Path, text: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        key = "model.layers.1.mlp.down_proj.weight"
        tensors[key] = tensors[key].flip(0)

    edit_tensors(student.with_name("student-dense"), change)
    found = {c.format: c for c in verify(student, text=str(text), progress=QUIET)}
    assert not found["dense"].ok
    assert found["metal"].ok


def test_verify_refuses_another_student(student: Path, folders: dict[str, Path], text: Path) -> None:
    dense = student.with_name("student-dense")
    with pytest.raises(TernarizeError, match="another folder"):
        verify(dense, student=folders["qwen3"], text=str(text), progress=QUIET)
    student.rename(student.with_name("moved"))
    with pytest.raises(TernarizeError, match="--student"):
        verify(dense, text=str(text), progress=QUIET)
    (found,) = verify(dense, student=student.with_name("moved"), text=str(text), progress=QUIET)
    assert found.ok


def test_verify_says_which_reader_is_missing(student: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(student, ["gptq"], progress=QUIET)
    monkeypatch.setitem(__import__("sys").modules, "gptqmodel", None)
    found = {c.format: c for c in verify(student, text=str(text), progress=QUIET)}
    assert "pip install gptqmodel" in found["gptq"].error
    assert not found["gptq"].ok


def test_a_damaged_note_is_refused(student: Path) -> None:
    note = student.with_name("student-dense") / EXPORT_FILE
    fields = json.loads(note.read_text())
    note.write_text(json.dumps(fields | {"file": "../student/config.json"}))
    with pytest.raises(TernarizeError, match="not in its own folder"):
        Exported.read(note.parent)
    note.write_text("{}")
    with pytest.raises(TernarizeError, match="damaged"):
        Exported.read(note.parent)
