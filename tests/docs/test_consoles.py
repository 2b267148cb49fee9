"""Every console of every page is run, and what it prints is compared with what the page shows.

Numbers are compared as numbers of any value, because times, sizes and last digits differ by machine; and runs of spaces
as one. Pages with their own test file are run there.
"""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import ibnorm_export
from ibnorm_export import IBNormSpec
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.cli import main
from tests.docs.pages import ROOT, Block, Command, blocks, page_names
from tests.support.checkpoints import LLAMA, VIT, save_checkpoint
from tests.support.messages import messages

#: These pages need checkpoints as training codes write them.
ELSEWHERE = {"how-to/import-a-checkpoint.md": "test_import_a_checkpoint.py"}

#: What a reader installs or prepares, and a test has already.
PREPARED = ("pip ", "pipx ", "npm ", "python3 -m venv", "make ")

#: A program that a reader needs for some pages; without it they are skipped.
NEEDED = {"how-to/openvino.md": "openvino", "compatibility.md": "openvino", "how-to/export-for-a-runtime.md": "onnx"}

#: Synopses stand in text blocks; they have a placeholder in capitals.
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")


def consoles(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "console"]


RUN = [page for page in page_names() if page not in ELSEWHERE and any(b.reason is None for b in consoles(page))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: checkpoints, and a text that was not trained on."""
    folder = tmp_path_factory.mktemp("prepared")
    shape = {"hidden_size": 64, "head_dim": 16}
    for parent in ("checkpoints", "demo"):
        llama = save_checkpoint(
            folder / parent / "llama", {**LLAMA, **shape}, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False)
        )
        write_byte_tokenizer(llama)
        save_checkpoint(folder / parent / "vit", VIT, IBNormSpec("T", 3.0, epsilon=1e-5))
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")[:6000]
    for name in ("held-out.txt", "demo/held-out.txt"):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each page has its own working directory."""
    made = tmp_path / "work"
    shutil.copytree(prepared, made)
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(str(made))
    monkeypatch.setenv("COLUMNS", "120")
    return made


def without_numbers(line: str) -> str:
    """A line with `#` for every number, and one space for several."""
    return " ".join(re.sub(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", "#", line).split())


def differences(shown: tuple[str, ...], printed: str) -> list[str]:
    """The lines of a page that a command does not print at their place."""
    lines = [without_numbers(line) for line in messages(printed)]
    missing, at, anywhere = [], 0, False
    for line in shown:
        if line.strip() == "...":
            anywhere = True
            continue
        wanted = without_numbers(line)
        if not wanted:
            continue
        found = next((n for n in range(at, len(lines)) if lines[n] == wanted), None)
        if found is None or (found != at and not anywhere):
            missing.append(line)
        else:
            at, anywhere = found + 1, False
    return missing


class Exports:
    """Exports of the prepared checkpoints, each made once: several pages begin with the same command.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._printed: dict[tuple[str, ...], str] = {}

    @staticmethod
    def key(words: list[str]) -> tuple[str, ...] | None:
        """What makes two commands the same; None if the result is not to be kept."""
        checkpoint = words[2].replace("demo/", "checkpoints/") if len(words) > 2 else ""
        kept = words[1:2] == ["export"] and "-o" in words and checkpoint in ("checkpoints/llama", "checkpoints/vit")
        return (checkpoint, *words[3:]) if kept else None

    def printed(self, words: list[str]) -> str | None:
        """Put an export that was made before in its place, and return what it printed."""
        key = self.key(words)
        if key is None or key not in self._printed:
            return None
        kept = self._folder / str(list(self._printed).index(key))
        shutil.copytree(kept, Path(words[words.index("-o") + 1]).parent, dirs_exist_ok=True)
        return self._printed[key].replace("checkpoints/", words[2].partition("/")[0] + "/")

    def keep(self, words: list[str], printed: str) -> None:
        """Keep what a command wrote: its output, and the file of weights beside it if there is one."""
        key, output = self.key(words), Path(words[words.index("-o") + 1]) if "-o" in words else Path()
        if key is None:
            return
        kept = self._folder / str(len(self._printed))
        kept.mkdir()
        for path in filter(Path.exists, (output, output.with_name(f"{output.name}.data"))):
            shutil.copytree(path, kept / path.name) if path.is_dir() else shutil.copy(path, kept)
        self._printed[key] = printed.replace("demo/", "checkpoints/")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


def run_script(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a script of a page in this process, which has imported PyTorch already."""
    monkeypatch.setattr(sys, "argv", words)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a script that calls PyTorch itself sees warnings, and is not ended by them
        runpy.run_path(words[0], run_name="__main__")
    out, err = capfd.readouterr()
    return 0, out + err


def run(
    command: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *, exports: Exports
) -> tuple[int, str]:
    """Run a command of a page: one of this program or a script in this process, anything else in its own."""
    words = command.words
    if words[0] == "ibnorm-export":
        if (before := exports.printed(words)) is not None:
            return 0, before
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        code = main.main()
        out, err = capfd.readouterr()
        if code == 0:
            exports.keep(words, out + err)
        return code, out + err
    if words[0] == "python" and words[1].endswith(".py"):
        return run_script(words[1:], monkeypatch, capfd)
    assert words[0] in ("python", "mkdir", "cp"), f"{command.text}: give a reason why it is not run"
    words[0] = sys.executable if words[0] == "python" else words[0]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("page", RUN)
def test_a_page(
    page: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    exports: Exports,
) -> None:
    if page in NEEDED:
        pytest.importorskip(NEEDED[page], reason=f"{page} needs {NEEDED[page]}")
    modules = set(sys.modules)
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text("\n".join(block.lines) + "\n", encoding="utf-8")
        if block.language != "console" or block.reason is not None:
            continue
        for command in block.commands():
            if command.text.startswith(PREPARED):
                continue
            code, printed = run(command, monkeypatch, capfd, exports=exports)
            expected = 1 if "verdict: fail" in command.printed else 0
            assert code == expected, f"{block.where}: {command.text}\n{printed}"
            assert not differences(command.printed, printed), f"{block.where}: {command.text}\n{printed}"
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(folder) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_differences_are_found() -> None:
    printed = "a  1.5 ms\nb 2\nverdict: pass\n"
    assert differences(("a 7 ms", "...", "verdict: pass"), printed) == []
    assert differences(("a 7 ms", "verdict: pass"), printed) == ["verdict: pass"]
    assert differences(("...", "verdict: fail"), printed) == ["verdict: fail"]
    assert differences(("verdict: pass",), printed) == ["verdict: pass"]


@pytest.mark.parametrize("page", page_names())
def test_commands_stand_in_consoles(page: str) -> None:
    for block in blocks(page):
        assert block.language, f"{block.where}: a block has no language; use text for what is none"
        if block.language != "console":
            plain = [line for line in block.lines if line.startswith(("ibnorm-export ", "$ "))]
            assert all(PLACEHOLDER.search(line) for line in plain), f"{block.where}: write it as a console"


@pytest.mark.parametrize("page", page_names())
def test_python_on_a_page(page: str) -> None:
    """Python can be read, and takes only public names from the package itself."""
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse("\n".join(block.lines), block.where)):
            if isinstance(node, ast.ImportFrom) and node.module == "ibnorm_export":
                unknown = [entry.name for entry in node.names if entry.name not in ibnorm_export.__all__]
                assert not unknown, f"{block.where}: {unknown}"


@pytest.mark.parametrize("page", page_names())
def test_a_reason_is_a_reason(page: str) -> None:
    for block in consoles(page):
        assert block.reason is None or len(block.reason.split()) >= 3, f"{block.where}: {block.reason}"
