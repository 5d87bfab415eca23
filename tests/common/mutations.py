"""Seeded damage to the files that an adapter and a warm-up write."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def flip_bits(data: bytearray, random: Random) -> None:
    for _ in range(random.choice((1, 1, 1, 3, 20))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def cut(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data)) :]


def lose_a_block(data: bytearray, random: Random) -> None:
    start = random.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))


def append(data: bytearray, random: Random) -> None:
    data += random.randbytes(random.choice((1, 8, 64)))


def remove_bytes(data: bytearray, random: Random) -> None:
    start = random.randrange(len(data))
    del data[start : start + random.choice((1, 8))]


BYTES = (flip_bits, flip_bits, flip_bits, cut, lose_a_block, append, remove_bytes)
JUNK = (
    None,
    True,
    False,
    -1,
    0,
    2,
    0.5,
    1e400,
    float("nan"),
    "x",
    "(",
    "",
    [],
    ["x"],
    [0],
    [[]],
    {},
    {"x": 1},
    [3, 4],
)


def mutate_bytes(path: Path, random: Random) -> str:
    data, change = bytearray(path.read_bytes()), random.choice(BYTES)
    change(data, random)
    path.write_bytes(data)
    return change.__name__


def _missing(tensors, name, random):
    del tensors[name]


def _extra(tensors, name, random):
    tensors[name.replace(".0.", ".7.", 1) if ".0." in name else f"{name}x"] = tensors[name].clone()


def _renamed(tensors, name, random):
    tensors[f"{name[:-1]}{random.choice('abcz')}"] = tensors.pop(name)


def _dtype(tensors, name, random):
    others = (torch.int32, torch.int64, torch.uint8, torch.bool, torch.float64, torch.complex64)
    tensors[name] = tensors[name].to(random.choice([each for each in others if each != tensors[name].dtype]))


def _shape(tensors, name, random):
    tensor = tensors[name]
    shapes = [tensor[None], tensor[..., :1], tensor[:1], torch.cat([tensor, tensor[:1]]), tensor[:0], tensor[0]]
    tensors[name] = random.choice(
        [each for each in shapes if each.shape != tensor.shape] + [tensor.T] * (tensor.ndim > 1)
    )


def _not_finite(tensors, name, random):
    floats = [each for each, tensor in tensors.items() if tensor.is_floating_point()]
    flat = tensors[random.choice(floats)].view(-1)
    flat[random.randrange(len(flat))] = random.choice((torch.nan, torch.inf, -torch.inf))


def _bits(tensors, name, random):
    supports = [each for each, tensor in tensors.items() if tensor.dtype == torch.uint8]
    if supports:
        packed = tensors[random.choice(supports)]
        packed[random.randrange(len(packed))] ^= 1 << random.randrange(8)
    else:
        _not_finite(tensors, name, random)


def _numbers(tensors, name, random):
    """Not of steps: any count from 0 on is right."""
    whole = (torch.int32, torch.int64)
    names = [each for each, tensor in tensors.items() if tensor.dtype in whole and not each.endswith("steps")]
    if names:
        tensors[random.choice(names)].view(-1)[0] += random.choice((-1000, -1, 1, 7, 1000))
    else:
        _shape(tensors, name, random)


def _lost_column(tensors, name, random):
    bases = [each for each in tensors if each.endswith((".U", ".V"))]
    if bases:
        basis = tensors[random.choice(bases)]
        basis[:, random.randrange(basis.shape[1])] = 0 if random.random() < 0.5 else basis[:, 0] * 2
    else:
        _missing(tensors, name, random)


# Damage that shows in the tensors themselves, and damage that only the checksum shows.
VISIBLE = (_missing, _extra, _renamed, _dtype, _shape, _not_finite, _bits, _numbers, _lost_column)


def _zeros(tensors, name, random):
    tensors[name] = torch.zeros_like(tensors[name])


def _swapped(tensors, name, random):
    same = [each for each, tensor in tensors.items() if tensor.shape == tensors[name].shape and each != name]
    if same:
        other = random.choice(same)
        tensors[name], tensors[other] = tensors[other], tensors[name]


HIDDEN = (_zeros, _swapped)


def mutate_tensors(path: Path, random: Random, keep_checksum: bool) -> str:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
        metadata = file.metadata()
    change = random.choice(VISIBLE + (HIDDEN if keep_checksum else ()))
    change(tensors, random.choice(sorted(tensors)), random)
    if not keep_checksum:
        metadata.pop("peft_sparsegrad.crc32")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return change.__name__


def mutate_json(settings: dict, random: Random) -> str:
    """Change one entry, of the dictionary or of one within it."""
    while True:
        key = random.choice(sorted(settings))
        if not isinstance(settings[key], dict) or not settings[key] or random.random() < 0.3:
            break
        settings = settings[key]
    kind = random.choice(("remove", "replace", "replace", "replace", "rename"))
    value = settings.pop(key)
    if kind == "replace":
        settings[key] = random.choice([junk for junk in JUNK if junk != value])
    elif kind == "rename":
        settings[f"{key}x"] = value
    return f"{kind} {key}: {settings.get(key)!r}"


def mutate_config(path: Path, random: Random) -> str:
    if random.random() < 0.3:
        return mutate_bytes(path, random)
    settings = json.loads(path.read_text())
    method = settings.pop("peft_type")  # with another one the settings are not ours to check
    what = mutate_json(settings, random)
    path.write_text(json.dumps({**settings, "peft_type": method}))
    return what


def mutate_contents(path: Path, random: Random) -> str:
    """Change the metadata of a file of transition matrices."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if random.random() < 0.2:
        metadata[random.choice(("version", "format", "contents"))] = random.choice(("", "x", "2", "-1", "[]", "{}"))
        what = "metadata"
    else:
        contents = json.loads(metadata["contents"])
        what = mutate_json(contents, random)
        metadata["contents"] = json.dumps(contents)
    save_file(tensors, path, metadata)
    return what
