"""What a gate has no place for is refused by name where it is called, in eager mode and when exported."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from dvexport import gates
from dvexport.errors import TraceError, UsageError
from dvexport.trace import trace

N, CIN, COUT, SIZE = 3, 4, 6, (8, 10)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def patched(name):
    made = conv()
    setattr(made, name, lambda *given: getattr(nn.Conv2d, name)(made, *given) * 2)
    return made


def conv(kernel=3, **options):
    return nn.Conv2d(CIN, COUT, kernel, **options)


def changed(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


class Net(nn.Module):
    """Calls `gated_conv` with what is given, made from the frames so that a trace can follow."""

    def __init__(self, layer=None, bn=None, read=lambda x: x, **given):
        super().__init__()
        self.lift = nn.Conv2d(3, CIN, 1)
        self.conv, self.bn, self.read, self.given = layer or conv(), bn, read, given

    def forward(self, frames):
        x = self.read(self.lift(frames))
        given = {name: value(x) if callable(value) else value for name, value in self.given.items()}
        return gates.gated_conv(x, self.conv, self.bn, **{"gate": "mine", **given}).mean((2, 3))


def frames():
    return torch.randn(N, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def whole(*sizes, value=2, dtype=torch.int64):
    """A decision for each frame of x, `[N, *sizes]`."""
    return lambda x: torch.full((1, *sizes), value, dtype=dtype).expand(x.shape[0], *sizes)


REFUSED = {
    "groups": (lambda: Net(conv(groups=2)), r"conv is grouped \(groups=2\)"),
    "depthwise": (lambda: Net(nn.Conv2d(CIN, CIN, 3, groups=CIN)), r"conv is depthwise \(groups=4\)"),
    "reflect": (lambda: Net(conv(padding=1, padding_mode="reflect")), "padding_mode='reflect'"),
    "replicate": (lambda: Net(conv(padding=1, padding_mode="replicate")), "padding_mode='replicate'"),
    "circular": (lambda: Net(conv(padding=1, padding_mode="circular")), "padding_mode='circular'"),
    "unknown padding": (lambda: Net(changed(conv(), padding="full")), "padding='full'"),
    "no stride": (lambda: Net(conv(stride=0)), r"conv has stride=\[0, 0\]"),
    "no dilation": (lambda: Net(conv(dilation=(1, 0))), r"conv has dilation=\[1, 0\]"),
    "less than no padding": (lambda: Net(conv(padding=-1)), r"conv has padding=\[-1, -1\]"),
    "transposed": (lambda: Net(nn.ConvTranspose2d(CIN, COUT, 3)), "conv is a ConvTranspose2d"),
    "1-D": (lambda: Net(nn.Conv1d(CIN, COUT, 3)), "conv is a Conv1d"),
    "3-D": (lambda: Net(nn.Conv3d(CIN, COUT, 3)), "conv is a Conv3d"),
    "linear": (lambda: Net(nn.Linear(CIN, COUT)), "conv is a Linear"),
    "swapped": (lambda: Net(nn.BatchNorm2d(COUT), conv()), "conv is a BatchNorm2d"),
    "sequential": (lambda: Net(nn.Sequential(conv())), "conv is a Sequential"),
    "own forward": (lambda: Net(OwnForward(CIN, COUT, 3)), "conv is a OwnForward with a forward of its own"),
    "own convolution": (lambda: Net(OwnConvolution(CIN, COUT, 3)), "with a _conv_forward of its own"),
    "patched forward": (lambda: Net(patched("forward")), "conv is a Conv2d with a forward of its own"),
    "patched call": (lambda: Net(patched("_call_impl")), "conv is a Conv2d with a _call_impl of its own"),
    "no weight yet": (lambda: Net(nn.LazyConv2d(COUT, 3)), "LazyConv2d that has no weight yet"),
    "complex": (lambda: Net(conv(dtype=torch.complex64)), "a weight of torch.complex64"),
    "channels": (lambda: Net(nn.Conv2d(CIN + 1, COUT, 3)), "x has 4 channels, the convolution reads 5"),
    "window": (lambda: Net(conv(3, dilation=4)), r"the window of \[3, 3\] pixels does not fit x, of \[8, 10\]"),
    "no statistics": (lambda: Net(bn=nn.BatchNorm2d(COUT, track_running_stats=False)), "no running statistics"),
    "norm of another width": (lambda: Net(bn=nn.BatchNorm2d(1)), r"running_mean of \[1\], the convolution 6"),
    "instance norm": (lambda: Net(bn=nn.InstanceNorm2d(COUT)), "bn is a InstanceNorm2d"),
    "norm of another rank": (lambda: Net(bn=nn.BatchNorm3d(COUT)), "bn is a BatchNorm3d"),
    "identity": (lambda: Net(bn=nn.Identity()), "bn is a Identity"),
    "own norm": (lambda: Net(bn=OwnNorm(COUT)), "bn is a OwnNorm with a forward of its own"),
    "activation": (lambda: Net(activation="ReLU"), "unknown activation 'ReLU'"),
    "activation function": (lambda: Net(activation=lambda x: "silu"), "unknown activation 'silu'"),
    "no frame axis": (lambda: Net(read=lambda x: x[0]), r"x has 3 axes"),
    "whole numbers": (lambda: Net(read=lambda x: x.long()), "x is torch.int64"),
    "action of one frame": (lambda: Net(action=torch.full((1, COUT), 2)), r"action is \[1, 6\]"),
    "action of other channels": (lambda: Net(action=whole(CIN)), r"it must be \[frames, Cout\]"),
    "action of another rank": (lambda: Net(action=whole(COUT, 1)), r"it must be \[frames, Cout\]"),
    "action as truth": (lambda: Net(action=whole(COUT, value=True, dtype=torch.bool)), "action is torch.bool"),
    "tiles with channels": (lambda: Net(tiles=whole(1, 2, 2)), "tiles are .*1, 2, 2.*must be"),
    "tiles of one frame": (lambda: Net(tiles=torch.ones(1, 2, 2, dtype=torch.bool)), r"tiles are \[1, 2, 2\]"),
    "no tiles": (lambda: Net(tiles=whole(0, 2)), "tiles are"),
    "promise of other channels": (lambda: Net(active_in=whole(COUT)), r"it must be \[frames, Cin\]"),
    "no name": (lambda: Net(gate=""), "'' is no name"),
    "a name of more": (lambda: Net(gate="a,b=c"), "'a,b=c' is no name"),
    "a name of lines": (lambda: Net(gate="a\nb"), r"'a\\nb' is no name"),
    "all gates": (lambda: Net(gate="*"), r"'\*' is no name"),
    "a number as name": (lambda: Net(gate=1), "1 is no name"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_eager_mode(name):
    make, said = REFUSED[name]
    with pytest.raises(UsageError, match=said) as caught:
        make()(frames())
    named = "name" in name or name == "all gates"
    assert named or caught.value.where == "gate mine"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_exporting(name):
    make, said = REFUSED[name]
    with pytest.raises(UsageError, match=said), patch("torch.compiler.is_exporting", lambda: True):
        make().eval()(frames())


@pytest.mark.parametrize("name", ["groups", "no statistics", "activation", "no frame axis"])
def test_refused_at_export(name):
    """As above, through the exporter, which wraps what is raised inside."""
    make, said = REFUSED[name]
    with pytest.raises(UsageError, match=said) as caught:
        trace(make(), SIZE)
    assert caught.value.where == "gate mine"


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 2


def late(net):
    """Leave a layer in training mode though the model is in evaluation."""
    net.bn.train = lambda mode=True: net.bn
    return net


def hooked(layer, pre=False):
    if pre:
        layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))
    else:
        layer.register_forward_hook(lambda layer, inputs, output: output * 2)
    return layer


EXPORT_ONLY = {
    "hook": (lambda: Net(hooked(conv())), "conv has a forward hook"),
    "hook before": (lambda: Net(hooked(conv(), pre=True)), "conv has a forward hook"),
    "hook on a norm": (lambda: Net(bn=hooked(nn.BatchNorm2d(COUT))), "bn has a forward hook"),
    "pruned": (lambda: Net(prune.l1_unstructured(conv(), "weight", 0.5)), "conv has a forward hook"),
    "training": (lambda: late(Net(bn=nn.BatchNorm2d(COUT))), "bn is in training mode"),
    "double": (lambda: Net(conv(dtype=torch.float64), read=lambda x: x.double()), "a weight of torch.float64"),
    "half": (lambda: Net(conv(dtype=torch.bfloat16), read=lambda x: x.bfloat16()), "a weight of torch.bfloat16"),
    "action of floats": (lambda: Net(action=whole(COUT, 3, value=1.0, dtype=torch.float32)), "action of floats"),
    "tiles of floats": (lambda: Net(tiles=whole(2, 2, value=1.0, dtype=torch.float32)), "tiles of floats"),
}


@pytest.mark.parametrize("name", EXPORT_ONLY)
def test_harmless_until_exported(name):
    make, said = EXPORT_ONLY[name]
    assert make()(frames()).shape == (N, COUT)
    with pytest.raises(UsageError, match=said) as caught, patch("torch.compiler.is_exporting", lambda: True):
        make().eval()(frames())
    assert caught.value.where == "gate mine" and caught.value.hint


@pytest.mark.parametrize("name", ["training", "tiles of floats"])
def test_refused_only_at_export(name):
    make, said = EXPORT_ONLY[name]
    with pytest.raises(UsageError, match=said):
        trace(make(), SIZE)


def test_hooks_on_every_module_count():
    doubled = register_module_forward_hook(lambda layer, inputs, output: output * 2)
    with doubled, pytest.raises(UsageError, match="conv has a forward hook"):
        trace(Net(), SIZE)


def test_the_advice_on_hooks_holds():
    net = Net(prune.l1_unstructured(conv(), "weight", 0.5))
    prune.remove(net.conv, "weight")
    assert [node.op_type for node in trace(net, SIZE).graph].count("GatedConv") == 1
    net = Net(conv())
    parametrize.register_parametrization(net.conv, "weight", Scaled())
    node = next(node for node in trace(net, SIZE).graph if node.op_type == "GatedConv")
    doubled = torch.from_numpy(node.inputs[1].const_value.numpy().copy())
    torch.testing.assert_close(doubled, net.conv.parametrizations.weight.original.detach() * 2)


def test_autocast_is_for_training():
    class Cast(Net):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    assert Cast()(frames()).shape == (N, COUT)
    with pytest.raises(UsageError, match="autocast is on"):
        trace(Cast(), SIZE)


@pytest.mark.parametrize("value", [-1, 3])
def test_an_action_is_one_of_three(value):
    """Values are known in eager mode only, through which the golden clip of every export goes."""
    with pytest.raises(UsageError, match=f"action holds {value}"):
        Net(action=whole(COUT, value=value))(frames())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_integers_of_any_width_are_actions(dtype):
    net = Net(action=whole(COUT, value=1, dtype=dtype))
    found = net(frames())
    net.given["action"] = whole(COUT, value=1)
    torch.testing.assert_close(found, net(frames()))
    net.given["action"] = whole(COUT, value=1, dtype=dtype)
    node = next(node for node in trace(net, SIZE).graph if node.op_type == "GatedConv")
    assert str(node.inputs[3].dtype) == "INT64"


def test_a_broken_promise():
    with pytest.raises(UsageError, match="active_in promises that channel 0 of frame 0 is zero"):
        Net(active_in=whole(CIN, value=0))(frames())
    kept = Net(read=lambda x: x * torch.tensor([1.0, 0, 1, 0])[:, None, None],
               active_in=lambda x: torch.tensor([1, 0, 1, 0]).expand(len(x), 4))  # fmt: skip
    assert kept(frames()).shape == (N, COUT)


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
def test_shapes_alone_suffice(mode):
    """Sizes are counted on tensors without numbers, of which none is looked at."""
    with mode():
        net = Net(bn=nn.BatchNorm2d(COUT), action=whole(COUT), tiles=whole(2, 2, value=0), active_in=whole(CIN))
        assert net(torch.zeros(N, 3, *SIZE)).shape == (N, COUT)
        assert tokens(torch.zeros(N, 3, *SIZE), keep=2)[1].shape == (N, 2)


def test_whole_numbers_of_tiles_are_truth():
    """A tile of 2 is active; it does not double what is computed."""
    net = Net(tiles=whole(2, 2, value=2))
    torch.testing.assert_close(net(frames()), Net.forward(changed(net, given={}), frames()))


@pytest.mark.parametrize("kind", ["action", "tiles"])
def test_a_gate_has_one_decision_of_a_kind(kind):
    class Two(Net):
        def forward(self, x):
            x = self.lift(x)
            mean = x.mean((2, 3))
            made = {
                "action": [(mean[:, i : i + 1] > 0).long().expand(-1, COUT) for i in (0, 1)],
                "tiles": [(mean >= i).reshape(-1, 2, 2) for i in (0, 1)],
            }[kind]
            return sum(gates.gated_conv(x, self.conv, gate="mine", **{kind: one}).mean((2, 3)) for one in made)

    with pytest.raises(TraceError, match=f"gate 'mine' has two decisions over {kind}"):
        trace(Two(), SIZE)


def test_a_mask_may_be_compared_twice():
    class Twice(Net):
        def forward(self, x):
            x = self.lift(x)
            tiles = (x.mean((2, 3)) >= 0).reshape(-1, 2, 2).long()
            layers = (self.conv, self.second)
            return sum(gates.gated_conv(x, layer, gate="mine", tiles=tiles).mean((2, 3)) for layer in layers)

    net = Twice()
    net.second = conv()

    assert [node.op_type for node in trace(net, SIZE).graph].count("GatedConv") == 2


OTHERS = {
    "delay of a number": (lambda x: gates.delay(x.mean(), name="d"), "delay needs a frame axis"),
    "delay without a name": (lambda x: gates.delay(x, name=""), "'' is no name"),
    "mean of planes": (lambda x: gates.frame_mean(x), r"frame_mean takes floats \[frames, K\]"),
    "mean of counts": (lambda x: gates.frame_mean(x.mean((2, 3)).long()), "not torch.int64"),
    "mean without a name": (lambda x: gates.frame_mean(x.mean((2, 3)), name="a b"), "'a b' is no name"),
    "fewer tokens": (lambda x: tokens(x, keep=9), "keeps 9 of 8 tokens"),
    "no token": (lambda x: tokens(x, keep=0), "keeps 0 of 8 tokens"),
    "half a token": (lambda x: tokens(x, keep=2.0), "keep is a float"),
    "tokens as truth": (lambda x: tokens(x, keep=True), "keep is a bool"),
    "tokens by a tensor": (lambda x: tokens(x, keep=torch.tensor(2)), "keep is a"),
    "scores of planes": (lambda x: gates.select_tokens(x, x[:, 0], 2, gate="t"), "tokens are"),
    "scores of fewer": (lambda x: gates.select_tokens(x[:, 0], x[:, 0, :4, 0], 2, gate="t"), "tokens are"),
    "scores of counts": (lambda x: gates.select_tokens(x[:, 0], x[:, 0, :, 0].long(), 2, gate="t"), "floating"),
    "selection without a name": (lambda x: gates.select_tokens(x[:, 0], x[:, 0, :, 0], 2, gate=""), "'' is no name"),
    "tiles of planes": (lambda x: gates.upsample_tiles(x, (16, 20)), "can't be upsampled"),
}


def tokens(x, keep):
    return gates.select_tokens(x[:, 0], x[:, 0, :, 0], keep, gate="t")


class Other(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, frames):
        found = self.call(frames)
        found = found[0] if isinstance(found, tuple) else found
        return found.flatten(1)


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_refuse(name):
    call, said = OTHERS[name]
    with pytest.raises(UsageError, match=said):
        call(frames())
    with pytest.raises(UsageError, match=said), patch("torch.compiler.is_exporting", lambda: True):
        call(frames())


@pytest.mark.parametrize("name", ["mean of planes", "fewer tokens"])
def test_other_functions_refuse_at_export(name):
    call, said = OTHERS[name]
    with pytest.raises(UsageError, match=said):
        trace(Other(call), SIZE)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_scores_are_finite(score):
    scores = torch.zeros(1, 4)
    scores[0, 2] = score
    with pytest.raises(UsageError, match="a score is NaN or infinite"):
        gates.select_tokens(torch.zeros(1, 4, 2), scores, 2, gate="t")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_states_have_few_types(dtype):
    said = f"a state is {dtype} when the model is exported"
    with pytest.raises(UsageError, match=said), patch("torch.compiler.is_exporting", lambda: True):
        gates.delay(frames().to(dtype), name="d")


def test_clips_are_whole():
    with gates.frames_per_clip(2), pytest.raises(UsageError, match="3 frames, which are no clips of 2"):
        gates.delay(frames(), name="d")
    with pytest.raises(UsageError, match="at least one frame"), gates.frames_per_clip(0):
        pass


@pytest.mark.parametrize("call", [gates.delay, lambda x, name: gates.frame_mean(x.mean((2, 3)), name=name)])
def test_an_artifact_runs_one_clip(call):
    said = "frames_per_clip is on when the model is exported"
    exporting = patch("torch.compiler.is_exporting", lambda: True)
    with pytest.raises(UsageError, match=said), gates.frames_per_clip(3), exporting:
        call(frames(), name="d")


@pytest.mark.parametrize(
    ("layer", "bn", "said"),
    [
        (nn.ConvTranspose2d(2, 3, 1), None, "conv is a ConvTranspose2d"),
        (OwnForward(2, 3, 1), None, "a forward of its own"),
        (nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), "no running statistics"),
        (nn.Conv2d(2, 3, 1), nn.BatchNorm2d(1), "running_mean"),
    ],
)
def test_what_folds_is_checked(layer, bn, said):
    with pytest.raises(UsageError, match=said):
        gates.fold_batch_norm(layer, bn)


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "reflect", "padding": 1}])
def test_norms_fold_into_any_convolution(options):
    """Where no gate is: the batch norm comes after the sum."""
    layer, bn = nn.Conv2d(4, 6, 3, **options), nn.BatchNorm2d(6, affine=False).eval()
    bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 5, 5)
    expected = bn(layer(x))
    weight, bias = gates.fold_batch_norm(layer, bn)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    torch.testing.assert_close(layer(x), expected)
