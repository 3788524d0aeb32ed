"""AdaFuse, D-STEP and TSM written a second time, frame by frame from their equations.

Plain torch functions over a state_dict: no module, no gate function of dvexport is used, so that
the package can be compared with it.
"""

import torch
import torch.nn.functional as F

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
TILE = {1: 8, 2: 4, 3: 2, 4: 1}


def randomize_norms(model, seed=0):
    """Batch norms that do something: a skipped channel must be 0 in spite of its bias."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        elif name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif ".bn" in name and name.endswith("bias"):
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))


def conv(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)


def norm(state, name, x):
    s = [state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *s)


def shifted(frames, kind, div):
    """Apply TSM to a list of maps [1, C, H, W]."""
    fold = frames[0].shape[1] // div
    zero = torch.zeros_like(frames[0])
    out = []
    for t, frame in enumerate(frames):
        frame = frame.clone()
        past = frames[t - 1] if t > 0 else zero
        future = frames[t + 1] if t + 1 < len(frames) else zero
        if kind == "online":
            frame[:, :fold] = past[:, :fold]
        elif kind == "bidirectional":
            frame[:, :fold] = future[:, :fold]
            frame[:, fold : 2 * fold] = past[:, fold : 2 * fold]
        out.append(frame)
    return out


def tile_mask(state, block, x, stage, stride):
    size = [(n - 1) // stride + 1 for n in x.shape[2:]]
    grid = [-(-n // TILE[stage]) for n in size]
    logit = conv(state, f"{block}.gates.mask.conv", F.adaptive_avg_pool2d(x, grid))
    return (logit >= 0).float()


def spread(mask, size):
    """Nearest: pixel y reads cell floor(y * cells / pixels)."""
    rows = [y * mask.shape[2] // size[0] for y in range(size[0])]
    columns = [x * mask.shape[3] // size[1] for x in range(size[1])]
    return mask[:, :, rows][:, :, :, columns]


def actions(state, block, pooled, previous, config):
    """Action names of each channel of one frame."""
    v = torch.cat([previous, pooled], 1) if config.history else pooled
    v = F.linear(v, state[f"{block}.gates.policy.fc0.weight"], state[f"{block}.gates.policy.fc0.bias"])
    if config.gate_bn:
        v = norm(state, f"{block}.gates.policy.bn", v)
    if config.gate_relu:
        v = F.relu(v)
    v = F.linear(v, state[f"{block}.gates.policy.fc1.weight"], state[f"{block}.gates.policy.fc1.bias"])[0]
    words = ["skip", "reuse", "keep"]
    if not config.history:
        words = ["skip", "keep"]
    elif not config.skipping:
        words = ["reuse", "keep"]
    return [words[int(v[c * len(words) : (c + 1) * len(words)].argmax())] for c in range(len(v) // len(words))]


def residual_block(state, block, xs, stage, stride, config):
    identities = xs
    moved = shifted(xs, config.shift, config.shift_div)
    if config.shift_place != "conv1":
        xs = moved
    if config.shift_place == "in_place":
        identities = moved
    if f"{block}.downsample.0.weight" in state:
        reduced = [conv(state, f"{block}.downsample.0", x, stride) for x in xs]
        identities = [norm(state, f"{block}.downsample.1", x) for x in reduced]
    bottleneck = f"{block}.conv3.weight" in state
    first_stride, second_stride = (1, stride) if bottleneck else (stride, 1)
    vs = [F.relu(norm(state, f"{block}.bn1", conv(state, f"{block}.conv1", m, first_stride))) for m in moved]
    outputs, pooled_before = [], None
    for t, (x, v, identity) in enumerate(zip(xs, vs, identities, strict=True)):
        mask = None
        if f"{block}.gates.mask.conv.weight" in state:
            mask = tile_mask(state, block, x, stage, stride)
        u = v
        if f"{block}.gates.policy.fc0.weight" in state:
            seen = x * spread(mask, x.shape[2:]) if mask is not None and config.semantics == "paper" else x
            pooled = seen.mean((2, 3)) if config.gate_pool == "mean" else seen.flatten(2).max(2).values
            before = torch.zeros_like(pooled) if pooled_before is None else pooled_before
            chosen = actions(state, block, pooled, before, config)
            pooled_before = pooled
            u = torch.zeros_like(v)
            for c, word in enumerate(chosen):
                if word == "keep":
                    u[:, c] = v[:, c]
                elif word == "reuse" and t > 0:
                    u[:, c] = vs[t - 1][:, c]
        if mask is not None:
            u = u * spread(mask, u.shape[2:])
        z = norm(state, f"{block}.bn2", conv(state, f"{block}.conv2", u, second_stride))
        if bottleneck:
            z = norm(state, f"{block}.bn3", conv(state, f"{block}.conv3", F.relu(z)))
        if mask is not None:
            z = z * spread(mask, z.shape[2:])
        outputs.append(F.relu(identity + z))
    return outputs


def resnet(state, frames, config):
    """Per-frame logits of a clip."""
    xs = [F.relu(norm(state, "bn1", F.conv2d(f[None], state["conv1.weight"], None, 2, 3))) for f in frames]
    xs = [F.max_pool2d(x, 3, 2, 1) for x in xs]
    for stage in range(1, 5):
        for i in range(BLOCKS[config.depth][stage - 1]):
            stride = 2 if stage > 1 and i == 0 else 1
            xs = residual_block(state, f"layer{stage}.{i}", xs, stage, stride, config)
    return torch.cat([F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"]) for x in xs])


SHIFTED = (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)
"""MobileNetV2's blocks with a skip connection that expand their input."""


def conv_norm(state, name, k, x, stride=1, groups=1):
    weight = state[f"{name}.{k}.weight"]
    x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
    return norm(state, f"{name}.{k + 1}", x)


def inverted_residual(state, i, x, shifted_x):
    name, stride = f"features.{i}.conv", 2 if i in (2, 4, 7, 14) else 1
    z, k = shifted_x, 0
    if i > 1:
        z, k = F.relu6(conv_norm(state, name, 0, z)), 3
    z = F.relu6(conv_norm(state, name, k, z, stride, z.shape[1]))
    z = conv_norm(state, name, k + 3, z)
    return x + z if x.shape == z.shape else z


def mobilenet_head(state, x):
    x = F.relu6(conv_norm(state, "features.18", 0, x))
    return F.linear(x.mean((2, 3)), state["classifier.weight"], state["classifier.bias"])


def mobilenet_online_step(state, x, buffers):
    """One step of the online demo: buffers hold the first eighth of each shifted block's last input."""
    x = F.relu6(conv_norm(state, "features.0", 0, x, 2))
    kept = []
    for i in range(1, 18):
        y = x
        if i in SHIFTED:
            fold = x.shape[1] // 8
            y = torch.cat([buffers[len(kept)] if buffers else torch.zeros_like(x[:, :fold]), x[:, fold:]], 1)
            kept.append(x[:, :fold])
        x = inverted_residual(state, i, x, y)
    return mobilenet_head(state, x), kept


def mobilenet_offline(state, frames):
    """Per-frame logits of a clip under the bidirectional shift."""
    xs = [F.relu6(conv_norm(state, "features.0", 0, f[None], 2)) for f in frames]
    for i in range(1, 18):
        ys = shifted(xs, "bidirectional" if i in SHIFTED else "none", 8)
        xs = [inverted_residual(state, i, x, y) for x, y in zip(xs, ys, strict=True)]
    return torch.cat([mobilenet_head(state, x) for x in xs])
