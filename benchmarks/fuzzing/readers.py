"""What the suite `fuzz` gives damaged files to: commands, functions of the library, and the text endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.fuzzing.mutations import (
    change_archive,
    change_bytes,
    change_json,
    change_lines,
    change_onnx,
    change_safetensors,
)
from ibnorm_export.errors import PromptError, printable

if TYPE_CHECKING:
    from ibnorm_export.verifier.report import ParityReport

__all__ = ["READERS", "Reader", "Unfit", "check_message"]

#: Characters of a message: some values of 200 characters each, and what the message says about them.
_LONGEST: Final = 1000


class Unfit(Exception):
    """A message that a terminal should not get, or an exit code or status that nothing should end with."""


@dataclass(frozen=True, slots=True)
class Reader:
    """One reader.

    Args:
        file: its good file, below the folder of the corpus.
        change: changes the file's content.
        read: reads a file; its second argument is the folder of the corpus. Returns whether it accepts the file, or
            raises `IBNormError`.
    """

    file: str
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path, Path], bool]


def check_message(text: str) -> None:
    """Check that a message is short, and that a terminal shows it as it is.

    Raises:
        Unfit: it is not.
    """
    if len(text) > _LONGEST:
        raise Unfit(f"a message of {len(text)} characters: {printable(text[:100])} ... {printable(text[-200:])}")
    if printable(text) != text:
        raise Unfit(f"a message with control characters: {printable(text)[:300]}")


def run_command(*words: object, exact: bool = False) -> bool:
    """Run a command in this process, and return whether it succeeded.

    Args:
        words: the command and its arguments.
        exact: whether its output is text that is passed on as it is where no terminal shows it.

    Raises:
        Unfit: it ends with another exit code than 0 to 3, prints a traceback, or a message that is not fit to print.
    """
    from ibnorm_export.cli import main

    sys.argv = ["ibnorm-export", *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main()
    text = out.getvalue() + err.getvalue()
    if code not in (0, 1, 2, 3) or "Traceback" in text:
        raise Unfit(f"exit code {code}: {printable(text)[:500]}")
    if not exact and printable(out.getvalue()) != out.getvalue():
        raise Unfit("control characters on stdout")
    for line in err.getvalue().splitlines():
        check_message(line)
    return code == 0


def _inspect_file(file: Path, corpus: Path) -> bool:
    return run_command("inspect", file) and run_command("inspect", file, "--json")


def _inspect_folder(file: Path, corpus: Path) -> bool:
    return run_command("inspect", file.parent)


def _verdict(file: Path, corpus: Path) -> ParityReport:
    from ibnorm_export import models
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.verifier.options import InputCoverage, VerifyOptions
    from ibnorm_export.verifier.verify import verify

    loaded = models.load(corpus / "checkpoint")
    return verify(ExportedModel(file), loaded, options=VerifyOptions(samples=1, coverage=InputCoverage.FAST))


def _verify(file: Path, corpus: Path) -> bool:
    from ibnorm_export.json_text import json_text

    report = _verdict(file, corpus)
    json_text(report.to_dict())
    for line in str(report).splitlines():
        check_message(line)
    return bool(report)


def _verify_page(file: Path, corpus: Path) -> bool:
    """The page of a verdict, whose plots show names of the file."""
    from ibnorm_export.verifier.html import write_report

    report = _verdict(file, corpus)
    page = write_report(report, corpus / "report.html")
    if "\x1b" in page.read_text(encoding="utf-8"):
        raise Unfit("control characters on a page")
    return bool(report)


def _generate(file: Path, corpus: Path) -> bool:
    options = ("--prompt", "hi", "--max-new-tokens", 2, "--threads", 1)
    return run_command("generate", file.parent, *options, exact=True)


def _import(file: Path, corpus: Path) -> bool:
    from benchmarks.fuzzing.corpus import NORM

    shutil.rmtree(corpus / "imported", ignore_errors=True)
    return run_command("import", file.parent, "-o", corpus / "imported", "--norm", json.dumps(NORM))


def _compare(file: Path, corpus: Path) -> bool:
    return run_command("compare", corpus / "baseline.json", file)


def _weights(file: Path, corpus: Path) -> bool:
    from ibnorm_export.models.containers.reading import read_checkpoint

    read_checkpoint(file)
    return True


def _inputs(file: Path, corpus: Path) -> bool:
    from ibnorm_export.artifacts.exported_model import ExportedModel
    from ibnorm_export.artifacts.input_files import read_arrays
    from ibnorm_export.artifacts.kv_cache import input_specs

    read_arrays(file, input_specs(ExportedModel(corpus / "m.onnx")))
    return True


def _labels(file: Path, corpus: Path) -> bool:
    from ibnorm_export.analysis.batches import read_labels

    read_labels(file)
    return True


def _texts(file: Path, corpus: Path) -> bool:
    from ibnorm_export.evaluation.texts import TextData

    data = TextData(file)
    data.sha256()
    return sum(len(document.text) for document in data.documents()) > 0


def _image_settings(file: Path, corpus: Path) -> bool:
    from ibnorm_export.evaluation.preprocessing import find_preprocessing, open_picture

    steps = find_preprocessing(file.parent)
    if steps is None:
        return False
    steps.apply(open_picture((corpus / "images" / "a.png").read_bytes()), 1)
    return True


def _picture(file: Path, corpus: Path) -> bool:
    from ibnorm_export.evaluation.preprocessing import open_picture

    try:
        open_picture(file.read_bytes())
    except (OSError, ValueError, SyntaxError):  # what it documents
        return False
    return True


def _manifest(file: Path, corpus: Path) -> bool:
    from ibnorm_export.artifacts.manifest import check_files, read_manifest

    check_files(file.parent, read_manifest(file.parent))
    return True


def _tokenizer(file: Path, corpus: Path) -> bool:
    from ibnorm_export.artifacts.tokenizer import FolderTokenizer

    FolderTokenizer(file.parent, 300).encode("a text")
    return True


def _end_tokens(file: Path, corpus: Path) -> bool:
    from ibnorm_export.artifacts.tokenizer import end_tokens

    end_tokens(file.parent)
    return True


def _template(file: Path, corpus: Path) -> bool:
    """The template as the text endpoint renders it: in a process with limits."""
    from ibnorm_export.serving.text.template_process import template_process

    async def render() -> bool:
        async with template_process(file.parent) as template:
            if template is None:
                return False
            await template.render([{"role": "user", "content": "hello"}])
            return True

    return asyncio.run(render())


def _plan_description(file: Path, corpus: Path) -> bool:
    from ibnorm_export.runtimes.tensorrt.description import read_description

    read_description(file.with_name("m.plan"))
    return True


def _check_config(file: Path, corpus: Path) -> bool:
    from ibnorm_export.gate.config import read_check_config

    read_check_config(file)
    return True


class _Refusing:
    """A template that counts requests whose body is legal, and refuses them: no model is needed."""

    def __init__(self) -> None:
        self.requests = 0

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        self.requests += 1
        raise PromptError("legal")


def _request(file: Path, corpus: Path) -> bool:
    """A body of the text endpoint."""
    from ibnorm_export.serving.text.admission import TextQueue
    from ibnorm_export.serving.text.app import create_app
    from ibnorm_export.serving.text_limits import TextLimits

    template = _Refusing()
    app = create_app(TextQueue(lambda message: None, TextLimits()), "m", max_positions=8, template=template)
    sent: list[dict[str, Any]] = []
    body = [{"type": "http.request", "body": file.read_bytes(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        return body.pop() if body else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/v1/chat/completions"
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    asyncio.run(app(scope, receive, send))
    status, answer = sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
    if not 400 <= status < 500:
        raise Unfit(f"status {status}: {answer[:300]!r}")
    check_message(json.loads(answer)["error"]["message"])
    return template.requests == 1


READERS: Final[dict[str, Reader]] = {
    "onnx": Reader("m.onnx", change_onnx, _inspect_file),
    "verify": Reader("m.onnx", change_onnx, _verify),
    "verify_page": Reader("m.onnx", change_onnx, _verify_page),
    "safetensors": Reader("checkpoint/model.safetensors", change_safetensors, _inspect_folder),
    "config": Reader("checkpoint/config.json", change_json, _inspect_folder),
    "index": Reader("sharded/model.safetensors.index.json", change_json, _inspect_folder),
    "pt": Reader("m.pt", change_archive, _weights),
    "import": Reader("nanogpt/ckpt.pt", change_archive, _import),
    "import_yaml": Reader("litgpt/model_config.yaml", change_lines, _import),
    "npz": Reader("in.npz", change_archive, _inputs),
    "npy": Reader("labels.npy", change_bytes, _labels),
    "texts": Reader("texts.jsonl", change_bytes, _texts),
    "image_settings": Reader("images/preprocessor_config.json", change_json, _image_settings),
    "picture": Reader("images/a.png", change_bytes, _picture),
    "manifest": Reader("repository/manifest.json", change_json, _manifest),
    "tokenizer": Reader("tokenizer/tokenizer.json", change_json, _tokenizer),
    "generation_config": Reader("tokenizer/generation_config.json", change_json, _end_tokens),
    "genai_config": Reader("tokenizer/genai_config.json", change_json, _end_tokens),
    "generate_config": Reader("text/config.json", change_json, _generate),
    "generate_model": Reader("text/model.onnx", change_onnx, _generate),
    "tokenizer_config": Reader("tokenizer/tokenizer_config.json", change_json, _template),
    "chat_template": Reader("chat/chat_template.jinja", change_bytes, _template),
    "request": Reader("chat.json", change_json, _request),
    "baseline": Reader("baseline.json", change_json, _compare),
    "plan_description": Reader("m.plan.json", change_json, _plan_description),
    "check": Reader("check.toml", change_lines, _check_config),
}
