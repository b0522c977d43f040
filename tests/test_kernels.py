"""The native products against the reference: every path, every shape, every value that can come.

A path that this processor lacks is skipped with that reason; `tests/test_native.py` runs all of them under emulation.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import run_threads
from torch import Tensor
from typer.testing import CliRunner

import ternarize
from ternarize import TernaryLinear, TernaryTensor, cli, quantizer
from ternarize.errors import TernarizeError
from ternarize.kernels import cpu, reference
from ternarize.kernels.builtin import MOST_TOKENS
from ternarize.packing import (
    decode_levels,
    dequantize_table,
    encode_levels,
    pack_trits,
    quantize_table,
    split_scales,
)
from ternarize.runtime import TableEmbedding, TableHead, TiedTableHead
from ternarize.swap import run_natively
from ternarize.tensor import expand_groups, group_count

pytestmark = pytest.mark.skipif(not cpu.paths(), reason=f"no native library: {cpu.load_library()[1]}")

# rows, columns, group size: whole vectors, tails, short last groups, groups of several pieces, odd everything
SHAPES = (
    (64, 256, 64),
    (33, 100, 64),
    (1, 1, 1),
    (17, 131, 7),
    (5, 1009, 1009),
    (48, 129, 129),
    (16, 640, 320),
    (20, 300, 20),
    (40, 576, 64),
    (50, 2080, 32),
    (17, 1400, 77),  # a piece over the end of a strip (`pack.c`)
    (31, 257, 128),
    (3, 5, 4),
)
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 40, 300)
FEW = 8  # tokens that AMX is not for


LEVELS = ("scales", "scales and shifts", "coded scales")  # as a path lays them out


def random_weight(rows: int, columns: int, group_size: int, shift: bool, seed: int = 0) -> TernaryTensor:
    """Scales and shifts are fp16 values."""
    torch.manual_seed(seed)
    groups = group_count(columns, group_size)
    scale = (torch.rand(rows, groups) + 0.1).half().float()
    shifts = torch.randn(rows, groups).mul(0.3).half().float() if shift else None
    return TernaryTensor(torch.randint(-1, 2, (rows, columns), dtype=torch.int8), scale, shifts, group_size)


def random_with(levels: str, rows: int, columns: int, group_size: int, seed: int = 0) -> TernaryTensor:
    """One of `LEVELS`; coded scales are those that a path computes with, unrounded."""
    weight = random_weight(rows, columns, group_size, levels == "scales and shifts", seed)
    if levels != "coded scales":
        return weight
    coded = encode_levels(weight.scale, None, 4, 0)
    parts = split_scales(coded)
    assert parts is not None
    codes = torch.stack([parts.codes & 15, parts.codes >> 4], -1).flatten(-2)[:, : weight.scale.shape[1]].long()
    scale = parts.factors.double()[:, None] * parts.steps.double()[codes]
    return TernaryTensor(weight.trits, scale, None, group_size, coded)


def pack(path: cpu.Native, weight: TernaryTensor, bias: Tensor | None = None) -> cpu.PackedTernary:
    shift = None if weight.shift is None else weight.shift.half()
    coded = None if weight.levels is None else split_scales(weight.levels)
    levels = (weight.scale.half(), shift) if coded is None else coded
    return cpu.PackedTernary(path, pack_trits(weight.trits), levels, bias, weight.shape[1], weight.group_size)


def summands(x: Tensor, weight: TernaryTensor) -> Tensor:
    """Sum of the sizes of what is added up, [B, O], float64: scale and shift may cancel in the weight, not in a sum."""
    columns, group_size = weight.shape[1], weight.group_size
    size = weight.trits.abs() * expand_groups(weight.scale.double(), columns, group_size)
    if weight.shift is not None:
        size = size + expand_groups(weight.shift.double().abs(), columns, group_size)
    return x.double().abs() @ size.T


def rounding_bound(x: Tensor, weight: TernaryTensor) -> Tensor:
    """How far int8 activations may lead, [B, O]: half a step a column, and a step is a piece's largest over 127."""
    columns = weight.shape[1]
    size = min(weight.group_size, 128)
    if weight.group_size % size:  # pieces of a group are not all as long: their step is at most the group's
        size = weight.group_size
    steps = torch.nn.functional.pad(x.double().abs(), (0, -columns % size)).unflatten(-1, (-1, size)).amax(-1) / 127
    trits = expand_groups(weight.scale.double(), columns, weight.group_size) * weight.trits.abs()
    return expand_groups(steps, columns, size) / 2 @ trits.T


def int8_bound(path: cpu.Native, x: Tensor, weight: TernaryTensor) -> Tensor:
    """How far activations that need not be exact may lead, [B, O]: AMX has many tokens and weights in bfloat16."""
    bound = rounding_bound(x, weight) + 1e-6 * summands(x, weight)
    if path.name == "amx" and len(x) > FEW:
        bound = bound.maximum(1.01 * 2**-7 * (x.double().abs() @ weight.dequantize().double().abs().T))
    return bound


# -- one product -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_activations_match_the_reference(path: cpu.Native, shape: tuple[int, int, int], levels: str) -> None:
    weight = random_with(levels, *shape)
    bias = torch.randn(shape[0])
    packed = pack(path, weight, bias)
    for batch in BATCHES:
        x = torch.randn(batch, shape[1])
        want = x.double() @ weight.dequantize().double().T + bias
        assert ((packed.linear(x, exact=True) - want).abs() <= 1e-6 * (summands(x, weight) + bias.abs())).all()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_activations_stay_within_their_rounding(
    path: cpu.Native, shape: tuple[int, int, int], levels: str
) -> None:
    weight = random_with(levels, *shape)
    packed = pack(path, weight)
    for batch in BATCHES:
        x = torch.randn(batch, shape[1])
        want = x.double() @ weight.dequantize().double().T
        assert ((packed.linear(x, exact=False) - want).abs() <= int8_bound(path, x, weight)).all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_tables(path: cpu.Native, shape: tuple[int, int, int], exact: bool) -> None:
    rows, columns, group_size = shape
    torch.manual_seed(0)
    records = quantize_table(torch.randn(rows, columns), group_size)
    table, bias = dequantize_table(records, columns, group_size).double(), torch.randn(rows)
    for batch in BATCHES:
        x = torch.randn(batch, columns)
        size = x.double().abs() @ table.abs().T + bias.abs()
        allowed = 1e-6 * size
        if not exact:
            allowed = allowed + x.double().abs().amax(-1, keepdim=True) / 254 * table.abs().sum(-1)
        got = cpu.table_linear(x, records, bias, group_size, 8, exact)
        assert ((got - (x.double() @ table.T + bias)).abs() <= allowed).all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 64), (192, 64), (320, 128), (576, 576)])
def test_int6_tables(path: cpu.Native, columns: int, group_size: int, exact: bool) -> None:
    torch.manual_seed(0)
    records, bias = quantize_table(torch.randn(37, columns), group_size, 6), torch.randn(37)
    table = dequantize_table(records, columns, group_size, 6).double()
    for batch in BATCHES:
        x = torch.randn(batch, columns)
        allowed = 2e-6 * (x.double().abs() @ table.abs().T + bias.abs())
        if not exact:
            allowed = allowed + x.double().abs().amax(-1, keepdim=True) / 254 * table.abs().sum(-1)
        got = cpu.table_linear(x, records, bias, group_size, 6, exact)
        assert ((got - (x.double() @ table.T + bias)).abs() <= allowed).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    group_size=st.integers(1, 700),
    levels=st.sampled_from(LEVELS),
    batch=st.integers(1, 40),
    seed=st.integers(0, 1 << 30),
)
@example(rows=26, columns=1, group_size=1, levels=LEVELS[1], batch=1, seed=172)  # a scale and a shift that cancel
def test_any_shape(rows: int, columns: int, group_size: int, levels: str, batch: int, seed: int) -> None:
    weight = random_with(levels, rows, columns, min(group_size, columns), seed)
    x = torch.randn(batch, columns)
    native = cpu.native()
    assert native is not None
    packed = pack(native, weight)
    want = x.double() @ weight.dequantize().double().T
    size = summands(x, weight)
    assert ((packed.linear(x, exact=True) - want).abs() <= 1e-6 * size).all()
    assert ((packed.linear(x, exact=False) - want).abs() <= int8_bound(native, x, weight)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sixteen_bit_activations_are_read_exactly_and_rounded_once(path: cpu.Native, dtype: torch.dtype) -> None:
    weight = random_weight(33, 200, 64, shift=True)
    packed = pack(path, weight)
    x = torch.randn(2, 3, 200).to(dtype)
    got = packed.linear(x, exact=True)
    assert got.dtype == dtype
    assert got.shape == (2, 3, 33)
    torch.testing.assert_close(got, packed.linear(x.float(), exact=True).to(dtype), rtol=0, atol=0)


def test_sixteen_bit_floats_of_every_kind(path: cpu.Native) -> None:
    one = pack(path, TernaryTensor(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1), None, 1))
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)[:, None]
        got = one.linear(values, exact=True)
        assert torch.equal(got.isnan(), values.isnan())
        assert torch.equal(got[~got.isnan()], values[~values.isnan()])
    fine = torch.linspace(-70000, 70000, 9973)[:, None] * torch.logspace(-12, 0, 9973)[:, None]
    wide = pack(path, TernaryTensor(torch.ones(1, 2, dtype=torch.int8), torch.ones(1, 1), None, 2))
    pairs = torch.cat([fine.half(), (fine / 1000).half()], -1)
    sums = (pairs[:, :1].float() + pairs[:, 1:].float()).half()
    assert torch.equal(wide.linear(pairs, exact=True)[pairs.isfinite().all(-1)], sums[pairs.isfinite().all(-1)])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [True, False])
def test_coded_levels_have_the_values_of_the_file(path: cpu.Native, bits: int, shift: bool) -> None:
    plain = random_weight(24, 200, 64, shift)
    levels = encode_levels(plain.scale, plain.shift, bits, bits if shift else 0)
    scale, shifts = decode_levels(levels, plain.scale.shape[1])
    linear = TernaryLinear.from_tensor(TernaryTensor(plain.trits, scale, shifts, 64, levels))
    x = torch.randn(5, 200)
    want = linear(x)
    weight = linear.to_tensor()
    run_natively(linear, "float")
    torch.testing.assert_close(linear(x), want, rtol=1e-5, atol=1e-5)
    run_natively(linear, "int8")
    allowed = int8_bound(path, x, weight)
    looked_up = bits == 4 and not shift  # then scales are not rounded to fp16, their 16 steps are
    if looked_up:
        allowed = allowed + 2**-11 * summands(x, weight)
    assert ((linear(x) - want).abs() <= allowed).all()
    packed = linear.pack()
    assert isinstance(packed, cpu.PackedTernary)
    assert (packed.levels == cpu.CODED_SCALES) == looked_up


# -- values at the edge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [64, 128, 1000, 4096])
def test_the_largest_sums_do_not_overflow(path: cpu.Native, columns: int) -> None:
    ones = torch.ones(16, columns, dtype=torch.int8)
    for sign in (1, -1):
        weight = TernaryTensor(sign * ones, torch.ones(16, 1), None, columns)
        for x in (torch.full((3, columns), 127.0), torch.full((3, columns), -127.0)):
            assert torch.equal(pack(path, weight).linear(x, exact=False), sign * x.sum(-1, keepdim=True).expand(3, 16))
    if columns % 64 == 0:
        six = quantize_table(torch.full((16, columns), -31.0), columns, 6)
        x = torch.full((3, columns), -127.0)
        assert torch.equal(cpu.table_linear(x, six, None, columns, 6, False), torch.full((3, 16), 31.0 * 127 * columns))
    table = quantize_table(torch.full((16, columns), -127.0), columns)
    x = torch.full((3, columns), -127.0)
    assert torch.equal(cpu.table_linear(x, table, None, columns, 8, False), torch.full((3, 16), 127.0 * 127 * columns))


@pytest.mark.parametrize("exact", [True, False])
def test_extreme_scales_and_activations(path: cpu.Native, exact: bool) -> None:
    trits = torch.randint(-1, 2, (16, 64), dtype=torch.int8)
    for scale in (65504.0, 6.1e-5):
        weight = TernaryTensor(trits, torch.full((16, 1), scale).half().float(), None, 64)
        for size in (1e30, 1.0, 1e-30):
            for batch in (2, 20):
                x = torch.randn(batch, 64) * size
                want = x.double() @ weight.dequantize().double().T
                slack = 1e-6 * summands(x, weight) if exact else int8_bound(path, x, weight)
                assert ((pack(path, weight).linear(x, exact) - want).abs() <= slack).all()


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_in_nothing_out(path: cpu.Native, exact: bool) -> None:
    packed = pack(path, random_weight(20, 100, 64, shift=True))
    assert torch.equal(packed.linear(torch.zeros(2, 100), exact), torch.zeros(2, 20))
    assert packed.linear(torch.full((1, 100), 1e-42), exact).abs().max() < 1e-38
    assert packed.linear(torch.zeros(0, 100), exact).shape == (0, 20)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_with_its_token(path: cpu.Native, exact: bool, bad: float) -> None:
    weight = random_weight(20, 200, 64, shift=True)
    packed, records = pack(path, weight), quantize_table(weight.dequantize(), 64)
    x = torch.randn(20, 200)
    for count in (5, 20):
        with_bad = x[:count].clone()
        with_bad[3, 70] = bad
        for product in (lambda x: packed.linear(x, exact), lambda x: cpu.table_linear(x, records, None, 64, 8, exact)):
            before, got = product(x[:count]), product(with_bad)
            assert not got[3].isfinite().any()
            assert torch.equal(got[:3], before[:3])
            assert torch.equal(got[4:], before[4:])


@pytest.mark.parametrize("exact", [True, False])
def test_a_token_does_not_depend_on_its_batch(path: cpu.Native, exact: bool) -> None:
    """Nor on its place, but for where AMX has the many and not the few."""
    weight = random_weight(20, 200, 64, shift=True)
    packed, records = pack(path, weight), quantize_table(weight.dequantize(), 64)
    x = torch.randn(300, 200)
    for product in (lambda x: packed.linear(x, exact), lambda x: cpu.table_linear(x, records, None, 64, 8, exact)):
        whole = product(x)
        alone = 9 if path.name == "amx" else 1
        assert all(torch.equal(product(x[[i] * alone])[0], whole[i]) for i in (0, 7, 8, 255, 256, 299))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_tokens_are_what_each_is_alone(path: cpu.Native, shape: tuple[int, int, int], levels: str) -> None:
    packed = pack(path, random_with(levels, *shape))
    x = torch.randn(40, shape[1])
    whole = packed.linear(x, exact=False)
    if path.name == "amx":  # 32 in bfloat16, in tiles of 16; the last 8 in int8
        assert torch.equal(whole[:32], torch.cat([packed.linear(part, exact=False) for part in x[:32].split(16)]))
        x, whole = x[32:], whole[32:]
    assert torch.equal(whole, torch.cat([packed.linear(row[None], exact=False) for row in x]))


def test_torchs_own_products_are_not_disturbed(path: cpu.Native) -> None:
    """Both may use AMX, whose tiles belong to a thread."""
    packed, x = pack(path, random_weight(64, 256, 64, shift=True)), torch.randn(64, 256)
    half = torch.randn(256, 256).bfloat16()
    want = x.bfloat16() @ half, packed.linear(x, exact=False)
    for _ in range(20):
        assert torch.equal(x.bfloat16() @ half, want[0])
        assert torch.equal(packed.linear(x, exact=False), want[1])


def test_all_paths_round_activations_alike() -> None:
    weight, x = random_weight(40, 576, 64, shift=True), torch.randn(FEW, 576)
    usable = [cpu.select(name) for name, supported in cpu.paths().items() if supported]
    results = [pack(native, weight).linear(x, exact=False) for native in usable if native is not None]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-4)


# -- threads and processes ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[3, 40], ids=["on our threads", "on torch's threads"])
def large(request: pytest.FixtureRequest) -> Iterator[tuple[cpu.PackedTernary, Tensor, Tensor]]:
    """A product that is worth several threads, and its result from one."""
    native = cpu.native()
    assert native is not None
    packed, x = pack(native, random_weight(1000, 1024, 64, shift=True)), torch.randn(request.param, 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield packed, x, packed.linear(x, exact=False)
    torch.set_num_threads(before)


def test_the_number_of_threads_does_not_change_the_result(large: tuple[cpu.PackedTernary, Tensor, Tensor]) -> None:
    packed, x, want = large
    for threads in (2, 3, 8, 1):
        torch.set_num_threads(threads)
        assert all(torch.equal(packed.linear(x, exact=False), want) for _ in range(20))


def test_several_python_threads_at_once(large: tuple[cpu.PackedTernary, Tensor, Tensor]) -> None:
    packed, x, want = large
    torch.set_num_threads(3)
    wrong: list[int] = []

    def work(number: int) -> None:
        if not all(torch.equal(packed.linear(x, exact=False), want) for _ in range(40)):
            wrong.append(number)

    run_threads(4, work)
    assert not wrong


FORK = """
import os, signal, sys, torch
from ternarize.kernels import cpu
from ternarize.packing import pack_trits, quantize_table
torch.manual_seed(0)
torch.set_num_threads(1)
records, x = quantize_table(torch.randn(1024, 1024), 64), torch.randn(int(sys.argv[1]), 1024)
trits, scale = pack_trits(torch.randint(-1, 2, (1024, 1024), dtype=torch.int8)), torch.rand(1024, 16).half()
packed = cpu.PackedTernary(cpu.native(), trits, (scale, None), None, 1024, 64)
products = lambda: (cpu.table_linear(x, records, None, 64, 8, False).numpy(), packed.linear(x, False).numpy())
tasks = lambda: len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
want, alone = products(), tasks()
same = lambda: all((a == b).all() for a, b in zip(products(), want))  # torch.equal may be stuck: OpenMP after a fork
assert tasks() == alone
torch.set_num_threads(2)
assert same()
assert tasks() <= alone + 1, (alone, tasks())
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if all(same() for _ in range(20)) else 1)
    assert same()
    assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("tokens", [4, 40])
def test_a_forked_child_computes_and_threads_are_as_many_as_torch_has(tokens: int) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, str(tokens)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


TEAM = """
import os, torch
from ternarize.kernels import cpu
from ternarize.packing import quantize_table
records, x, much = quantize_table(torch.randn(1024, 1024), 64), torch.randn(40, 1024), torch.ones(1 << 22)
torch.set_num_threads(2)
much + 1  # torch has its threads from here on
before = len(os.listdir("/proc/self/task"))
cpu.table_linear(x, records, None, 64, 8, False)
print(len(os.listdir("/proc/self/task")) - before)
cpu.table_linear(x[:4], records, None, 64, 8, False)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(cpu._openmp() is None, reason="torch has no OpenMP with GNU's interface here")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="nothing here counts threads")
def test_many_tokens_are_computed_by_torchs_threads_and_few_by_ours() -> None:
    done = subprocess.run([sys.executable, "-c", TEAM], capture_output=True, text=True, timeout=100)
    assert done.stdout == "0\n1\n", done.stderr


# -- modules -----------------------------------------------------------------------------------------------------------


def native_linear(activations: str = "float") -> TernaryLinear:
    linear = TernaryLinear.from_tensor(random_weight(24, 200, 64, shift=True), torch.randn(24))
    run_natively(linear, activations)
    return linear


def reference_of(linear: TernaryLinear, x: Tensor) -> Tensor:
    return reference.ternary_linear(x, linear.weight, *linear.read_levels(), linear.bias, linear.group_size)


def test_a_linear_of_a_conversion_stays_on_the_reference() -> None:
    linear = TernaryLinear.from_tensor(random_weight(24, 200, 64, shift=True))
    assert linear.activations is None
    x = torch.randn(3, 200)
    assert torch.equal(linear(x), reference_of(linear, x))


def test_changed_tensors_are_laid_out_anew() -> None:
    linear, x = native_linear(), torch.randn(3, 200)
    first = linear(x)
    assert linear.pack() is linear.pack()
    other = TernaryLinear.from_tensor(random_weight(24, 200, 64, shift=True, seed=1), torch.randn(24))
    linear.load_state_dict(other.state_dict())
    assert not torch.allclose(linear(x), first)
    torch.testing.assert_close(linear(x), reference_of(linear, x), rtol=1e-5, atol=1e-5)
    assert linear.bias is not None
    with torch.no_grad():
        linear.bias += 1
    torch.testing.assert_close(linear(x), reference_of(linear, x), rtol=1e-5, atol=1e-5)


def test_copies_pickles_and_states_hold_the_files_tensors_only() -> None:
    linear, x = native_linear("int8"), torch.randn(3, 200)
    want = linear(x)
    assert set(linear.state_dict()) == {"weight", "scale", "shift", "bias"}
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)), linear.to(torch.float64).float()):
        assert torch.equal(twin(x), want)


def test_gradients_autocast_and_other_dtypes_go_to_the_reference() -> None:
    linear = native_linear("int8")
    x = torch.randn(3, 200, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.dequantize().sum(0).expand(3, 200), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.equal(linear(x), reference_of(linear, x))
        assert torch.equal(linear(x.double()), reference_of(linear, x.double()))
        with torch.autocast("cpu"):
            assert linear(x).dtype == torch.bfloat16
    meta = linear.to("meta")
    assert meta(x.detach().to("meta")).shape == (3, 24)


def test_strided_and_empty_activations() -> None:
    linear = native_linear()
    x = torch.randn(200, 6).t()[::2]
    torch.testing.assert_close(linear(x), reference_of(linear, x), rtol=1e-5, atol=1e-5)
    assert linear(torch.zeros(2, 0, 200)).shape == (2, 0, 24)


def test_inference_mode_and_weights_born_in_it() -> None:
    with torch.inference_mode():
        linear, x = native_linear(), torch.randn(3, 200)
        torch.testing.assert_close(linear(x), reference_of(linear, x), rtol=1e-5, atol=1e-5)


def test_heads_run_natively_with_their_bias() -> None:
    torch.manual_seed(0)
    table, bias, x = torch.randn(50, 100), torch.nn.Parameter(torch.randn(50), requires_grad=False), torch.randn(2, 100)
    own, tied = TableHead.from_weight(table, 64, bias=bias), TiedTableHead(TableEmbedding.from_weight(table, 64), bias)
    for head in (own, tied):
        want = head(x)
        run_natively(head, "float")
        torch.testing.assert_close(head(x), want, rtol=1e-5, atol=1e-5)
        run_natively(head, "int8")
        assert 0 < (head(x) - want).abs().max() < 0.02 * want.abs().max()


def test_compiled_models_call_the_operators() -> None:
    linear, head = native_linear("int8"), TableHead.from_weight(torch.randn(30, 24), 8)
    run_natively(head, "int8")
    model, x = torch.nn.Sequential(linear, head), torch.randn(3, 200)
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    packed = linear.pack()
    assert packed is not None
    arguments = (packed.packed, packed.bias, packed.path.index, 24, 64, True, False)
    torch.library.opcheck(torch.ops.ternarize.ternary_linear, (x, *arguments))
    torch.library.opcheck(
        torch.ops.ternarize.table_linear, (torch.randn(2, 24), head.weight, None, packed.path.index, 8, 8, True)
    )


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_the_environment_chooses_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    best = [name for name, supported in cpu.paths().items() if supported][-1]
    for wanted, name in (("scalar", "scalar"), ("torch", None), ("", best)):
        monkeypatch.setenv(cpu.CPU_VARIABLE, wanted)
        monkeypatch.setattr(cpu, "_chosen", [])
        native = cpu.native()
        assert (native.name if native else None) == name


def test_a_path_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TernarizeError, match=r"TERNARIZE_CPU=avx3: there is no such path.*Choose scalar, .*torch"):
        cpu.select("avx3")
    monkeypatch.setattr(cpu, "paths", lambda: {"scalar": True, "avx2": False})
    with pytest.raises(TernarizeError, match=r"TERNARIZE_CPU=avx2: this processor cannot run it. Choose scalar, torch"):
        cpu.select("avx2")


def test_unknown_activations_are_refused(ternary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TernarizeError, match="activations 'int4' is not one of int8, float"):
        ternarize.load(ternary, activations="int4")
    monkeypatch.setenv(cpu.ACTIVATIONS_VARIABLE, "half")
    with pytest.raises(TernarizeError, match="'half' is not one of int8, float"):
        cpu.default_activations()


@torch.no_grad()
def test_a_loaded_model_runs_natively(ternary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = {}
    ids = torch.arange(5, 25)[None]
    for kind in ("int8", "float"):
        model, _ = ternarize.load(ternary, activations=kind)
        linears = [module for module in model.modules() if isinstance(module, TernaryLinear)]
        assert {module.activations for module in linears} == {kind}
        with torch.enable_grad():  # nothing of a loaded model learns, so nobody has to say no_grad
            logits[kind] = model(ids).logits
        assert all(module._packed is not None for module in linears)
    monkeypatch.setattr(cpu, "_chosen", [None])
    want = ternarize.load(ternary)[0](ids).logits
    torch.testing.assert_close(logits["float"], want, rtol=1e-4, atol=1e-4)
    size = float(want.abs().max())
    assert 1e-6 * size < float((logits["int8"] - want).abs().max()) < 0.1 * size


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after an installation without a compiler."""
    monkeypatch.setattr(cpu, "find_library", lambda: None)
    monkeypatch.setattr(cpu, "_chosen", [])
    cpu.load_library.cache_clear()
    quantizer._say_what_is_missing.cache_clear()
    yield
    monkeypatch.undo()
    cpu.load_library.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_the_library_the_reference_runs_and_one_line_says_so(
    ternary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        model, _ = ternarize.load(ternary)
    assert cpu.native() is None
    with torch.no_grad():
        assert model(torch.arange(5, 9)[None]).logits.isfinite().all()
    lines = [record.getMessage() for record in caplog.records if record.name == "ternarize"]
    assert len(lines) == 1
    assert "libternarize.so was not built" in lines[0]
    assert "ten times slower" in lines[0]


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((48, 192, 64), True),
        ((16, 256, 256), True),
        ((48, 192, 48), False),
        ((50, 192, 64), False),
        ((48, 200, 64), False),
    ],
)
def test_without_the_library_torch_multiplies_four_bit_codes(
    shape: tuple[int, int, int], fits: bool, shift: bool
) -> None:
    weight, bias = random_weight(*shape, shift), torch.randn(shape[0])
    linear = TernaryLinear.from_tensor(weight, bias)
    run_natively(linear, "int8")
    size = weight.dequantize().abs()
    for batch in (1, 3, MOST_TOKENS, MOST_TOKENS + 1):
        x = torch.randn(batch, shape[1])
        want = torch.nn.functional.linear(x, weight.dequantize(), bias)
        rounding = 2**-7 if fits and batch <= MOST_TOKENS else 1e-6  # x, levels and result in bfloat16
        assert ((linear(x) - want).abs() <= rounding * (x.abs() @ size.T + bias.abs())).all()
        assert (linear._packed is not None) == fits
    run_natively(linear, "float")
    torch.testing.assert_close(linear(x), want)
    assert copy.deepcopy(linear)._packed is None
    assert linear(torch.randn(2, 3, shape[1]).bfloat16()).shape == (2, 3, shape[0])


@pytest.mark.usefixtures("no_library")
def test_without_the_library_a_path_is_refused_and_doctor_says_what_to_do() -> None:
    with pytest.raises(TernarizeError, match=r"TERNARIZE_CPU=scalar: libternarize.so was not built.*C compiler"):
        cpu.select("scalar")
    said = CliRunner().invoke(cli.app, ["doctor"])
    assert said.exit_code == 0
    assert "none: libternarize.so was not built" in said.output
    assert "path in use   torch" in said.output
    assert "install ternarize again" in said.output


def test_doctor_says_what_was_found_and_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with cpu.using("scalar"):
        monkeypatch.setenv(cpu.CPU_VARIABLE, "scalar")
        said = CliRunner().invoke(cli.app, ["doctor"])
    assert said.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in said.output.splitlines() if line and not line.startswith("path in"))
    assert lines["torch"] == torch.__version__
    assert lines["library"].endswith(cpu.LIBRARY)
    assert "scalar" in lines["paths"]
    assert lines["activations"] == "float, as TERNARIZE_ACTIVATIONS says"
    assert lines["threads"] == str(torch.get_num_threads())
    assert "path in use   scalar, as TERNARIZE_CPU says" in said.output


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ABI", -1)
    cpu.load_library.cache_clear()
    try:
        library, reason = cpu.load_library()
        assert library is None
        assert "belongs to another version" in reason
    finally:
        monkeypatch.undo()
        cpu.load_library.cache_clear()
