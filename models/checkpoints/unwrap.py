"""Where the weights are in what training code saved: under which key, and behind which prefix of their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvexport.errors import CheckpointError, UsageError

__all__ = ["Unwrapped", "unwrap"]

_KEYS = ("state_dict", "model_state", "model_state_dict", "model", "module", "net", "weights")
"""Keys under which training code puts the weights, in the order they are tried."""

_WRAPPER = re.compile(r"(?:module|_orig_mod|ema_model|averaged_model|model|net|network)\.")
"""What wrappers put before each name: DataParallel, torch.compile, averages, Lightning."""

_DEEPEST = 4
"""Dictionaries inside each other that are searched for weights."""


@dataclass(frozen=True)
class Unwrapped:
    """The weights of a file, and how they were found.

    Attributes:
        state: tensors by name, without the prefix.
        key: where they stand, as `a.b`; empty for the file as a whole.
        prefix: what every name began with and was taken off.
        others: what else the file holds, by key: its kind in a word or two.
    """

    state: dict[str, Any]
    key: str = ""
    prefix: str = ""
    others: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return what was done to get at the weights, a sentence each."""
        said = [f"the weights are those under '{self.key}'"] if self.key else []
        return said + ([f"'{self.prefix}' was taken off every name"] if self.prefix else [])


def unwrap(path: Path, content: Any, wanted: str | None = None) -> Unwrapped:
    """Return the weights inside what training code saved around them.

    Args:
        path: for messages.
        content: what the file holds.
        wanted: the key to take, `a.b` for one inside another; by default the usual ones are tried.

    Raises:
        CheckpointError: it holds no weights, or two sets of them and nothing tells which is meant.
        UsageError: nothing stands under `wanted`.
    """
    key, state = _usual(path, content) if wanted is None else _chosen(path, content, wanted)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            "the checkpoint holds no weights",
            where=str(path),
            why=f"it holds a {_kind(state)}, not a state_dict",
        )
    state = {name: value for name, value in state.items() if not isinstance(name, str) or not _is_version(name)}
    prefix = _prefix(state)
    top = content if isinstance(content, Mapping) and key else {}
    others = {str(name): _kind(value) for name, value in top.items() if name != key.partition(".")[0]}
    plain = {name[len(prefix) :]: value for name, value in state.items()} if prefix else dict(state)
    return Unwrapped(plain, key, prefix, others)


def _usual(path: Path, content: Any) -> tuple[str, Any]:
    keys: list[str] = []
    for _ in range(_DEEPEST):
        found = next((k for k in _KEYS if isinstance(content, Mapping) and isinstance(content.get(k), Mapping)), None)
        if found is None:
            break
        _check_alone(path, [*keys, found], content)
        keys.append(found)
        content = content[found]
    return ".".join(keys), content


def _chosen(path: Path, content: Any, wanted: str) -> tuple[str, Any]:
    found = content
    for part in wanted.split("."):
        if not isinstance(found, Mapping) or not isinstance(found.get(part), Mapping):
            known = list(_sets(content))
            raise UsageError(
                f"the checkpoint holds no weights under '{wanted}'",
                where=str(path),
                why=f"those that it has are under {', '.join(known)}" if known else "it holds one set, without a key",
                hint=f"--weights-key {known[0]}" if known else "leave out --weights-key",
            )
        found = found[part]
    return wanted, found


def _sets(content: Any, inside: str = "", depth: int = 0) -> Iterator[str]:
    """Yield the keys of the dictionaries that hold tensors."""
    for name, value in content.items() if isinstance(content, Mapping) and depth < _DEEPEST else ():
        if isinstance(value, Mapping) and isinstance(name, str):
            if any(hasattr(each, "dtype") for each in value.values()):
                yield f"{inside}{name}"
            yield from _sets(value, f"{inside}{name}.", depth + 1)


def _check_alone(path: Path, keys: list[str], content: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a second set of the same weights lies beside the one found, such as an average."""
    names = {_plain(name) for name in content[keys[-1]] if isinstance(name, str)}
    for other, value in content.items():
        if other == keys[-1] or not isinstance(value, Mapping):
            continue
        shared = [name for name in value if isinstance(name, str) and _plain(name) in names]
        if 2 * len(shared) > len(names):
            choices = [".".join([*keys[:-1], str(one)]) for one in (keys[-1], other)]
            raise CheckpointError(
                "the checkpoint holds two sets of weights, and nothing tells which is meant",
                where=str(path),
                why=f"{keys[-1]} and {other} have the same keys",
                hint=f"--weights-key {choices[0]}, or --weights-key {choices[1]} (weights_key= in Python)",
            )


def _plain(name: str) -> str:
    while match := _WRAPPER.match(name):
        name = name[match.end() :]
    return name


def _prefix(state: Mapping[Any, Any]) -> str:
    """Return the longest prefix of wrappers that every name begins with."""
    if not all(isinstance(name, str) for name in state):
        return ""
    found = ""
    while match := _WRAPPER.match(next(iter(state), "")[len(found) :]):
        longer = found + match[0]
        if not all(name.startswith(longer) for name in state):
            break
        found = longer
    return found


def _is_version(name: str) -> bool:
    """Tell torch's own notes in a state_dict, and the counter of averaged models, from weights."""
    return name in ("_metadata", "n_averaged")


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        tensors = sum(hasattr(each, "dtype") for each in value.values())
        return f"dictionary of {len(value)}" + (f", {tensors} of them tensors" if tensors else "")
    return getattr(value, "skipped", "") or type(value).__name__
