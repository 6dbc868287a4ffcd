"""`prunebench prune` and `eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prunebench.cli.program import Allow, BatchSize, Device, Dtype, app, command_line, complaints, terminal
from prunebench.errors import RequestError
from prunebench.plain import escape


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name.")],
    step: Annotated[list[str], typer.Option("--step", help="NAME[opt=value,…]; several are taken in order.")],
    target: Annotated[str, typer.Option("--target", help="0.5 (share of zeros), or 2:4 (survivors:group).")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must be empty or absent.")],
    calibration: Annotated[str, typer.Option("--calibration", help="c4, wikitext2, OWNER/NAME or FILE.txt.")] = "c4",
    calibration_tokens: Annotated[Path | None, typer.Option("--calibration-tokens", help="FILE.npy, used as it is.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration sequences.")] = 128,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="Tokens a sequence (default: the context, up to 2048).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="For sampling, and for methods that draw.")] = 0,
    training: Annotated[str | None, typer.Option("--training", help="Training text, for steps that train.")] = None,
    training_tokens: Annotated[int, typer.Option("--training-tokens", min=1, help="Tokens of training text.")] = 409_600,
    revision: Annotated[str | None, typer.Option("--revision", help="The commit of a Hub model.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    batch_size: BatchSize = 8,
    allow: Allow = None,
) -> None:
    """Prune a model and write it as a normal Hugging Face folder, with its record and its masks.

    Example: prunebench prune quickstart/wiki7m --step wanda --target 2:4 --calibration text.txt --length 256 --out pruned
    """
    from prunebench.bench.commands import PruneOptions, prune_to_folder
    from prunebench.show import print_record

    if calibration_tokens is not None and calibration_tokens.suffix != ".npy":
        raise RequestError(f"--calibration-tokens takes a file whose name ends with .npy, not {str(calibration_tokens)!r}.")
    options = PruneOptions(
        model=model,
        steps=tuple(step),
        target=target,
        out=out,
        calibration=str(calibration_tokens) if calibration_tokens else calibration,
        samples=samples,
        length=length,
        seed=seed,
        training=training,
        training_tokens=training_tokens,
        revision=revision,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        allowed=tuple(allow or ()),
        command=command_line(),
    )
    with terminal.status("pruning") as status:
        record = prune_to_folder(options, lambda what, done, total: status.update(escape(f"{what} {done} of {total}")))
    print_record(record, str(out / "prunebench.json"), terminal)
    if record.status == "refused":
        raise RequestError(f"{record.reason} Nothing was written.")
    if record.status == "failed":
        reason = " ".join((record.reason or "the run failed").split()).rstrip(".")
        complaints.print(f"error: {escape(reason)}. Nothing was written.", soft_wrap=True)
        raise typer.Exit(1)


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name.")],
    evals: Annotated[list[str] | None, typer.Option("--eval", help="NAME[opt=value,…]; may be given several times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="The commit of a Hub model.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    batch_size: BatchSize = 8,
    allow: Allow = None,
) -> None:
    """Evaluate a model, pruned or not.

    Example: prunebench eval pruned --eval 'perplexity[data=text.txt,window=256]' --json
    """
    from prunebench.bench.commands import evaluate_model

    scores = evaluate_model(model, evals or ["perplexity"], revision, dtype, device, batch_size, tuple(allow or ()))
    if as_json:
        kept = {"items", "items_file", "items_hash"}
        plain = {name: score.model_dump(mode="json", exclude=kept) for name, score in scores.items()}
        typer.echo(json.dumps({"scores": plain}, indent=1))
        return
    for name, score in scores.items():
        shown = score.reason or "no mean" if score.value is None else f"{score.value:.6g}"
        terminal.print(f"{escape(name)}: {shown}  ({score.seconds:.1f} s)")
        for part, value in score.parts.items():
            terminal.print(f"  {escape(part)}: {value:.4g}")
        terminal.print("  " + escape(", ".join(f"{key}={value}" for key, value in score.conditions.items())), style="dim")
