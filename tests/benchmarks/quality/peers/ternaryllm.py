"""Plain TernaryLLM, our implementation of the idea of arXiv 2406.07177 (its authors publish no code).

Dual learnable ternarization: the weights of a group of 128 inputs are scale * T + shift, with the codes T of TWN's
rule (threshold 0.7 * mean |w|) taken anew from latent weights at every step. Latent weights, scale and shift are all
trained end to end, the latent weights through a straight-through estimator. The start is round-to-nearest: the scale
is the mean magnitude above the threshold, the shift is 0. The teacher is the source checkpoint, and the loss is

    KL(teacher || student) on the logits  +  off_weight * mean over blocks and tokens of (1 - cosine of hidden states)

Our choices: off_weight 0.1; Adam (0.9, 0.95) without decay; 1e-4 for the latent weights and a tenth of it for scale
and shift; cosine schedule to zero over the budget after a warm-up of 5 %; gradients clipped to norm 1; batches of 2
sequences in a shuffled order, over and over; norms, biases and embeddings are not trained. The budget is `seconds` of
training, or exactly `steps` steps if that is set (for a run that repeats to the bit). Scale and shift are float16 in
the forward pass too. Stored: five codes in a byte, row by row; scale and shift in float16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from _common import Job, block_linears, pack_trits, start, stored_bytes, unpack_trits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, linear, pad
from transformers import AutoModelForCausalLM, PreTrainedModel


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` going forward, `value` going back."""
    return value + (rounded - value).detach()


class TernaryLinear(nn.Module):
    """A linear layer whose weight is scale * T(latent) + shift in groups of inputs; the last group may be short."""

    def __init__(self, source: nn.Linear, group: int) -> None:
        super().__init__()
        self.group, self.bias = group, source.bias
        self.latent = nn.Parameter(source.weight.detach().clone())
        magnitude = self.latent.detach().abs()
        above = magnitude > self.per_weight(self.threshold())
        total, count = self.group_sum(magnitude * above), self.group_sum(above.float())
        self.scale = nn.Parameter(total / count.clamp(min=1))
        self.shift = nn.Parameter(torch.zeros_like(self.scale))

    def group_sum(self, values: Tensor) -> Tensor:
        return pad(values, (0, -values.shape[1] % self.group)).unflatten(1, (-1, self.group)).sum(-1)

    def per_weight(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.group, 1)[:, : self.latent.shape[1]]

    def threshold(self) -> Tensor:
        latent = self.latent.detach()
        return 0.7 * self.group_sum(latent.abs()) / self.group_sum(torch.ones_like(latent))

    def codes(self) -> Tensor:
        latent = self.latent.detach()
        return latent.sign() * (latent.abs() > self.per_weight(self.threshold()))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (self.per_weight(through(p, p.half().float())) for p in (self.scale, self.shift))
        codes = self.codes()
        weight = scale * codes + shift
        return linear(x, weight + (self.latent - self.latent.detach()), self.bias)

    def parts(self) -> dict[str, Tensor]:
        packed = pack_trits(self.codes())
        return {"codes": packed, "scale": self.scale.detach().half(), "shift": self.shift.detach().half()}


def dequantize(parts: dict[str, Tensor], columns: int, group: int) -> Tensor:
    scale, shift = (parts[name].float().repeat_interleave(group, 1)[:, :columns] for name in ("scale", "shift"))
    return scale * unpack_trits(parts["codes"], columns) + shift


def batches(ids: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        yield from ids[torch.randperm(len(ids))].split(size)


def distance(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, off_weight: float) -> Tensor:
    with torch.no_grad():
        wanted = teacher(ids, output_hidden_states=True, use_cache=False)
        target = wanted.logits.log_softmax(-1)
    given = student(ids, output_hidden_states=True, use_cache=False)
    logits = kl_div(given.logits.log_softmax(-1), target, log_target=True, reduction="none").sum(-1).mean()
    pairs = list(zip(given.hidden_states[1:], wanted.hidden_states[1:], strict=True))
    features = sum((1 - cosine_similarity(own, other, dim=-1)).mean() for own, other in pairs) / len(pairs)
    return logits + off_weight * features


def train(student: PreTrainedModel, teacher: PreTrainedModel, job: Job) -> None:
    s = job.settings
    layers = [module for module in student.modules() if isinstance(module, TernaryLinear)]
    latents = [layer.latent for layer in layers]
    sides = [side for layer in layers for side in (layer.scale, layer.shift)]
    adam = torch.optim.Adam(
        [{"params": latents, "peak": s["lr"]}, {"params": sides, "peak": s["lr"] * s["side_lr"]}], betas=(0.9, 0.95)
    )
    begin, step, progress = time.perf_counter(), 0, 0.0
    for ids in batches(job.ids, s["batch_size"]):
        factor = min(1.0, (progress + 1e-3) / 0.05) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in adam.param_groups:
            group["lr"] = factor * group["peak"]
        loss = distance(student, teacher, ids, s["off_weight"])
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*latents, *sides], 1.0)
        adam.step()
        step += 1
        passed = time.perf_counter() - begin
        progress = step / s["steps"] if s["steps"] else passed / s["seconds"]
        print(f"step {step}: loss {loss.item():.4f}, {passed:.0f} s", flush=True)
        if progress >= 1:
            break
    tokens = step * s["batch_size"] * job.ids.shape[1]
    job.notes.append(f"Our implementation; trained for {step} steps ({tokens} tokens), last loss {loss.item():.3f}.")


def convert(job: Job) -> dict[str, Tensor]:
    teacher = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32).eval()
    student.requires_grad_(False)
    for name, module in block_linears(student).items():
        student.set_submodule(name, TernaryLinear(module, job.settings["group_size"]))
    train(student, teacher, job)
    layers = {name: module for name, module in student.named_modules() if isinstance(module, TernaryLinear)}
    return {f"{name}.{part}": value for name, layer in layers.items() for part, value in layer.parts().items()}


def load(job: Job) -> PreTrainedModel:
    """The source with the linears of `stored/`."""
    tensors = load_file(job.stored / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32)
    for name, module in block_linears(model).items():
        parts = {part: tensors[f"{name}.{part}"] for part in ("codes", "scale", "shift")}
        module.weight.data = dequantize(parts, module.in_features, job.settings["group_size"])
    return model


def main() -> None:
    learning = {"lr": 1e-4, "side_lr": 0.1, "off_weight": 0.1, "batch_size": 2}
    job = start("ternaryllm", {"seconds": 600.0, "steps": 0, "group_size": 128, **learning})
    with job.clock():
        save_file(convert(job), job.stored / "model.safetensors")
    own = load(job)
    weights = {f"{name}.weight": module.weight for name, module in block_linears(own).items()}
    job.write_dense(weights)
    job.verify(lambda: own)
    job.write_result(stored_bytes(job.stored, list(block_linears(own))), weights, ["safetensors"])


if __name__ == "__main__":
    main()
