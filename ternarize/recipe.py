"""Recipe: every choice that changes the numbers, in one frozen value, read from YAML with strict keys.

What to compute is the recipe; how to run it here (device, output folder, resume) is the command line's business.
The recipes that ship lie in `recipes/`; `Recipe.load("fast")` reads one by name, `Recipe.load("mine.yaml")` a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ternarize.errors import TernarizeError, nearest
from ternarize.grids import Grid

DEFAULT = "balanced"
DATA_FREE: dict[str, Any] = {"feedback": False, "curvature": False, "refit": False, "sweeps": 0, "correction": 0.0}
LARGEST_SEED = 2**62  # that leaves room for the numbers that are added to it
_HERE = Path(__file__).parent
RECIPE_FOLDER = next(folder for folder in (_HERE / "recipes", _HERE.parent / "recipes") if folder.is_dir())


@dataclass(frozen=True)
class Calibration:
    """Which text the statistics come from.

    Args:
        text: sources, `NAME` or `NAME@WEIGHT`: `self` (the model writes its own), `pydoc` (Python's manual, on every
            machine), a .jsonl/.txt file (also .gz), or a Hub dataset `owner/name[:config[:split]]`.
        samples: windows of text, shared among the sources by weight.
        length: tokens in a window.
        held_out: share of the windows that nothing is fitted to; they decide what is kept.
        random: share of the other windows that are no text, but tokens drawn evenly from the vocabulary: most of one
            is rare in any text, and what the fit never sees it gives away.
        seed: for the choice of windows, for their random tokens and for the model's own text.
    """

    text: tuple[str, ...] = ("self",)
    samples: int = 64
    length: int = 512
    held_out: float = 0.125
    random: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Learning:
    """What a ternary weight may learn, and how fast.

    Args:
        epochs: passes over the text; 0 is off.
        codes: how trits move: "latent" (every weight has a position), "low-rank" (a low-rank change of the positions),
            or "frozen" (scales and shifts alone learn).
        rank: of the low-rank change.
        levels: whether scales and shifts learn.
        thresholds: whether the thresholds between trits learn.
        rate: peak learning rate of codes (AdamW).
        level_rate: peak learning rate of scales, shifts and thresholds.
        off: weight of one minus the cosine between student's and teacher's features (OFF); 0 is off. A window's tokens
            count by their size, so that attention sinks are kept.
        cell: how far from its level a position may start, in units of scale: 0 is at the level, 0.5 at the threshold.
    """

    epochs: float = 0.0
    codes: Literal["latent", "low-rank", "frozen"] = "latent"
    rank: int = 32
    levels: bool = True
    thresholds: bool = False
    rate: float = 3e-3
    level_rate: float = 3e-3
    off: float = 0.0
    cell: float = 0.45


@dataclass(frozen=True)
class Tuning(Learning):
    """Learning inside a window of blocks, on the calibration windows, against the teacher's output where it ends.

    Args:
        window: blocks that learn together, 1 to 4.
        soften: share of the steps over which trits are soft and harden; 0 is hard from the start.
        ending: the last so many blocks, or "all", learn once more, together, against the teacher's distribution of the
            next token; 0 is off. They are in memory then, and the head.
        ending_epochs: passes over the calibration windows for that.
        ending_rate: peak learning rate of the scales and shifts, all that learns there.
    """

    off: float = 2.0
    window: int = 1
    soften: float = 0.0
    ending: int | Literal["all"] = 0
    ending_epochs: float = 1.0
    ending_rate: float = 1e-2

    def first_of_ending(self, blocks: int) -> int:
        """Number of the first of a model's blocks to learn once more, where a window begins; `blocks` if none does."""
        if not (self.epochs and self.ending):
            return blocks
        count = blocks if self.ending == "all" else self.ending
        return max(0, blocks - count) // self.window * self.window

    def share_of_ending(self, blocks: int) -> float:
        """Of a model's blocks, those that learn once more."""
        return 1 - self.first_of_ending(blocks) / blocks


@dataclass(frozen=True)
class Distillation(Learning):
    """Brief learning of the whole student from the whole teacher, at the end.

    While there is more than one epoch, a CPU keeps the teacher's hidden states on disk, so that they are computed once.

    Args:
        samples: windows of the calibration sources and length, drawn anew.
        batch: windows in a step, per process.
        depths: blocks, evenly spaced, whose features OFF compares.
        top: the teacher's likeliest tokens that the loss looks at, the rest being one outcome; 0 is all.
        checkpointing: keep only each block's input for the backward pass, for a third more time and much less memory.
        check: steps from one held-out measurement to the next.
        patience: checks without a gain that end the run.
        seed: for the order of the windows.
    """

    level_rate: float = 1e-2
    cell: float = 0.35
    samples: int = 1024
    batch: int = 2
    depths: int = 3
    top: int = 0
    checkpointing: bool = False
    check: int = 40
    patience: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """Every choice that changes the numbers (see `recipes/README.md` for what each is worth).

    Args:
        version: of this schema; 1.
        grid: "dlt" (scale and shift), "symmetric" (scale alone) or "absmean" (BitNet's).
        group_size: input columns that share a scale and shift; None is the whole row.
        budget: bits per ternary weight over the whole model, side data counted; linears that hurt get finer groups,
            others coarser ones. None gives all the same `group_size`. Needs the whole model in memory once.
        scale_bits: how scales are stored: in 16 bits (fp16), 8 or 4.
        shift_bits: how shifts are stored: likewise; 16 where scale_bits is 16, and only there.
        feedback: column-wise error feedback (GPTQ) while codes are chosen; False rounds to nearest.
        order: columns visited by descending "curvature", or in "natural" order. Nothing is stored either way.
        curvature: weight the grid's fit by each column's curvature (1 / U_jj^2), or by ones.
        sweeps: coordinate-descent sweeps over the trits under the stored scales and shifts, each row kept only where
            its error on held-out calibration tokens falls; 0 is none.
        refit: solve all scales and shifts of a row together under the full second moment, codes frozen.
        correction: 0..1, how much of the error that the ternary prefix left each linear's weight should undo
            before it is fitted (QEP's alpha, arXiv 2504.09629).
        damping: added to the second moment's diagonal, as a share of its mean.
        embeddings: "int8", "int6" (a quarter smaller) or "keep" for the input embedding.
        head: the same for the output head (a tied head follows the embedding).
        int8_group_size: columns that share a scale in int8 and int6; of int6 a multiple of 64.
        skip: linears that stay float: module names with shell wildcards, or `re:` and a regular expression.
        calibration: the text.
        tune: learning inside windows of blocks.
        distill: learning end to end.

    Raises:
        TernarizeError: a value breaks its rule.
    """

    version: int = 1
    grid: Grid = "dlt"
    group_size: int | None = 64
    budget: float | None = None
    scale_bits: Literal[16, 8, 4] = 4
    shift_bits: Literal[16, 8, 4] = 4
    feedback: bool = True
    order: Literal["curvature", "natural"] = "curvature"
    curvature: bool = True
    refit: bool = True
    sweeps: int = 2
    correction: float = 0.5
    damping: float = 0.01
    embeddings: Literal["int8", "int6", "keep"] = "int8"
    head: Literal["int8", "int6", "keep"] = "int8"
    int8_group_size: int = 64
    skip: tuple[str, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    tune: Tuning = field(default_factory=Tuning)
    distill: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        _require(self.version == 1, "version", self.version, "this ternarize reads version 1; upgrade it for others")
        if self.group_size is not None:
            _require(self.group_size >= 1, "group_size", self.group_size, "at least 1, or null for a whole row")
        _require(1 <= self.tune.window <= 4, "tune.window", self.tune.window, "between 1 and 4 blocks")
        _require(0 <= self.tune.soften <= 1, "tune.soften", self.tune.soften, "between 0 and 1")
        ending = self.tune.ending
        _require(ending == "all" or ending >= 0, "tune.ending", ending, "0 (off), a number of blocks or all")
        epochs, rate = self.tune.ending_epochs, self.tune.ending_rate
        _require(0 < epochs < math.inf, "tune.ending_epochs", epochs, "above 0; tune.ending: 0 turns it off")
        _require(0 < rate < math.inf, "tune.ending_rate", rate, "above 0; tune.ending: 0 turns it off")
        for name, learning in (("tune", self.tune), ("distill", self.distill)):
            _require(0 <= learning.epochs < math.inf, f"{name}.epochs", learning.epochs, "0 (off) or more")
            _require(learning.rank >= 1, f"{name}.rank", learning.rank, "at least 1")
            _require(0 < learning.rate < math.inf, f"{name}.rate", learning.rate, "above 0")
            _require(0 < learning.level_rate < math.inf, f"{name}.level_rate", learning.level_rate, "above 0")
            _require(0 <= learning.off < math.inf, f"{name}.off", learning.off, "0 (off) or more")
            _require(0 <= learning.cell < 0.5, f"{name}.cell", learning.cell, "at least 0, below 0.5 (the threshold)")
            moves = learning.codes != "frozen" or learning.levels or learning.thresholds
            rule = "latent or low-rank where neither levels nor thresholds learn"
            _require(moves or not learning.epochs, f"{name}.codes", learning.codes, rule)
        for key in ("samples", "batch", "depths", "check", "patience"):
            _require(getattr(self.distill, key) >= 1, f"distill.{key}", getattr(self.distill, key), "at least 1")
        _require(self.distill.top >= 0, "distill.top", self.distill.top, "at least 0 (all); 256 is usual")
        _require(self.int8_group_size >= 1, "int8_group_size", self.int8_group_size, "at least 1")
        if self.budget is not None:
            _require(1.6 < self.budget <= 4, "budget", self.budget, "above 1.6 (the trits alone), at most 4, or null")
        if self.grid == "dlt":
            both = {self.scale_bits, self.shift_bits}
            _require(
                both == {16} or 16 not in both, "shift_bits", self.shift_bits, "16 where scale_bits is, and only there"
            )
        _require(0 <= self.sweeps <= 20, "sweeps", self.sweeps, "between 0 (off) and 20")
        _require(0 <= self.correction <= 1, "correction", self.correction, "between 0 (off) and 1 (QEP in full)")
        _require(0 < self.damping <= 1, "damping", self.damping, "above 0, at most 1; 0.01 is usual")
        _require(self.calibration.samples >= 1, "calibration.samples", self.calibration.samples, "at least 1")
        _require(self.calibration.length >= 2, "calibration.length", self.calibration.length, "at least 2 tokens")
        _require(0 <= self.calibration.held_out <= 0.5, "calibration.held_out", self.calibration.held_out, "0 to 0.5")
        _require(0 <= self.calibration.random <= 0.5, "calibration.random", self.calibration.random, "0 (off) to 0.5")
        _require(bool(self.calibration.text), "calibration.text", [], "at least one source, such as self")
        for key, seed in (("calibration.seed", self.calibration.seed), ("distill.seed", self.distill.seed)):
            _require(0 <= seed <= LARGEST_SEED, key, seed, f"between 0 and {LARGEST_SEED}")

    @property
    def needs_statistics(self) -> bool:
        """Whether any step looks at activations; a recipe that does not is data-free."""
        fits = self.feedback or self.curvature or self.refit or self.correction > 0 or self.sweeps > 0
        return fits or self.tune.epochs > 0 or self.budget is not None

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """Read a shipped recipe by name, or a YAML file.

        Raises:
            TernarizeError: no such recipe, not YAML, an unknown key or a bad value.
        """
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            path = RECIPE_FOLDER / f"{name}.yaml"
            if not path.is_file():
                raise TernarizeError(
                    f"recipe {str(name)!r} is not one of those shipped ({', '.join(shipped())}) and not a .yaml file"
                    f"{nearest(str(name), shipped())}. Give one of the names, or the path of a YAML file."
                )
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TernarizeError(f"recipe {path}: {error.strerror or error}. Check the path.") from error
        except (yaml.YAMLError, ValueError) as error:
            raise TernarizeError(f"recipe {path} is not valid YAML: {error}") from error
        return cls.from_dict(values if values is not None else {}, where=f"recipe {path}")

    @classmethod
    def from_dict(cls, values: Any, where: str = "recipe") -> Recipe:
        """Build from plain values; every key must be known and every value of its type.

        Raises:
            TernarizeError: an unknown key (the nearest known one is named) or a bad value.
        """
        return typing.cast(Recipe, _build(cls, values, where, ""))

    def with_settings(self, settings: list[str]) -> Recipe:
        """A copy with `key=value` settings applied, dotted for nested keys: `["group_size=128"]`.

        Raises:
            TernarizeError: no `=`, an unknown key or a bad value.
        """
        values = self.to_dict()
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise TernarizeError(f"setting {setting!r} has no '='. Write it as key=value, such as group_size=128.")
            target = values
            *parents, last = key.strip().split(".")
            for parent in parents:
                inner = target.get(parent)
                if not isinstance(inner, dict):
                    raise TernarizeError(
                        f"setting {setting!r}: {parent!r} has no keys inside{nearest(parent, target)}. "
                        "calibration, tune and distill are nested, as in calibration.samples=128."
                    )
                target = inner
            try:
                target[last] = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError) as error:
                raise TernarizeError(f"setting {setting!r}: {text!r} is not a YAML value: {error}") from error
        return self.from_dict(values, where="settings")

    def with_text(self, sources: list[str] | str | None) -> Recipe:
        """A copy that calibrates on these sources, or on this one; the recipe itself where there are none."""
        if not sources:
            return self
        text = (sources,) if isinstance(sources, str) else tuple(sources)
        return dataclasses.replace(self, calibration=dataclasses.replace(self.calibration, text=text))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON; `from_dict` gives the recipe back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def shipped() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def _build(cls: type, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        key = f"{prefix.rstrip('.')}: " if prefix else ""
        raise TernarizeError(f"{where}: {key}expected keys and values, found {values!r}")
    hints = typing.get_type_hints(cls)
    known: dict[str, Any] = {}
    for key, value in values.items():
        if key is False and "off" in hints:
            key = "off"  # what YAML makes of the word without quotes
        if key not in hints:
            raise TernarizeError(
                f"{where}: unknown key {prefix + str(key)!r}{nearest(str(key), hints)}. Known keys: {', '.join(hints)}."
            )
        known[key] = _convert(value, hints[key], where, prefix + key)
    return cls(**known)


def _words(hint: Any) -> tuple[Any, ...]:
    """What a Literal allows; nothing for other types."""
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _convert(value: Any, hint: Any, where: str, key: str, besides: str = "") -> Any:
    """`value` as the type that the field declares, or an error that names both, and what else is allowed."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, f"{key}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return arguments[arguments.index(value)]  # 4 for 4.0
        expected = "one of " + ", ".join(map(str, arguments)) + nearest(str(value), arguments)
    elif origin in (types.UnionType, typing.Union):
        (main,) = (choice for choice in arguments if choice is not type(None) and not _words(choice))
        words = [word for choice in arguments if choice is not main for word in _words(choice) or [None]]
        if value in words:
            return value
        return _convert(value, main, where, key, "".join(f" or {word or 'null'}" for word in words))
    elif origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(items)
        expected = "a list of strings"
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is float and isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value):
        return float(value)  # 1e-3 is a number to everyone but YAML 1.1
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    else:
        expected = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))
    raise TernarizeError(f"{where}: {key} is {value!r}, but must be {expected}{besides}.")


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise TernarizeError(f"recipe: {key} is {value!r}, but must be {rule}.")
