"""Native products on a CPU: the shared library of `csrc/`, its paths, and weights laid out for one of them.

A path is an instruction set: the fastest that the processor has is chosen when the library is first needed.

    TERNARIZE_CPU=NAME           another path, by name; "torch" is none of them, the reference
    TERNARIZE_ACTIVATIONS=NAME   "int8" (the default) or "float"

Activations in int8 have one scale per token and at most 128 columns of a group, and beside them scales of 4 bits stay
codes, the file's to 2^-11 (`packing.split_scales`); with float activations all is exact up to float32 rounding, and
slower. Shapes: B any leading sizes, I in features, O out features, G groups in a row, S group size.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import TernarizeError
from ternarize.kernels.pages import allocate
from ternarize.packing import CodedScales, table_row_bytes

CPU_VARIABLE = "TERNARIZE_CPU"
ACTIVATIONS_VARIABLE = "TERNARIZE_ACTIVATIONS"
ACTIVATIONS = ("int8", "float")
REFERENCE = "torch"  # as a path's name: none, the reference computes
LIBRARY = "libternarize.so"
ABI = 6
SCALES, SCALES_AND_SHIFTS, CODED_SCALES = range(3)  # `enum tz_levels`
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_pointer, _int, _int64, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "tz_abi": (_int, []),
    "tz_path_name": (ctypes.c_char_p, [_int]),
    "tz_path_supported": (_int, [_int]),
    "tz_cpu_features": (ctypes.c_char_p, []),
    "tz_set_team": (None, [_pointer]),
    "tz_ternary_shape": (_pointer, [_int, _int64, _int64, _int64, _int]),
    "tz_table_shape": (_pointer, [_int, _int64, _int64, _int64, _int]),
    "tz_packed_bytes": (_int64, [_pointer]),
    "tz_pack_ternary": (None, [_pointer, _pointer, _pointer, _pointer, _pointer, _int]),
    "tz_pack_coded": (None, [_pointer, _pointer, _pointer, _pointer, _pointer, _pointer, _int]),
    "tz_ternary_linear": (_int, [_pointer, _pointer, _pointer, _pointer, _pointer, _int64, _int, _int, _int]),
    "tz_table_linear": (_int, [_pointer, _pointer, _pointer, _pointer, _pointer, _int64, _int, _int, _int]),
    "tz_make_decoder": (_pointer, [_int, _int64, _int64, _int64, _int64, _int64, _int64, _int, _int]),
    "tz_free_decoder": (None, [_pointer]),
    "tz_set_linear": (None, [_pointer, _int64, _int, _pointer, _pointer, _pointer]),
    "tz_set_norm": (None, [_pointer, _int64, _int, _pointer, _float]),
    "tz_set_attention": (None, [_pointer, _int64, _float, _int64, _int, _int, _int64]),
    "tz_prompt_floats": (_int64, [_pointer, _int64]),
    "tz_enter_attention": (_int, [_pointer, _int64, *[_pointer] * 6, _int64, _int]),
    "tz_leave_attention": (_int, [_pointer, _int64, *[_pointer] * 3, _int64, _int]),
    "tz_step": (_int, [_pointer, _pointer, _pointer, _pointer, _pointer, _int]),
}


@dataclass(frozen=True)
class Native:
    """The library, loaded, and one of its paths.

    Args:
        library: with the signatures of `csrc/ternarize.h`.
        file: where it lies.
        index, name: of the path.
    """

    library: ctypes.CDLL
    file: Path
    index: int
    name: str


# -- the library and its paths -----------------------------------------------------------------------------------------


def find_library() -> Path | None:
    """Where the shared library lies; None where it was not built.

    An editable install keeps the modules here and puts what was built among the installed files.
    """
    beside = Path(__file__).with_name(LIBRARY)
    if beside.is_file():
        return beside
    try:
        installed = importlib.metadata.files("ternarize") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in installed if file.name == LIBRARY)
    return next((file for file in found if file.is_file()), None)


@cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """The library and where it lies, or None and why it cannot be used."""
    file = find_library()
    if file is None:
        return None, f"{LIBRARY} was not built (no C compiler when ternarize was installed?)"
    try:
        library = ctypes.CDLL(str(file))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{file} cannot be loaded: {error}"
    if library.tz_abi() != ABI:
        return None, f"{file} belongs to another version of ternarize (interface {library.tz_abi()}, not {ABI})"
    library.tz_set_team(_openmp())
    return library, str(file)


def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that torch uses; None where it has another kind or none."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def paths() -> dict[str, bool]:
    """The paths of the library, best last, and whether this processor can run each; empty without a library."""
    library, _ = load_library()
    found: dict[str, bool] = {}
    while library is not None and (name := library.tz_path_name(len(found))) is not None:
        found[name.decode()] = bool(library.tz_path_supported(len(found)))
    return found


def features() -> list[str]:
    """What of the processor a path could use."""
    library, _ = load_library()
    return [] if library is None else library.tz_cpu_features().decode().split()


def select(name: str) -> Native | None:
    """A path by its name; None for "torch".

    Raises:
        TernarizeError: no such path, or the library or the processor lacks it.
    """
    if name == REFERENCE:
        return None
    library, where = load_library()
    if library is None:
        raise TernarizeError(f"{CPU_VARIABLE}={name}: {where}. Install a C compiler and ternarize again, or unset it.")
    found = paths()
    usable = [path for path, supported in found.items() if supported]
    if name not in usable:
        reason = "this processor cannot run it" if name in found else "there is no such path in this build"
        raise TernarizeError(f"{CPU_VARIABLE}={name}: {reason}. Choose {', '.join([*usable, REFERENCE])}, or unset it.")
    return Native(library, Path(where), list(found).index(name), name)


_chosen: list[Native | None] = []  # of this process, after the first look


def native() -> Native | None:
    """The path in use; None where the reference computes.

    Raises:
        TernarizeError: TERNARIZE_CPU names a path that cannot be used.
    """
    if not _chosen:
        wanted = os.environ.get(CPU_VARIABLE)
        usable = [path for path, supported in paths().items() if supported]
        _chosen.append(select(wanted or (usable[-1] if usable else REFERENCE)))
    return _chosen[0]


@contextmanager
def using(name: str) -> Iterator[Native | None]:
    """Another path for the time being, in this process.

    Raises:
        TernarizeError: as in `select`.
    """
    before = native()
    _chosen[0] = select(name)
    try:
        yield _chosen[0]
    finally:
        _chosen[0] = before


def missing() -> str | None:
    """Why products do not run natively though nobody asked for that; None where all is well."""
    library, reason = load_library()
    return reason if library is None and os.environ.get(CPU_VARIABLE) != REFERENCE else None


def default_activations() -> str:
    """What TERNARIZE_ACTIVATIONS says, or "int8"."""
    return check_activations(os.environ.get(ACTIVATIONS_VARIABLE) or ACTIVATIONS[0])


def check_activations(name: str) -> str:
    """Refuse a name that is none.

    Raises:
        TernarizeError: naming those that there are.
    """
    if name not in ACTIVATIONS:
        raise TernarizeError(f"activations {name!r} is not one of {', '.join(ACTIVATIONS)}.")
    return name


# -- products ----------------------------------------------------------------------------------------------------------


def usable(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a native product can take these activations: on a CPU, a plain tensor, and no gradient is wanted."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in DTYPES:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p is not None and p.requires_grad for p in parameters)):
        return False
    return not torch.is_autocast_enabled("cpu")


@cache
def _shape(function: str, path: int, rows: int, columns: int, group_size: int, kind: int) -> int:
    """A `tz_shape`, kept for the life of the process: a model has few.

    Args:
        function, kind: "tz_ternary_shape" and the levels, or "tz_table_shape" and the bits.
    """
    library, _ = load_library()
    assert library is not None
    shape = getattr(library, function)(path, rows, columns, group_size, kind)
    if shape is None:
        raise MemoryError(f"no memory to describe a weight of {rows} x {columns}")
    return int(shape)


def _product(
    function: Callable[..., int], shape: int, weights: Tensor, bias: Tensor | None, x: Tensor, rows: int, exact: bool
) -> Tensor:
    x = x.contiguous()
    columns = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], rows)
    failed = function(
        shape,
        weights.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        x.numel() // columns,
        DTYPES[x.dtype],
        exact,
        torch.get_num_threads(),
    )
    require_memory(failed, x.numel() // columns)
    return out


def require_memory(failed: int, tokens: int) -> None:
    """Of what a product returned.

    Raises:
        MemoryError: there is none for the activations.
    """
    if failed:
        raise MemoryError(f"no memory for the activations of {tokens} tokens")


class PackedTernary:
    """A ternary weight laid out for one path; `csrc/layout.h` draws it.

    Args:
        path: which.
        trits: uint8 [O, ceil(I / 5)], as in the file.
        levels: scale and shift, fp16 [O, G] each, shift None where the grid has none; or scales in 4 bits.
        bias: float [O] or None.
        in_features, group_size: I and S.
    """

    def __init__(
        self,
        path: Native,
        trits: Tensor,
        levels: tuple[Tensor, Tensor | None] | CodedScales,
        bias: Tensor | None,
        in_features: int,
        group_size: int,
    ) -> None:
        self.path, self.rows, self.group_size = path, trits.shape[0], group_size
        self.bias = None if bias is None else bias.detach().float().contiguous()
        parts: tuple[Tensor | None, ...]
        if isinstance(levels, CodedScales):
            self.levels, parts, pack = CODED_SCALES, (levels.codes, levels.factors, levels.steps), "tz_pack_coded"
        else:
            self.levels, parts, pack = SCALES if levels[1] is None else SCALES_AND_SHIFTS, levels, "tz_pack_ternary"
        self.shape = _shape("tz_ternary_shape", path.index, self.rows, in_features, group_size, self.levels)
        self.packed = allocate(path.library.tz_packed_bytes(self.shape))
        self._product = path.library.tz_ternary_linear
        tensors = [None if part is None else part.contiguous() for part in (trits, *parts)]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        getattr(path.library, pack)(self.shape, *pointers, self.packed.data_ptr(), torch.get_num_threads())

    def takes(self, x: Tensor, exact: bool) -> bool:
        """Whether the product with x [B, I] belongs here: any does."""
        return True

    def linear(self, x: Tensor, exact: bool) -> Tensor:
        """x [B, I] -> [B, O] in x's dtype; exact is with float activations, else int8.

        Raises:
            MemoryError: there is none for the activations.
        """
        if torch.compiler.is_compiling():
            return _ternary_operator(
                x, self.packed, self.bias, self.path.index, self.rows, self.group_size, self.levels, exact
            )
        return _product(self._product, self.shape, self.packed, self.bias, x, self.rows, exact)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """Copies and pickles hold None instead: it is made again from the file's tensors, for that machine's path."""
        return type(None), ()


def table_linear(x: Tensor, records: Tensor, bias: Tensor | None, group_size: int, bits: int, exact: bool) -> Tensor:
    """x [B, H] times a table's records, uint8 [V, R], read where they lie; [B, V] in x's dtype.

    Raises:
        MemoryError: there is none for the activations.
    """
    path = native()
    assert path is not None
    if torch.compiler.is_compiling():
        return _table_operator(x, records, bias, path.index, group_size, bits, exact)
    return _table_product(x, records, bias, path.index, group_size, bits, exact)


def _table_product(
    x: Tensor, records: Tensor, bias: Tensor | None, path: int, group_size: int, bits: int, exact: bool
) -> Tensor:
    library, _ = load_library()
    assert library is not None
    rows, columns = records.shape[0], x.shape[-1]
    assert records.shape[1] == table_row_bytes(columns, group_size, bits)
    shape = _shape("tz_table_shape", path, rows, columns, group_size, bits)
    bias = None if bias is None else bias.detach().float()
    return _product(library.tz_table_linear, shape, records.contiguous(), bias, x, rows, exact)


# torch.compile cannot look into a call of ctypes, and calls these; outside of it the direct call is cheaper.


@torch.library.custom_op("ternarize::ternary_linear", mutates_args=())
def _ternary_operator(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    path: int,
    rows: int,
    group_size: int,
    levels: int,
    exact: bool,
) -> Tensor:
    library, _ = load_library()
    assert library is not None
    shape = _shape("tz_ternary_shape", path, rows, x.shape[-1], group_size, levels)
    return _product(library.tz_ternary_linear, shape, packed, bias, x, rows, exact)


@_ternary_operator.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, path: int, rows: int, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("ternarize::table_linear", mutates_args=())
def _table_operator(
    x: Tensor, records: Tensor, bias: Tensor | None, path: int, group_size: int, bits: int, exact: bool
) -> Tensor:
    return _table_product(x, records, bias, path, group_size, bits, exact)


@_table_operator.register_fake
def _(x: Tensor, records: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], records.shape[0])
