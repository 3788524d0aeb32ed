"""Published figures recomputed from the modules, without weights: parameters and MACs.

Papers say FLOPs and mostly mean multiply-accumulates (MACs), for a clip of 8 frames at 224 x 224 where nothing else
is said; transformers read 16 or 32.
Each figure stands beside the published one; where they differ, it is recomputed the way the
publication counted, and the difference is explained. Nothing is stored but the published values,
and the values that a figure must have for the definitions in this package to be the right ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dvexport.models import zoo
from dvexport.models.token_figures import token_figures

__all__ = ["Figure", "Footprint", "figures", "footprint", "table"]

_FRAMES = 8


@dataclass(frozen=True)
class Figure:
    """One published figure beside what the modules give.

    Attributes:
        name: what is counted.
        unit: `M` parameters, or `GMACs` a clip.
        value: what the modules give.
        reference: what they must give, to as many digits as stand here.
        published: the published value, as printed.
        counted: the value as the publication counted it.
        tolerance: largest relative difference of `counted` to `published`; None: equal when rounded.
        note: what explains the difference.
    """

    name: str
    unit: str
    value: float
    reference: str
    published: str
    counted: float
    tolerance: float | None
    note: str

    @property
    def ok(self) -> bool:
        """Whether the value is the reference, and its difference to the published one as explained."""
        if _rounded(self.value, self.reference) != self.reference:
            return False
        if self.tolerance is None:
            return _rounded(self.counted, self.published) == self.published
        return abs(self.counted / float(self.published) - 1) <= self.tolerance

    def row(self) -> tuple[str, ...]:
        """Return name, value with unit, published value, their difference in percent, ok, note."""
        difference = 100 * (self.value / float(self.published) - 1)
        value = f"{_rounded(self.value, self.reference)} {self.unit}"
        return self.name, value, self.published, f"{difference:+.1f} %", "ok" if self.ok else "OFF", self.note


def _rounded(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


@dataclass(frozen=True)
class Footprint:
    """What a model consists of, for one frame.

    Attributes:
        parameters: count, shared layers once.
        macs: MACs by module name, of every convolution and linear layer.
        norm_elements: values that batch norms of feature maps read.
        linear: MACs of the linear layers.
        gated: MACs of the convolutions on either side of a channel gate.
        mask_inputs: tiles times input channels, summed over the tile masks.
    """

    parameters: int
    macs: dict[str, int]
    norm_elements: int
    linear: int
    gated: int
    mask_inputs: int

    @cached_property
    def total(self) -> int:
        """MACs of a frame with everything computed, policies and masks included."""
        return sum(self.macs.values())

    def part(self, infix: str) -> int:
        """Return the MACs of the modules with `infix` in their name."""
        return sum(macs for name, macs in self.macs.items() if infix in name)

    @property
    def floor(self) -> int:
        """MACs of a frame in which every gate skips every channel; policies run all the same."""
        return self.total - self.gated

    def as_official(self, macs: int) -> int:
        """Return `macs` as the official code's counter (thop) gives them.

        It counts 2 per batch-norm element, and a multiply and an add in linear layers.
        """
        return macs + 2 * self.norm_elements + self.linear


def footprint(name: str, **settings: Any) -> Footprint:
    """Count a zoo model's parameters and MACs by running one frame on the meta device (no memory).

    Args:
        name, settings: as of `zoo.create`.
    """
    import torch
    from torch import nn

    with torch.device("meta"):
        model = zoo.create(name, **settings)
        frame = torch.empty(1, 3, *model.config.size)
    macs: Counter[str] = Counter()
    sizes = {"norm": 0, "mask": 0, "linear": 0}

    def count(module_name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.BatchNorm2d):
                sizes["norm"] += output.numel()
                return
            positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
            cost = positions * module.weight.numel()  # type: ignore[operator, union-attr]
            # Summed, since a layer that blocks share runs once in each of them.
            macs[module_name] += cost
            sizes["linear"] += cost if isinstance(module, nn.Linear) else 0
            if module_name.endswith("mask.conv"):
                sizes["mask"] += inputs[0].numel()

        return hook

    for module_name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.register_forward_hook(count(module_name))
    with torch.no_grad():
        model(frame)
    gated = 0
    for block in getattr(model, "gated_blocks", list)():
        gated += macs[f"{block.name}.conv1"] + macs[f"{block.name}.conv2"]
    parameters = sum(p.numel() for p in model.parameters())
    return Footprint(parameters, macs, sizes["norm"], sizes["linear"], gated, sizes["mask"])


def figures() -> list[Figure]:
    """Return every published figure with what the modules give (half a minute, no weights)."""
    return [*_parameters(), *_static_macs(), *_gate_macs(), *_token_macs()]


def _parameters() -> list[Figure]:
    def count(label: str, model: str, reference: str, published: str, note: str = "", **settings: Any) -> Figure:
        millions = footprint(model, **settings).parameters / 1e6
        return Figure(f"{label} parameters", "M", millions, reference, published, millions, None, note)

    tsn18 = footprint("tsn_resnet18").parameters / 1e6
    tsn50, tsn50_400 = (footprint("tsn_resnet50", classes=c).parameters / 1e6 for c in (174, 400))
    dstep18 = footprint("dstep_resnet18").parameters / 1e6
    readme = footprint("dstep_resnet18", hidden=1024, shared_policies=False).parameters / 1e6
    inferred = "no official command for it exists: hidden 512, shared policies is what fits"
    return [
        Figure("TSN R18 parameters", "M", tsn18, "11.266", "11.2", tsn18, 0.01, "published value is cut off"),
        Figure("TSN R50 parameters", "M", tsn50, "23.865", "24.3", tsn50_400, None,
               f"published with 400 classes: {tsn50_400:.2f} M"),
        count("AdaFuse R18", "adafuse_resnet18", "15.576", "15.6", inferred),
        count("AdaFuse R50", "adafuse_resnet50", "37.687", "37.7"),
        count("AdaFuse R50-Last", "adafuse_resnet50_last", "39.083", "39.1"),
        count("D-STEP R18", "dstep_resnet18", "15.589", "15.6", inferred),
        count("D-STEP R50", "dstep_resnet50", "37.805", "37.8"),
        Figure("D-STEP R18, README command, parameters", "M", readme, "20.222", "15.6", dstep18, None,
               f"the command builds another model than the published one, which has {dstep18:.3f} M"),
    ]  # fmt: skip


def _static_macs() -> list[Figure]:
    r18, r50 = footprint("tsn_resnet18"), footprint("tsn_resnet50")
    mobile = footprint("tsm_online_mobilenetv2", classes=1000)
    normed18, normed50 = (_clip(f.as_official(f.total)) for f in (r18, r50))
    return [
        Figure("TSN R18", "GMACs", _clip(r18.total), "14.51", "14.6", normed18, 0.005,
               f"with 2 per batch-norm element {normed18:.2f}; the last 0.4 % is not reproduced"),
        Figure("TSN R50", "GMACs", _clip(r50.total), "32.70", "33.2", normed50, 0.011,
               f"with 2 per batch-norm element {normed50:.2f}; the last 1 % is not reproduced"),
        Figure("MobileNetV2, one frame, 1000 classes", "GMACs", mobile.total / 1e9, "0.301", "0.300",
               mobile.total / 1e9, 0.005, "published as 300 M (Sandler et al. 2018, table 4)"),
    ]  # fmt: skip


def _gate_macs() -> list[Figure]:
    wide = {"hidden": 1024, "hidden_quota": 0, "shared_policies": False}
    r18, r50 = (footprint(f"dstep_resnet{depth}", **wide) for depth in (18, 50))
    policy18, policy50 = (_clip(f.part(".policy.")) for f in (r18, r50))
    mask18, mask50 = (_clip(f.part(".mask.")) for f in (r18, r50))
    doubled = "hidden 1024, unshared; published counts a multiply and an add: {:.4f}"
    ada18, ada50 = footprint("adafuse_resnet18"), footprint("adafuse_resnet50")
    floor18, floor50 = (_clip(f.as_official(f.floor)) for f in (ada18, ada50))
    bound = "a bound, in the official counter's units; {:.2f} in plain MACs"
    return [
        Figure("D-STEP R18 policies", "GMACs", policy18, "0.0713", "0.14", 2 * policy18, None,
               doubled.format(2 * policy18)),
        Figure("D-STEP R50 policies", "GMACs", policy50, "0.308", "0.62", 2 * policy50, None,
               doubled.format(2 * policy50)),
        Figure("D-STEP R18 masks", "GMACs", mask18, "0.00519", "0.00007", r18.mask_inputs / 1e9, None,
               "published 0.07 M is tiles times channels: the 9 of 3x3 and the 8 frames were left out"),
        Figure("D-STEP R50 masks", "GMACs", mask50, "0.0463", "0.045", mask50, 0.03,
               "the last 3 % is not reproduced"),
        Figure("AdaFuse R18, every channel skipped", "GMACs", floor18, "1.21", "1.21", floor18, None,
               bound.format(_clip(ada18.floor))),
        Figure("AdaFuse R50, every channel skipped", "GMACs", floor50, "11.08", "11.08", floor50, None,
               bound.format(_clip(ada50.floor))),
    ]  # fmt: skip


def _token_macs() -> list[Figure]:
    note = "with layer norms and the choice of tokens, as fvcore counts"
    return [
        Figure(cell.name, "GMACs", cell.value, cell.reference, cell.published, cell.value, 0.01, note)
        for cell in token_figures()
    ]


def _clip(macs: int) -> float:
    """Return GMACs of a clip for the MACs of a frame."""
    return _FRAMES * macs / 1e9


def table(found: list[Figure]) -> list[tuple[str, ...]]:
    """Return rows to print, the header first."""
    return [("figure", "computed", "published", "difference", "", "why"), *(f.row() for f in found)]
