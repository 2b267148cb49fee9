"""`ibnorm-export generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.cli import options
from ibnorm_export.cli.console import err, print_json
from ibnorm_export.runtimes.runner import Kernels


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def generate_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", exists=True, help="A folder of `export --task text-generation`, or a checkpoint (PyTorch)."
        ),
    ],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What the text goes on from.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Share of probability that is sampled from.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampling.")] = 0,
    kernels: options.KernelChoice = Kernels.AUTO,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of ONNX Runtime.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write text that goes on from a prompt, token by token; the same seed gives the same text in every form.

    Example: ibnorm-export generate llama --prompt "The import statement"
    """
    from ibnorm_export.artifacts.onnx_file import MODEL_FILE
    from ibnorm_export.errors import ModelFileError
    from ibnorm_export.generation.sampling import Sampling
    from ibnorm_export.generation.text_model import open_checkpoint, open_folder

    sampling = Sampling(max_new_tokens, temperature, top_p=top_p, seed=seed)
    if (path / MODEL_FILE).is_file():
        model = open_folder(path, kernels, threads=threads)
    elif path.is_file():
        raise ModelFileError(
            f"{path} is a file; give the folder that `export CHECKPOINT -o DIR --task text-generation` makes"
        )
    else:
        from ibnorm_export import models

        model = open_checkpoint(models.load(path, task=Task.TEXT_GENERATION))
    if as_json:
        result = model.generate(prompt, sampling)
        print_json({"backend": model.backend, "prompt": prompt, **result.to_dict()})
        return
    begun = False

    def write(piece: str) -> None:  # the prompt only once it is known to be good
        nonlocal begun
        _write(piece if begun else prompt + piece)
        begun = True

    result = model.generate(prompt, sampling, write=write)
    write("\n")
    err.print(
        f"{model.backend}: {len(result.tokens)} tokens behind {result.prompt_tokens}, first after "
        f"{result.first_token_ms:.1f} ms, then {result.tokens_per_s:.0f} tokens/s, stopped at: {result.stopped}",
        style="dim",
        markup=False,
    )
