"""The process of the suite `fuzz`: it makes a case from its number, gives it to a reader, and reports what happened."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import resource
import signal
import struct
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

__all__ = ["READERS", "make_corpus", "run_case"]

#: Seconds of processor time after which a case counts as a hang.
CASE_S: Final = 30.0

#: Values that readers expect least.
_ODD: Final[tuple[Any, ...]] = (
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

_ODD_BYTES: Final = (
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


def _mutate_bytes(content: bytes, rng: random.Random) -> bytes:
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
                data[at:at] = rng.choice(_ODD_BYTES)
            case 4:
                data[at:end] = rng.randbytes(end - at)
            case 5:
                data[at : at + 8] = struct.pack("<q", rng.choice((-1, 0, 1, 2**31, 2**62, -(2**63))))
            case 6:
                del data[at:]
            case _:
                data[at:end] = rng.choice(_ODD_BYTES)
    return bytes(data)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value if isinstance(value, dict) else range(len(value))):
            yield value, key
            yield from _places(value[key])


def _mutate_json(value: Any, rng: random.Random) -> Any:
    """Replace, remove, rename or nest values."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(_places(value))
        if not places:
            return rng.choice(_ODD)
        container, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[str(rng.choice(_ODD))[:1000]] = container.pop(key)
            case 2:
                container[key] = [container[key]]
            case 3:
                other, place = rng.choice(places)
                with contextlib.suppress(LookupError):  # an earlier change has removed the place
                    container[key] = copy.deepcopy(other[place])
            case _:
                container[key] = copy.deepcopy(rng.choice(_ODD))
    return value


def _json_case(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return _mutate_bytes(content, rng)
    return json.dumps(_mutate_json(json.loads(content), rng)).encode()


def _safetensors_case(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return _mutate_bytes(content, rng)
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(_mutate_json(json.loads(content[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _zip_case(content: bytes, rng: random.Random) -> bytes:
    """Change members of an archive, whose sums stay right, or the archive itself."""
    if rng.random() < 0.3:
        return _mutate_bytes(content, rng)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        hit = rng.choice([name for name in names if "data.pkl" in name] or names) if rng.random() < 0.7 else None
        for name in names:
            data = old.read(name)
            if name == hit or (hit is None and rng.random() < 0.3):
                head = data[:256] if rng.random() < 0.5 else data
                data = _mutate_bytes(head, rng) + data[len(head) :]
            if rng.random() < 0.03:
                continue
            new.writestr(
                name if rng.random() > 0.05 else str(rng.choice(_ODD)).replace("\ud800", "x")[:1000] or "x", data
            )
    return made.getvalue()


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for item in value if field.is_repeated else (value,):
                yield from _messages(item)


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
        odd = tuple(x for x in _ODD if isinstance(x, str) and x != "\ud800")
    elif field.type == field.TYPE_BYTES:
        odd = (*_ODD_BYTES[:6], b"")
    with contextlib.suppress(ValueError, TypeError):  # not a value of this enum
        if field.is_repeated:
            items = getattr(message, field.name)
            items.append(rng.choice(odd)) if not len(items) or rng.random() < 0.3 else items.__setitem__(
                rng.randrange(len(items)), rng.choice(odd)
            )
        else:
            setattr(message, field.name, rng.choice(odd))


def _onnx_case(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return _mutate_bytes(content, rng)
    import onnx

    model = onnx.load_model_from_string(content)
    if rng.random() < 0.25:
        entry = rng.choice(model.metadata_props)
        entry.value = _json_case(entry.value.encode(), rng).decode(errors="replace")
    for _ in range(rng.choice((1, 1, 2, 4))):
        _set_field(rng.choice(list(_messages(model))), rng)
    return model.SerializeToString()


def _text_case(content: bytes, rng: random.Random) -> bytes:
    """Change bytes, or one value of a TOML file."""
    if rng.random() < 0.5:
        return _mutate_bytes(content, rng)
    lines = content.decode().splitlines()
    at = rng.choice([index for index, line in enumerate(lines) if "=" in line])
    odd = json.dumps(rng.choice([x for x in _ODD if x is not None]))
    lines[at] = f"{lines[at].partition('=')[0]}= {odd}"
    return "\n".join(lines).encode()


#: Where each reader's file is in the corpus, and how it is changed.
READERS: Final[dict[str, tuple[str, Callable[[bytes, random.Random], bytes]]]] = {
    "onnx": ("m.onnx", _onnx_case),
    "safetensors": ("checkpoint/model.safetensors", _safetensors_case),
    "config": ("checkpoint/config.json", _json_case),
    "index": ("sharded/model.safetensors.index.json", _json_case),
    "pt": ("m.pt", _zip_case),
    "npz": ("in.npz", _zip_case),
    "npy": ("labels.npy", _mutate_bytes),
    "manifest": ("repository/manifest.json", _json_case),
    "tokenizer": ("tokenizer/tokenizer.json", _json_case),
    "tokenizer_config": ("tokenizer/tokenizer_config.json", _json_case),
    "generation_config": ("tokenizer/generation_config.json", _json_case),
    "genai_config": ("tokenizer/genai_config.json", _json_case),
    "baseline": ("baseline.json", _json_case),
    "plan_description": ("m.plan.json", _json_case),
    "check": ("check.toml", _text_case),
}


def make_corpus(folder: Path) -> None:
    """Write one good file for each reader."""
    import numpy as np
    import torch

    from ibnorm_export import IBNormSpec, models
    from ibnorm_export.artifacts.manifest import write_manifest
    from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
    from ibnorm_export.benchmark.baseline import Baseline, write_baseline
    from ibnorm_export.exporter.export import export
    from tests.support.checkpoints import VIT, save_checkpoint

    checkpoint = save_checkpoint(folder / "checkpoint", VIT, IBNormSpec("T", 3.0))
    model = models.load(checkpoint)
    export(model, folder / "m.onnx")
    (folder / "sharded").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "sharded" / name.replace("model.", "part.")).write_bytes((checkpoint / name).read_bytes())
    weights = dict.fromkeys(model.module.state_dict(), "part.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    state = {"model": model.module.state_dict(), "args": {"lr": 0.1, "steps": [1, 2]}, "epoch": 3}
    torch.save(state, folder / "m.pt")
    inputs = model.sample(np.random.default_rng(0), 0)
    np.savez(folder / "in.npz", **inputs)  # type: ignore[arg-type]  # the stub takes a name for allow_pickle
    np.save(folder / "labels.npy", np.arange(5))
    (folder / "repository").mkdir()
    (folder / "repository" / "a.txt").write_text("a")
    write_manifest(folder / "repository", {}, content={"models": ["m"]})
    (folder / "tokenizer").mkdir()
    write_byte_tokenizer(folder / "tokenizer")
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    config |= {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "top_p": 0.9}))
    genai = {"model": {"eos_token_id": 1, "decoder": {"session_options": {"custom_ops_library": "x.so"}}}}
    (folder / "tokenizer" / "genai_config.json").write_text(json.dumps(genai))
    baseline = Baseline(
        "m.onnx",
        "ort-cpu",
        inputs={"x": [1, 2]},
        threads=1,
        times_ms=(1.0, 1.1),
        reference_ms=(1.0, 1.0),
        environment={"processor": "p", "packages": {"onnxruntime": "1"}},
        precision="fp32",
        kernels="fused",
    )
    write_baseline(baseline, folder / "baseline.json")
    described = {
        "format": 1,
        "source": "m.onnx",
        "source_sha256": "0",
        "runtime": "tensorrt",
        "runtime_version": "10",
        "ibnorm_export": "0",
        "gpu": None,
        "compute_capabilities": ["sm_89"],
        "norm": "function",
        "why": "",
        "build_s": 1.0,
        "profiles": [
            {"name": "p", "ranges": [{"axis": "batch", "smallest": 1, "optimal": 1, "largest": 2, "profile": ""}]}
        ],
        "norms": [{"module": "m", "op_type": "IBNormL", "realised": "fused", "kernels": ["k"]}],
        "size_bytes": 1,
        "sha256": "0",
    }
    (folder / "m.plan.json").write_text(json.dumps(described))
    (folder / "m.plan").touch()
    (folder / "check.toml").write_text(
        'format = 1\nresults = "r"\n[[export]]\nname = "a"\ncheckpoint = "c"\ndtype = "fp16"\n[export.parity]\n'
        'backends = ["ort-cpu"]\nsamples = 4\nmax_error = 1e-5\n[[export.latency]]\nmax_ms = 5.0\nthreads = 1\n'
        'batch = 1\nrounds = 20\n[[export.latency]]\nbaseline = "b.json"\nallow = ["runtime"]\nmax_ratio = 1.05\n'
    )


def _run_command(*words: object) -> bool:
    """Run a command in this process, and return whether it succeeded; exit code 70 and tracebacks are failures."""
    from ibnorm_export.cli import main

    sys.argv = ["ibnorm-export", *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main()
    text = out.getvalue() + err.getvalue()
    if code not in (0, 1, 2, 3) or "Traceback" in text:
        raise RuntimeError(f"exit code {code}: {text[:300]}")
    if "\x1b[2J" in text or len(err.getvalue()) > 10_000:
        raise RuntimeError(f"the message is not fit to print: {text[:300]!r}")
    return code == 0


def _read(reader: str, file: Path, corpus: Path) -> bool:
    """Give a file to its reader. It is called on the file as a command would be, or as the library does."""
    from ibnorm_export.analysis.batches import read_labels
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.input_files import read_arrays
    from ibnorm_export.artifacts.kv_cache import input_specs
    from ibnorm_export.artifacts.manifest import check_files, read_manifest
    from ibnorm_export.artifacts.tokenizer import FolderTokenizer, end_tokens
    from ibnorm_export.gate.config import read_check_config
    from ibnorm_export.models.containers.reading import read_checkpoint
    from ibnorm_export.runtimes.tensorrt.description import read_description
    from ibnorm_export.serving.text.chat_template import read_template

    folder = file.parent
    match reader:
        case "onnx":
            return _run_command("inspect", file) and _run_command("inspect", file, "--json")
        case "safetensors" | "config" | "index":
            return _run_command("inspect", folder)
        case "baseline":
            return _run_command("compare", corpus / "baseline.json", file)
        case "pt":
            read_checkpoint(file)
        case "npz":
            read_arrays(file, input_specs(ExportedModel(corpus / "m.onnx")))
        case "npy":
            read_labels(file)
        case "manifest":
            check_files(folder, read_manifest(folder))
        case "tokenizer":
            FolderTokenizer(folder, 300).encode("a text")
        case "tokenizer_config":
            read_template(folder)
        case "generation_config" | "genai_config":
            end_tokens(folder)
        case "plan_description":
            read_description(file.with_name("m.plan"))
        case "check":
            read_check_config(file)
    return True


def _where(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]


def run_case(reader: str, case: int, *, corpus: Path) -> dict[str, Any]:
    """Make a case from its number, give it to a reader, and put the good file back.

    Returns:
        "accepted", and "failure" with "where" if the reader did something else than accept or refuse; "seconds" of
        processor time, and "peak_mb" of memory so far.
    """
    from ibnorm_export.errors import IBNormError

    name, change = READERS[reader]
    original = (corpus / name).read_bytes()
    changed = change(original, random.Random(f"{reader} {case}"))
    (corpus / name).write_bytes(changed)
    begin = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, CASE_S)
    answer: dict[str, Any] = {}
    try:
        answer["accepted"] = _read(reader, corpus / name, corpus)
    except IBNormError as error:
        answer["accepted"] = False
        if len(str(error)) > 3000:
            answer["failure"] = f"a message of {len(str(error))} characters"
    except BaseException as error:  # noqa: BLE001  # what is looked for
        answer |= {"failure": f"{type(error).__name__}: {error}"[:500], "where": _where(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        (corpus / name).write_bytes(original)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**answer, "seconds": round(time.process_time() - begin, 3), "peak_mb": round(peak, 1)}


def _too_long(signum: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"more than {CASE_S:g} s of processor time")


def main() -> int:
    """Answer lines until standard input ends."""
    corpus, memory_mb = Path(sys.argv[1]), int(sys.argv[2])
    import torch

    import ibnorm_export.models.loading  # noqa: F401  # so that its memory is not part of a case

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _too_long)
    out = sys.stdout
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(run_case(wanted["reader"], wanted["case"], corpus=corpus)), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
