"""PT2-LLM, our implementation from the formulas of arXiv 2510.03267 (its authors publish no code).

Decoder block by decoder block, every linear layer is ternarized in blocks of 128 columns, each row of a block with
a scale and a shift of its own:

- SSR: the next block is the columns most like (cosine) the mean of those that remain, after compensation;
- ITF: codes by nearest level, scale and shift by least squares, in turns until the codes stay;
- AGA: with the codes frozen, scale and shift that minimize the error of the block's output on the calibration inputs;
- GPTQ: the columns that remain absorb the block's error by least squares. As the codes of a block are frozen before
  its error is known, GPTQ's column loop inside a block would end in the same update, which is made here in one step.

The inputs are those of the prefix that is already quantized, within a block too (`true_sequential`, as GPTQ calls it).
Ours where the paper is silent: 1 % of the mean diagonal as damping, at most 50 turns of ITF, float16 for scale and
shift before the error is computed. A last block may be short. Stored: five codes in a byte, row by row; scale and
shift in float16; the order of the columns in int16.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from _common import Job, block_linears, pack_trits, start, stored_bytes, unpack_trits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, PreTrainedModel


def nearest(weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return ((weight - shift) / scale).round().clamp(-1, 1)


def least_squares(aa: Tensor, ab: Tensor, bb: Tensor, wa: Tensor, wb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, solve [aa ab; ab bb] [scale; shift] = [wa; wb], and say in which rows that has an answer."""
    determinant = aa * bb - ab * ab
    good = determinant > 1e-6 * aa * bb
    determinant = torch.where(good, determinant, torch.ones_like(determinant))
    return (bb * wa - ab * wb) / determinant, (aa * wb - ab * wa) / determinant, good


def fit(weight: Tensor, covariance: Tensor, turns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, columns], scale and shift [rows, 1] of a block of columns: init, ITF, AGA."""
    width = weight.shape[1]
    shift = weight.mean(1, keepdim=True)
    centred = weight - shift
    codes = centred.sign() * (centred.abs() > 0.75 * centred.abs().mean(1, keepdim=True))
    count = codes.abs().sum(1, keepdim=True).clamp(min=1)
    scale = ((codes * centred).sum(1, keepdim=True) / count).clamp(min=1e-8)

    for _ in range(turns):  # ITF
        new = least_squares(
            aa=codes.square().sum(1, keepdim=True),
            ab=codes.sum(1, keepdim=True),
            bb=torch.full_like(scale, width),
            wa=(weight * codes).sum(1, keepdim=True),
            wb=weight.sum(1, keepdim=True),
        )
        good = new[2] & (new[0] > 0)
        scale, shift = torch.where(good, new[0], scale), torch.where(good, new[1], shift)
        before, codes = codes, nearest(weight, scale, shift)
        if torch.equal(before, codes):
            break

    tc, oc = codes @ covariance, covariance.sum(0)  # AGA
    new = least_squares(
        aa=(tc * codes).sum(1, keepdim=True),
        ab=tc.sum(1, keepdim=True),
        bb=oc.sum().expand_as(scale),
        wa=(tc * weight).sum(1, keepdim=True),
        wb=(weight @ oc)[:, None],
    )
    scale, shift = torch.where(new[2], new[0], scale), torch.where(new[2], new[1], shift)
    return codes, scale.half(), shift.half()


def quantize(weight: Tensor, gram: Tensor, block: int, turns: int, damping: float, reorder: bool) -> dict[str, Tensor]:
    """What is stored of one linear layer with `weight` [rows, columns] and `gram` = sum of x xᵀ over its inputs x."""
    weight, gram = weight.clone(), gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    weight[:, dead] = 0
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))

    rest = torch.arange(weight.shape[1])
    order, codes, scales, shifts = [], [], [], []
    while len(rest):
        if reorder:  # SSR
            columns = weight[:, rest]
            likeness = normalize(columns, dim=0).T @ normalize(columns.mean(1), dim=0)
            rest = rest[likeness.argsort(descending=True)]
        now, rest = rest[:block], rest[block:]
        code, scale, shift = fit(weight[:, now], gram[now[:, None], now], turns)
        error = weight[:, now] - (scale.float() * code + shift.float())
        if len(rest):
            factor = torch.linalg.cholesky(damped[rest[:, None], rest])
            weight[:, rest] += error @ torch.cholesky_solve(damped[rest[:, None], now], factor).T
        order.append(now)
        codes.append(code)
        scales.append(scale)
        shifts.append(shift)

    stored = {"codes": pack_trits(torch.cat(codes, 1)), "scale": torch.cat(scales, 1), "shift": torch.cat(shifts, 1)}
    return stored | ({"order": torch.cat(order).to(torch.int16)} if reorder else {})


def dequantize(stored: dict[str, Tensor], columns: int, block: int) -> Tensor:
    codes = unpack_trits(stored["codes"], columns)
    scale, shift = (stored[name].float().repeat_interleave(block, 1)[:, :columns] for name in ("scale", "shift"))
    weight = scale * codes + shift
    return weight[:, stored["order"].long().argsort()] if "order" in stored else weight


class Stop(Exception):
    pass


def first_inputs(model: PreTrainedModel, layers: nn.ModuleList, ids: Tensor) -> tuple[list[Tensor], dict]:
    """The hidden states that enter the first decoder block, one sequence each, and what else it is called with."""
    states, others = [], {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append(args[0] if args else kwargs.pop("hidden_states"))
        others.update(kwargs)
        raise Stop

    handle = layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for row in ids:
        try:
            model(row[None], use_cache=False)
        except Stop:
            continue
    handle.remove()
    return states, others


def run(layer: nn.Module, states: list[Tensor], others: dict) -> list[Tensor]:
    outputs = [layer(state, **others) for state in states]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def input_grams(linears: dict[str, nn.Linear], layer: nn.Module, states: list[Tensor], others: dict) -> dict:
    """Sum of x xᵀ over the inputs of each linear of a decoder block."""
    grams = {name: torch.zeros(m.in_features, m.in_features) for name, m in linears.items()}

    def hook(name: str) -> Callable:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)
            grams[name] += rows.T @ rows

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    run(layer, states, others)
    for handle in handles:
        handle.remove()
    return grams


def stages(layer: nn.Module, state: Tensor, others: dict) -> list[dict[str, nn.Linear]]:
    """The linears of a decoder block in the order they run, those with the same input together."""
    called: list[tuple[int, str, nn.Linear]] = []
    names = {module: name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    kept = []  # so that no address is used twice

    def note(module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0])
        called.append((inputs[0].data_ptr(), names[module], module))

    handles = [module.register_forward_pre_hook(note) for module in names]
    run(layer, [state], others)
    for handle in handles:
        handle.remove()
    return [{name: module for _, name, module in group} for _, group in groupby(called, key=lambda call: call[0])]


def convert(job: Job) -> dict[str, Tensor]:
    s = job.settings
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32).eval()
    layers = model.model.layers
    states, others = first_inputs(model, layers, job.ids)
    stored: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        order = stages(layer, states[0], others)
        if not s["true_sequential"]:
            order = [{name: module for stage in order for name, module in stage.items()}]
        for stage in order:
            leader = dict(list(stage.items())[:1]) if s["true_sequential"] else stage  # they share their input
            grams = input_grams(leader, layer, states, others)
            for name, module in stage.items():
                gram = grams[name] if name in grams else grams[next(iter(leader))]
                parts = quantize(module.weight, gram, s["block"], s["itf_turns"], s["damping"], s["reorder"])
                module.weight.copy_(dequantize(parts, module.in_features, s["block"]))
                stored |= {f"model.layers.{index}.{name}.{part}": value for part, value in parts.items()}
        states = run(layer, states, others)
        print(f"block {index + 1} of {len(layers)}", flush=True)
    return stored


def load(job: Job) -> PreTrainedModel:
    """The source with the linears of `stored/`."""
    tensors = load_file(job.stored / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32)
    for name, module in block_linears(model).items():
        parts = {part: tensors[f"{name}.{part}"] for part in ("codes", "scale", "shift")}
        if f"{name}.order" in tensors:
            parts["order"] = tensors[f"{name}.order"]
        module.weight.data = dequantize(parts, module.in_features, job.settings["block"])
    return model


@torch.no_grad()
def main() -> None:
    defaults = {"block": 128, "itf_turns": 50, "damping": 0.01, "reorder": True, "true_sequential": True}
    job = start("pt2_llm", defaults)
    with job.clock():
        save_file(convert(job), job.stored / "model.safetensors")
    own = load(job)
    weights = {f"{name}.weight": module.weight for name, module in block_linears(own).items()}
    job.notes.append("Our implementation; the file holds the linears of the decoder blocks alone.")
    job.write_dense(weights)
    job.verify(lambda: own)
    job.write_result(stored_bytes(job.stored, list(block_linears(own))), weights, ["safetensors"])


if __name__ == "__main__":
    main()
