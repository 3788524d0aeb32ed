"""STA written a second time, literally and in loops, from the description of its algorithm.

Nothing here is shared with dvexport.models.sta: scalars and lists, one clip, one token at a time.
"""

import math


def cosine(a, b):
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(p * p for p in a)) * math.sqrt(sum(q * q for q in b)))


def drop(tokens, keys, groups, r, reverse):
    """Return the places (in `tokens`) of the survivors: groups in the order of time, each by ascending score."""
    size = len(tokens) // groups
    order = list(range(groups))
    if reverse:
        order.reverse()
    survivors = {}
    attention = previous = None
    for position, group in enumerate(order):
        members = list(range(group * size, (group + 1) * size))
        if position == 0:
            survivors[group] = first_group(members, keys, r)
            # All tokens of the first group pass their attention of 1 on, those dropped too.
            previous, attention = members, [1.0] * size
            continue
        received = [0.0] * size
        for before, mass in zip(previous, attention, strict=True):
            logits = [cosine(keys[now], keys[before]) for now in members]
            whole = sum(math.exp(v) for v in logits)
            for i, logit in enumerate(logits):
                received[i] += mass * math.exp(logit) / whole
        strength = [sum(abs(v) for v in tokens[now]) for now in members]
        low, high = min(strength), max(strength)
        semantic = [(s - low) / (high - low) if high > low else 0.0 for s in strength]
        score = [a * (1 - f) for a, f in zip(received, semantic, strict=True)]
        ranked = sorted(range(size), key=lambda i: (score[i], i))[: size - r]
        survivors[group] = [members[i] for i in ranked]
        previous = survivors[group]
        whole = sum(received[i] for i in ranked)
        attention = [received[i] / whole for i in ranked]
    return [place for group in range(groups) for place in survivors[group]]


def first_group(members, keys, r):
    """Odd tokens in their order, then even ones by how much they resemble an odd one; the last r are dropped."""
    even, odd = members[0::2], members[1::2]
    nearest = [max(cosine(keys[e], keys[o]) for o in odd) for e in even]
    ranked = sorted(range(len(even)), key=lambda i: (nearest[i], i))
    order = odd + [even[i] for i in ranked]
    return order[: len(order) - r]
