"""ternarize: a Hugging Face checkpoint goes in, a ternary one comes out.

Importing this package registers its loader with transformers, and lets torch's threads sleep while they wait and its
tensors lie in large pages, where that can still be said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ternarize.process import torch_settings

with torch_settings():
    import torch

    torch.empty(1)  # it looks when it first makes a tensor

from ternarize.progress import Progress
from ternarize.quantizer import TernarizeConfig, load
from ternarize.recipe import Recipe
from ternarize.runtime import TernaryLinear
from ternarize.tensor import TernaryTensor

if TYPE_CHECKING:
    from ternarize.conversion import convert
    from ternarize.in_place import ternarize

__version__ = "0.1.0"
__all__ = [
    "Progress",
    "Recipe",
    "TernarizeConfig",
    "TernaryLinear",
    "TernaryTensor",
    "__version__",
    "convert",
    "load",
    "ternarize",
]


def __getattr__(name: str) -> Any:
    """`convert` and `ternarize` on first use: who only runs a model never imports the solver, datasets or typer."""
    if name == "convert":
        from ternarize.conversion import convert

        return convert
    if name == "ternarize":
        from ternarize.in_place import ternarize

        return ternarize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
