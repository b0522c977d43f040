"""Inside a window of blocks: learn scale, shift and codes against the teacher's output (DLT, with OFF).

A `TrainableTernary` takes the place of each ternary linear. Per group, scale, shift and threshold learn as bounded
factors around the fitted values, so that they can neither collapse nor run away:

    scale     = scale_0 * 2 sigmoid(a)                      in (0, 2) scale_0
    shift     = shift_0 + scale_0 * (sigmoid(b) - 1/2)      within half a scale of shift_0
    threshold = 1/2 * 2 sigmoid(c)                          in (0, 1), in units of scale
    trit      = round(latent / (2 threshold)), clamped to -1..1

What the file cannot hold is not learnt: scale and shift are rounded to their stored form in the forward pass, and
their gradient passes straight through. A code moves when its latent (a position in units of scale) crosses a
threshold; its gradient passes where the latent lies inside the outermost levels (clipped straight-through estimator).

Sources: TernaryLLM (arXiv 2406.07177) for DLT and OFF; CAT-Q (arXiv 2606.26650) for the bounded factors, the
softening and the windows; LR-QAT (arXiv 2406.06385) for low-rank movers; Yin et al. (arXiv 1903.05662) for the clip.

Shapes: O out features, I in features, G groups in a row, B windows, T tokens, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ternarize.architecture import replace_module
from ternarize.calibration import Walk, autocast, first_held_out
from ternarize.learnt import learnt_linear, nearest_trits
from ternarize.packing import decode_levels, encode_levels, round_levels
from ternarize.recipe import Learning, Recipe
from ternarize.runtime import TernaryLinear
from ternarize.tensor import SMALLEST_SCALE, TernaryTensor, expand_groups, times_scale

HUBER = 1.0  # where the loss turns linear, in the tokens' units
LARGEST = 10.0  # that a channel may be to OFF, in sizes of the median one
SHARPEST = 30.0  # of the softened codes, when they are hardened


class TrainableTernary(nn.Module):
    """A ternary linear that can learn; starts as the one it is made from.

    Args:
        linear: the fitted one.
        weight: the float weight [O, I], whose place inside each code's cell the latents start from; without it they
            start at the levels.
        settings: of the tuning.
    """

    def __init__(self, linear: TernaryLinear, weight: Tensor | None, settings: Learning) -> None:
        super().__init__()
        start = linear.to_tensor()
        self.replaces, self.group_size, self.levels = linear.replaces, start.group_size, start.levels
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.sharpness = math.inf
        self.limits = None if start.levels is None else start.levels.limits.cpu()  # read as numbers, in every step
        self.register_buffer("scale_0", start.scale.float(), persistent=False)
        with_shift = start.shift is not None
        shift = start.shift.float() if start.shift is not None else torch.zeros_like(self.scale_0)
        self.register_buffer("shift_0", shift, persistent=False)
        trits = start.trits.float()
        latent = trits
        if weight is not None:
            place = (weight.float() - self._columns(shift)) / self._columns(self.scale_0)
            latent = (trits + (place - trits).clamp(-settings.cell, settings.cell)).clamp(-1, 1)
        zeros = torch.zeros_like(self.scale_0)
        self.scale_factor = nn.Parameter(zeros.clone(), requires_grad=settings.levels)
        self.shift_factor = nn.Parameter(zeros.clone(), requires_grad=settings.levels and with_shift)
        self.threshold_factor = nn.Parameter(zeros.clone(), requires_grad=settings.thresholds)
        self.steady = settings.codes == "frozen" and not settings.thresholds  # no trit will ever move
        self.latent = nn.Parameter(start.trits if self.steady else latent, requires_grad=settings.codes == "latent")
        self.down = self.up = None
        if settings.codes == "low-rank":
            rank = min(settings.rank, *latent.shape)
            same = torch.Generator().manual_seed(0)  # in every process, and in a run that goes on
            down = torch.randn(rank, self.in_features, generator=same) / math.sqrt(rank)
            self.down = nn.Parameter(down.to(latent.device))
            self.up = nn.Parameter(torch.zeros(self.out_features, rank, device=latent.device))
        self.with_shift = with_shift

    scale_0: Tensor
    shift_0: Tensor

    def _columns(self, per_group: Tensor) -> Tensor:
        return expand_groups(per_group, self.in_features, self.group_size)

    def stored_levels(self) -> tuple[Tensor, Tensor | None]:
        """Scale and shift [O, G] in their stored form, with straight-through gradients; None without a shift."""
        scale, shift = self._levels()
        with torch.no_grad():
            kept_scale, kept_shift = self._round(scale, shift)
        scale = scale + (kept_scale - scale).detach()
        return scale, None if shift is None or kept_shift is None else shift + (kept_shift - shift).detach()

    def _levels(self) -> tuple[Tensor, Tensor | None]:
        scale = (self.scale_0 * (2 * torch.sigmoid(self.scale_factor))).clamp(min=SMALLEST_SCALE)
        shift = self.shift_0 + self.scale_0 * (torch.sigmoid(self.shift_factor) - 0.5) if self.with_shift else None
        return scale, shift

    def _round(self, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.levels is None or self.limits is None:
            return scale.half().float(), None if shift is None else shift.half().float()
        return round_levels(scale, shift, self.levels.scale_bits, self.levels.shift_bits, self.limits)

    def position(self) -> Tensor:
        """Latents in units of twice the threshold, [O, I], which are rounded to trits; or the trits that stay, int8."""
        latent: Tensor = self.latent
        if self.down is not None and self.up is not None:
            with torch.autocast(latent.device.type, enabled=False):  # the codes are to be the same when they are packed
                latent = latent + self.up @ self.down
        if not self.threshold_factor.requires_grad:
            return latent
        return latent / self._columns(2 * torch.sigmoid(self.threshold_factor))

    def soft_weight(self) -> Tensor:
        """The float32 weight [O, I] with trits as soft as `sharpness` says."""
        scale, shift = self.stored_levels()
        position, s = self.position(), self.sharpness
        trits = (torch.tanh(s * (position - 0.5)) + torch.tanh(s * (position + 0.5))) / (2 * math.tanh(s / 2))
        weight = times_scale(trits, scale, self.group_size)
        return weight if shift is None else weight + self._columns(shift)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], in x's dtype, or in autocast's."""
        if math.isinf(self.sharpness) or self.steady:
            out = learnt_linear(x, self.position(), *self.stored_levels(), self.group_size)
        else:
            out = nn.functional.linear(x, self.soft_weight().to(x.dtype))
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @torch.no_grad()
    def to_ternary(self) -> TernaryLinear:
        """What was learnt, packed."""
        trits = nearest_trits(self.position()).to(torch.int8)
        scale, shift = self._levels()
        levels = self.levels
        if levels is None:
            scale, shift = scale.half(), None if shift is None else shift.half()
        else:
            groups = scale.shape[1]
            levels = encode_levels(scale, shift, levels.scale_bits, levels.shift_bits, levels.limits)
            scale, shift = decode_levels(levels, groups)
        tensor = TernaryTensor(trits, scale, shift, self.group_size, levels)
        linear = TernaryLinear.from_tensor(tensor, self.bias)
        linear.replaces = self.replaces
        return linear


@dataclass(frozen=True)
class Tuned:
    """How the tuning of one window ended.

    Args:
        before, after: held-out loss, as fitted and as learnt: of the window's output, no unit, or KL in nats a token.
        kept: whether what was learnt is kept.
        steps: optimizer steps taken.
    """

    before: float
    after: float
    kept: bool
    steps: int


def make_trainable(block: nn.Module, weights: dict[str, Tensor], prefix: str, settings: Learning) -> None:
    """Put a TrainableTernary in the place of every ternary linear of a block.

    Args:
        weights: float weights by full name, as far as they are known.
        prefix: full name of the block.
    """
    for name, module in list(block.named_modules()):
        if isinstance(module, TernaryLinear):
            replace_module(block, name, TrainableTernary(module, weights.get(f"{prefix}.{name}"), settings))


def make_ternary(block: nn.Module) -> None:
    """Put what was learnt back as TernaryLinear."""
    for name, module in list(block.named_modules()):
        if isinstance(module, TrainableTernary):
            replace_module(block, name, module.to_ternary())


def tune(
    window: list[nn.Module],
    first: int,
    entrance: list[Tensor],
    exit_: list[Tensor],
    walk: Walk,
    recipe: Recipe,
) -> Tuned:
    """Learn the codes, scales and shifts of a window of blocks, whose linears are trainable; roll back if it lost.

    Args:
        window: the blocks, in order; `first` is the number of the first one.
        entrance: the student's hidden states [B, T, H] per batch, where the window begins.
        exit_: the teacher's hidden states where it ends.
        walk: how each block is called.
    """

    channels = [channel_sizes(hidden) for hidden in exit_]

    def loss(batch: int) -> Tensor:
        student = walk.through(window, first, batch, entrance[batch])
        return window_loss(student, exit_[batch], channels[batch], recipe.tune.off)

    return learn(window, loss, len(entrance), recipe.tune.epochs, recipe)


def count_steps(batches: int, recipe: Recipe, epochs: float) -> int:
    """Optimizer steps in so many passes over the batches that are not held out."""
    return math.ceil(epochs * first_held_out(batches, recipe.calibration.held_out))


def learn(
    window: list[nn.Module],
    loss: Callable[[int], Tensor],
    batches: int,
    epochs: float,
    recipe: Recipe,
    stepped: Callable[[], object] = lambda: None,
) -> Tuned:
    """Lower `loss(batch)` by what the window's trainable linears can learn; roll back if it lost on held-out batches.

    Args:
        batches: how many there are; the last ones are held out, as the recipe says.
        epochs: passes over the others.
        stepped: called after each step.
    """
    settings = recipe.tune
    fitted = first_held_out(batches, recipe.calibration.held_out)
    modules = [m for block in window for m in block.modules() if isinstance(m, TrainableTernary)]
    learning = learning_parameters({str(number): module for number, module in enumerate(modules)})
    device = next(window[0].parameters()).device
    start = {name: parameter.detach().clone() for name, parameter in learning.items()}
    steps = count_steps(batches, recipe, epochs)

    @torch.no_grad()
    def held_out() -> float:
        apart = range(fitted, batches) if fitted < batches else range(batches)
        with autocast(device):
            return sum(float(loss(batch)) for batch in apart) / len(apart)

    before = held_out()
    if not learning:  # all linears of the window are skipped
        return Tuned(before, before, False, 0)
    optimizer = make_optimizer(learning, settings)
    generator = torch.Generator().manual_seed(recipe.calibration.seed)
    order = [int(b) for _ in range(math.ceil(epochs)) for b in torch.randperm(fitted, generator=generator)]
    for step, batch in enumerate(order[:steps]):
        progress = step / steps
        for module in modules:
            module.sharpness = sharpness(progress, settings.soften)
        with torch.enable_grad(), autocast(device):
            current = loss(batch)
        optimizer.zero_grad(set_to_none=True)
        current.backward()
        step_optimizer(optimizer, schedule(progress))
        stepped()
    for module in modules:
        module.sharpness = math.inf
    after = held_out()
    kept = after < before
    if not kept:
        restore(learning, start)
    return Tuned(before, after, kept, steps)


def window_loss(student: Tensor, teacher: Tensor, channels: Tensor, off: float) -> Tensor:
    """What the window's output is off by: `huber_loss` and `sized_off`, in units of the channels; no unit.

    For Huber's loss these are geometric means, of a channel's own size and that of the median one. In absolute units
    one channel of Gemma 3, with more than nine tenths of the energy of every token, would be all that counts, although
    the norm of the next block makes it one among many. For OFF such channels are made smaller, to `LARGEST` times the
    median one, and the others are as they are.

    Args:
        student, teacher: [B, T, H].
        channels: size of each [H], by `channel_sizes` of the teacher's.
        off: weight of `sized_off`.
    """
    student, teacher = student.float(), teacher.float()
    median = channels.median().clamp(min=1e-6)
    unit = (channels.clamp(min=0.01 * median) * median).sqrt()  # one that is idle is not all that counts either
    loss = huber_loss(student / unit, teacher / unit)
    if off:
        unit = (channels / (LARGEST * median)).clamp(min=1)
        loss = loss + off * sized_off(student / unit, teacher / unit)
    return loss


def huber_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of features [..., H] in units of each token, a mean over all.

    The unit is the geometric mean of a token's own size and that of the median one, because a few are hundreds of times
    the others, the attention sinks. In absolute units they would be all that counts. In units of their own they would
    count as one of many, and a sink is more than that: all other tokens attend to it.
    """
    size = teacher.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    unit = (size * size.median()).sqrt()
    return nn.functional.huber_loss(student / unit, teacher / unit, delta=HUBER)


def channel_sizes(features: Tensor) -> Tensor:
    """Median magnitude of each channel of features [..., H] over the tokens, float32 [H].

    Medians, so that the few tokens that are hundreds of times the others do not set a channel's size for all.
    """
    return features.float().abs().flatten(0, -2).median(0).values


def off_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between features [..., H], a mean over tokens (TernaryLLM's OFF)."""
    return _turned(student, teacher).mean()


def sized_off(student: Tensor, teacher: Tensor) -> Tensor:
    """OFF as a mean over tokens that count by the teacher's size, for features [..., H].

    All other tokens attend to a sink, so it is to stay one; but how large it is hardly matters, as every block begins
    with a norm. Huber's loss alone lets sinks go, which pull no harder on it than any outlier, and in squared error a
    sink's size is most of what there is to learn, at the expense of all other tokens.
    """
    size = teacher.float().norm(dim=-1)
    return (size * _turned(student, teacher)).sum() / size.sum().clamp(min=1e-12)


def _turned(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of each token's features, [..., H] -> [...]."""
    return 1 - nn.functional.cosine_similarity(student.float(), teacher.float(), dim=-1)


def learning_parameters(modules: dict[str, TrainableTernary]) -> dict[str, nn.Parameter]:
    """What learns, by the names of module and parameter."""
    return {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def restore(learning: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Give parameters the values that they had once."""
    for name, parameter in learning.items():
        parameter.copy_(values[name])


def make_optimizer(learning: dict[str, nn.Parameter], settings: Learning) -> torch.optim.Optimizer:
    """AdamW over what learns, codes and levels at their own rates."""
    codes = [parameter for name, parameter in learning.items() if not name.endswith("_factor")]
    levels = [parameter for name, parameter in learning.items() if name.endswith("_factor")]
    groups = [{"params": codes, "peak": settings.rate}, {"params": levels, "peak": settings.level_rate}]
    kept = [group for group in groups if group["params"]]
    return torch.optim.AdamW(kept, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def step_optimizer(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """One step on gradients that are averaged over all processes and clipped to a norm of 1.

    Args:
        factor: of the schedule, on each group's own peak rate.
    """
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    if dist.is_initialized():
        for parameter in learning:
            if parameter.grad is None:  # an expert that got no tokens here may have got some elsewhere
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    torch.nn.utils.clip_grad_norm_(learning, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
    optimizer.step()


def sharpness(progress: float, soften: float) -> float:
    """Of the codes: rises to `SHARPEST` over the share `soften` of the steps, then they are hard."""
    return math.inf if progress >= soften else max(1.0, SHARPEST * progress / soften)


def schedule(progress: float) -> float:
    """Factor on the learning rates: a short linear rise, then a cosine to nothing; progress in 0..1."""
    return min(progress / 0.05 + 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))
