"""How the suite `fuzz` changes a good file: its bytes, its values, and what its format consists of.

Every function takes the content of a file and a generator of random numbers, and returns what the case contains.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, Final

__all__ = [
    "change_archive",
    "change_bytes",
    "change_json",
    "change_lines",
    "change_onnx",
    "change_safetensors",
    "messages",
    "places",
]

#: Values that readers expect least.
ODD_VALUES: Final[tuple[Any, ...]] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    1e308,
    float("nan"),
    "",
    "x" * 100_000,
    "\x1b[2J",
    "\ud800",
    "$\\frac{$",
    "../../etc/passwd",
    "/dev/zero",
    "a\0b",
    [],
    [[2]],
    {},
    {"a": {}},
    [None] * 3,
    "4",
    "true",
    "é",
)

ODD_BYTES: Final = (
    b"\xff\xfe",
    b"\0",
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b"9" * 5000,
    b"\x1b[31m",
    b"null",
    b"-1",
    b"NaN",
    b"1e999",
    b'"',
    b"\n",
    b"]",
    b"}",
    b"$",
    b"%s",
    b"PK\x03\x04",
    b"\x80\x04",
    b"x" * 100_000,
)


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change a few places: bits, numbers, pieces, lengths."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 8, 64, 1024)))
        match rng.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:at] = rng.choice(ODD_BYTES)
            case 4:
                data[at:end] = rng.randbytes(end - at)
            case 5:
                data[at : at + 8] = struct.pack("<q", rng.choice((-1, 0, 1, 2**31, 2**62, -(2**63))))
            case 6:
                del data[at:]
            case _:
                data[at:end] = rng.choice(ODD_BYTES)
    return bytes(data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value if isinstance(value, dict) else range(len(value))):
            yield value, key
            yield from places(value[key])


def _change_value(value: Any, rng: random.Random) -> Any:
    """Replace, remove, rename or nest values."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        found = list(places(value))
        if not found:
            return rng.choice(ODD_VALUES)
        container, key = rng.choice(found)
        match rng.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[str(rng.choice(ODD_VALUES))[:1000]] = container.pop(key)
            case 2:
                container[key] = [container[key]]
            case 3:
                other, place = rng.choice(found)
                with contextlib.suppress(LookupError):  # an earlier change has removed the place
                    container[key] = copy.deepcopy(other[place])
            case _:
                container[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Change bytes, or values of the JSON text."""
    if rng.random() < 0.4:
        return change_bytes(content, rng)
    return json.dumps(_change_value(json.loads(content), rng)).encode()


def change_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change bytes, or values of the header, whose size stays right."""
    if rng.random() < 0.4:
        return change_bytes(content, rng)
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(_change_value(json.loads(content[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def change_archive(content: bytes, rng: random.Random) -> bytes:
    """Change members of an archive, whose sums stay right, or the archive itself."""
    if rng.random() < 0.3:
        return change_bytes(content, rng)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        hit = rng.choice([name for name in names if "data.pkl" in name] or names) if rng.random() < 0.7 else None
        for name in names:
            data = old.read(name)
            if name == hit or (hit is None and rng.random() < 0.3):
                head = data[:256] if rng.random() < 0.5 else data
                data = change_bytes(head, rng) + data[len(head) :]
            if rng.random() < 0.03:
                continue
            new.writestr(
                name if rng.random() > 0.05 else str(rng.choice(ODD_VALUES)).replace("\ud800", "x")[:1000] or "x", data
            )
    return made.getvalue()


def messages(message: Any) -> Iterator[Any]:
    """A protobuf message and every message in it."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for item in value if field.is_repeated else (value,):
                yield from messages(item)


def _set_field(message: Any, rng: random.Random) -> None:
    """Change one field of a protobuf message to a value of its type."""
    fields = message.ListFields() if rng.random() < 0.8 else []
    field = rng.choice(fields)[0] if fields else rng.choice(message.DESCRIPTOR.fields)
    if rng.random() < 0.25:
        message.ClearField(field.name)
        return
    if field.type == field.TYPE_MESSAGE:
        if field.is_repeated:
            items = getattr(message, field.name)
            items.append(copy.deepcopy(rng.choice(items))) if len(items) else items.add()
        else:
            getattr(message, field.name).SetInParent()
        return
    odd: tuple[Any, ...] = (-1, 0, 1, 2, 7, 10, 16, 23, 999, 2**31 - 1)
    if field.type == field.TYPE_STRING:
        odd = tuple(x for x in ODD_VALUES if isinstance(x, str) and x != "\ud800")
    elif field.type == field.TYPE_BYTES:
        odd = (*ODD_BYTES[:6], b"")
    with contextlib.suppress(ValueError, TypeError):  # not a value of this enum
        if field.is_repeated:
            items = getattr(message, field.name)
            items.append(rng.choice(odd)) if not len(items) or rng.random() < 0.3 else items.__setitem__(
                rng.randrange(len(items)), rng.choice(odd)
            )
        else:
            setattr(message, field.name, rng.choice(odd))


def change_onnx(content: bytes, rng: random.Random) -> bytes:
    """Change bytes, entries of the metadata, or fields of the messages."""
    if rng.random() < 0.3:
        return change_bytes(content, rng)
    import onnx

    model = onnx.load_model_from_string(content)
    if rng.random() < 0.25:
        entry = rng.choice(model.metadata_props)
        entry.value = change_json(entry.value.encode(), rng).decode(errors="replace")
    for _ in range(rng.choice((1, 1, 2, 4))):
        _set_field(rng.choice(list(messages(model))), rng)
    return model.SerializeToString()


def change_lines(content: bytes, rng: random.Random) -> bytes:
    """Change bytes, or one value of a TOML or YAML file."""
    if rng.random() < 0.5:
        return change_bytes(content, rng)
    lines = content.decode().splitlines()
    at, sign = rng.choice([(n, sign) for n, line in enumerate(lines) for sign in "=:" if sign in line])
    odd = json.dumps(rng.choice([x for x in ODD_VALUES if x is not None]))
    lines[at] = f"{lines[at].partition(sign)[0]}{sign} {odd}"
    return "\n".join(lines).encode()
