"""The file contract: what a ternarize folder holds, format versions 1, 2 and 3.

A folder is an ordinary Hugging Face checkpoint (config.json, tokenizer files, model.safetensors, or shards with
model.safetensors.index.json) in which some modules hold other tensors than usual. Names are those of the modules in
transformers; the experts of a mixture are written one by one, `...experts.{e}.gate_up_proj` and `.down_proj`.

A ternary linear, O x I, groups of S consecutive input columns, G = ceil(I / S), the last group may be short:

    NAME.weight   uint8  [O, ceil(I / 5)]   trits, five to a byte along the row (see `packing`)
    NAME.scale    fp16   [O, G]             positive
    NAME.shift    fp16   [O, G]             absent where config.json says "shift": false
    NAME.bias     float  [O]                where the linear had one

or, with scales and shifts in 8 or 4 bits (version 2), instead of NAME.scale and NAME.shift:

    NAME.levels   uint8  [O, 1 + ceil(G (scale_bits + shift_bits) / 8)]     coded (see `packing`)
    NAME.limits   fp32   [4]                                                what the codes are relative to

    weight[o, i] = scale[o, i // S] * trit[o, i] + shift[o, i // S]

An int8 or int6 embedding or head, V x H, groups of S8 columns:

    NAME.weight   uint8  [V, H + 2 ceil(H / S8)]          int8: codes and fp16 scales (see `packing`)
                         [V, 3 H / 4 + 2 ceil(H / S8)]    int6

Everything else stands as in the source, in the source's dtype. A mixture that was unfused also carries, under the
fused parameters' names (`...experts.gate_up_proj`), empty uint8 tensors that mean nothing: see "Failing loudly".

config.json, "quantization_config":

    quant_method     "ternarize"
    format_version   1, or 2 or 3 where something is used that the ones before it do not have
    packing          "base3"
    blocks           path of the list of decoder layers; every linear in it is ternary unless listed in "kept"
    group_size       S, or null for one group a row
    shift            whether there is one
    kept             linears inside the blocks that stayed float
    int8             {module name: multiplier}: the embeddings and heads that are int8; the multiplier is what the
                     module's own forward puts on a row (Gemma's sqrt(H)), 1.0 for most
    int8_group_size  S8
    scale_bits       16, 8 or 4 (version 2; 16 in version 1)
    shift_bits       16, 8 or 4 (version 2; 16 in version 1)
    group_sizes      {linear: S} of those that have another S than group_size (version 2; none in version 1)
    int6             as int8 (version 3; none before)

Failing loudly. transformers without this package skips an unknown quant_method with a warning and would go on with
random weights. Two things forbid that: every packed tensor bears the name of the float weight but another shape, which
the stock loader refuses; and config.json's "transformers_weights" names a file that does not exist and whose name says
what to install, which the stock loader reports at once. This package's loader ignores that entry.

A reader refuses versions and packings that it does not know. Old versions stay readable.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ternarize.errors import FormatError

QUANT_METHOD = "ternarize"
FORMAT_VERSIONS = (1, 2, 3)
PACKING = "base3"
TRIPWIRE = "first-run-pip-install-ternarize-and-import-ternarize.safetensors"


class Table(NamedTuple):
    """How an embedding or head is stored: bits of a code, and what its module's own forward multiplies a row by."""

    bits: int
    multiplier: float = 1.0


@dataclass(frozen=True)
class Layout:
    """What config.json says about a folder's packed modules; the fields are described in the module's docstring."""

    blocks: str
    group_size: int | None
    shift: bool
    kept: tuple[str, ...]
    int8: dict[str, float]
    int8_group_size: int
    scale_bits: int = 16
    shift_bits: int = 16
    group_sizes: dict[str, int] = field(default_factory=dict)
    int6: dict[str, float] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, Table]:
        """The embeddings and heads of `int8` and `int6`."""
        eight = {name: Table(8, multiplier) for name, multiplier in self.int8.items()}
        return eight | {name: Table(6, multiplier) for name, multiplier in self.int6.items()}

    def to_config(self) -> dict[str, Any]:
        """The "quantization_config" of config.json, of the lowest version that can say it."""
        fields = asdict(self) | {"kept": list(self.kept)}
        version = 3
        if not self.int6:
            version = 2
            del fields["int6"]
        if version == 2 and self.scale_bits == self.shift_bits == 16 and not self.group_sizes:
            version = 1
            del fields["scale_bits"], fields["shift_bits"], fields["group_sizes"]
        return {"quant_method": QUANT_METHOD, "format_version": version, "packing": PACKING} | fields

    def group_size_of(self, linear: str) -> int | None:
        """S of one linear, by its name in the file; None is the whole row."""
        return self.group_sizes.get(linear, self.group_size)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Layout:
        """Read a "quantization_config".

        Raises:
            FormatError: another method, an unknown version or packing, or a field missing or of the wrong type.
        """
        method, version, packing = (config.get(key) for key in ("quant_method", "format_version", "packing"))
        if method != QUANT_METHOD:
            raise FormatError(
                f"config.json says quant_method {method!r}, not {QUANT_METHOD!r}: this is not a ternarize folder."
            )
        if version not in FORMAT_VERSIONS:
            raise FormatError(
                f"config.json says format_version {version!r}; this ternarize reads "
                f"{', '.join(map(str, FORMAT_VERSIONS))}. "
                "Upgrade with: pip install --upgrade ternarize"
            )
        if packing != PACKING:
            raise FormatError(
                f"config.json says packing {packing!r}; this ternarize reads {PACKING!r}. "
                "Upgrade with: pip install --upgrade ternarize"
            )
        try:
            kept = config["kept"]
            if type(config["blocks"]) is not str or type(kept) not in (list, tuple) or {type(n) for n in kept} - {str}:
                raise TypeError("blocks is a module's name, and kept a list of them")
            layout = cls(
                blocks=config["blocks"],
                group_size=config["group_size"],
                shift=config["shift"],
                kept=tuple(kept),
                int8={name: float(value) for name, value in config["int8"].items()},
                int8_group_size=config["int8_group_size"],
                scale_bits=16 if version == 1 else config["scale_bits"],
                shift_bits=16 if version == 1 else config["shift_bits"],
                group_sizes={} if version == 1 else dict(config["group_sizes"].items()),
                int6={n: float(value) for n, value in config["int6"].items()} if version >= 3 else {},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"config.json's quantization_config is incomplete or damaged: {error!r}") from error
        for name, table in layout.tables.items():
            if not math.isfinite(table.multiplier):
                raise FormatError(f"config.json's int{table.bits} has a multiplier of {table.multiplier} for {name}.")
        if both := sorted(layout.int8.keys() & layout.int6.keys()):
            raise FormatError(f"config.json's quantization_config has {', '.join(both)} in int8 and in int6.")
        sizes = [layout.int8_group_size, *layout.group_sizes.values()]
        sizes += [] if layout.group_size is None else [layout.group_size]
        if not all(type(size) is int and size >= 1 for size in sizes) or type(layout.shift) is not bool:
            raise FormatError(
                f"config.json's quantization_config has group_size {layout.group_size!r}, int8_group_size "
                f"{layout.int8_group_size!r}, shift {layout.shift!r}: sizes are whole numbers from 1, shift is a bool."
            )
        bits = (layout.scale_bits, layout.shift_bits)
        if not all(type(b) is int and b in (16, 8, 4) for b in bits) or (16 in bits and set(bits) != {16}):
            raise FormatError(
                f"config.json says scale_bits {bits[0]!r}, shift_bits {bits[1]!r}: each is 8 or 4, or both are 16."
            )
        return layout
