"""`ibnorm-export generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import err, print_aside, print_document, print_next
from ibnorm_export.errors import printable
from ibnorm_export.runtimes.runner import Backend, Kernels


def generate_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            exists=True,
            help="A folder of `export --task text-generation`, or a checkpoint, which PyTorch runs.",
        ),
    ],
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="Text to continue.", show_default=False)] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Text to continue, in place of the argument.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Maximum number of generated tokens.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 always chooses the most likely token."),
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Sample from the most likely tokens with this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed for the sampling.")] = 0,
    kernels: options.KernelChoice = Kernels.AUTO,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Number of ONNX Runtime's threads.")] = None,
    weights: options.Weights = None,
    backend: Annotated[
        Backend | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            show_default="ort-genai where the folder is for it, else ort-cpu",
            help="Runtime that runs an exported folder.",
        ),
    ] = None,
    npm: options.Npm = None,
    as_json: options.AsJson = False,
) -> None:
    """Continue a prompt token by token. The same seed gives the same text with every backend.

    Example: ibnorm-export generate llama "The import statement"
    """
    if (text is None) is (prompt is None):
        problem = "there is no text to continue" if text is None else "the text is there twice"
        raise typer.BadParameter(f'{problem}; type: ibnorm-export generate {path} "The import statement"')
    words = text if prompt is None else prompt
    assert words is not None  # one of them is there
    from ibnorm_export.artifacts.onnx_file import GENAI_CONFIG_FILE
    from ibnorm_export.generation.sampling import Sampling
    from ibnorm_export.text_models import open_text_model

    model = open_text_model(path, kernels=kernels, threads=threads, weights=weights, backend=backend, npm=npm)
    sampling = Sampling(max_new_tokens, temperature, top_p=top_p, seed=seed)
    if as_json:
        result = model.generate(words, sampling)
        content = {"backend": model.backend, "prompt": words, **result.to_dict()}
        print_document("generate", content, files=[path])
        return
    unwritten = [words]  # written with the first piece, when the prompt is known to be valid

    def write(piece: str) -> None:
        err.clear_loading()
        text = "".join([*unwritten, piece])
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)  # a model may write terminal escapes
        sys.stdout.flush()
        unwritten.clear()

    result = model.generate(words, sampling, write=write)
    write("\n")
    print_aside(
        f"{model.backend}: {len(result.tokens)} tokens after a prompt of {result.prompt_tokens}, first token after "
        f"{result.first_token_ms:.1f} ms, then {result.tokens_per_s:.0f} tokens/s, stopped at: {result.stopped}"
    )
    print_next(*(("serve", path) if (path / GENAI_CONFIG_FILE).is_file() else ("bench", path)))
