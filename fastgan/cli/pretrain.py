"""``fastgan pretrain``."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from fastgan.cli.failures import in_one_line
from fastgan.cli.train import _source

# The defaults shown are PretrainConfig's own (a test compares them): reading them would import torch for `--help`.
_FIELDS = ("objective", "data", "model", "layers", "width", "heads", "length", "batch_size", "max_steps", "lr",
           "warmup", "dropout", "weight_decay", "mlm_probability", "generator_share", "rtd_weight", "precision", "seed",
           "gradient_accumulation",
           "eval_every", "early_stopping", "report_to", "attention")  # fmt: skip


def pretrain(
    context: typer.Context,
    objective: str = typer.Option(None, help="mlm (BERT, masked words), clm (GPT-2, the next word) or rtd (ELECTRA)."),
    data: Path = typer.Option(None, help="A folder that fastgan prepare text made."),
    out: Path = typer.Option(..., help="The run's folder, and the model's in the end."),
    model: Path | None = typer.Option(None, help="Go on from the model in this folder, not from scratch."),
    layers: int = typer.Option(4),
    width: int = typer.Option(256, help="Of the hidden states; a multiple of heads."),
    heads: int = typer.Option(4),
    length: int = typer.Option(128, help="Tokens of an example."),
    batch_size: int = typer.Option(16, help="Examples at a time, in each process."),
    max_steps: int = typer.Option(1000),
    lr: float = typer.Option(5e-4, help="Learning rate, after the warm-up; it falls linearly to 0."),
    warmup: int = typer.Option(100, help="Steps until the learning rate is reached."),
    dropout: float = typer.Option(0.1),
    weight_decay: float = typer.Option(0.01),
    mlm_probability: float = typer.Option(0.15, help="Share of the words that are masked."),
    generator_share: float = typer.Option(0.25, help="rtd: the generator's share of the heads and width."),
    rtd_weight: float = typer.Option(50.0, help="rtd: weight of the discriminator's loss beside the generator's."),
    precision: str = typer.Option("float32", help="float32, bfloat16 or float16 (on a GPU)."),
    seed: int = typer.Option(0, help="Same seed, same weights."),
    gradient_accumulation: int = typer.Option(1, help="Batches to a step."),
    eval_every: int = typer.Option(100, help="Steps between evaluations, each with a checkpoint."),
    early_stopping: int = typer.Option(0, help="Stop after so many evaluations without a better loss; 0: never."),
    report_to: str = typer.Option("none", help="tensorboard, wandb, ..., parted by commas."),
    attention: str = typer.Option("fastgan", help="fastgan, or transformers' own: sdpa, eager."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in --out."),
) -> None:
    """Pretrain a language model, or go on with a run.

    Ctrl-C saves and says how to go on. A run killed in any way goes on from its last checkpoint by --resume, and ends
    with the same weights, bit for bit.

    For example: fastgan pretrain --objective clm --data runs/corpus --out runs/gpt2

    Then: fastgan pretrain --out runs/gpt2 --resume
    """
    given = {name: context.params[name] for name in _FIELDS if _source(context, name) not in ("DEFAULT", "DEFAULT_MAP")}
    given = {name: os.fspath(value) if isinstance(value, Path) else value for name, value in given.items()}
    if not resume:
        for name in ("objective", "data"):
            if name not in given:
                raise typer.BadParameter(f"--{name} is needed for a new run")
    if model is not None and (told := {"layers", "width", "heads", "dropout"} & set(given)):
        raise typer.BadParameter(f"--{min(told)} is the model's own with --model; leave it out")

    from fastgan.cli.progress import reporter

    with in_one_line():
        try:
            import accelerate  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise ImportError(f"pretrain needs transformers ({error}): pip install 'fastgan[text]'") from None
        import torch

        from fastgan.training.pretrain import PretrainConfig, resume_pretrain
        from fastgan.training.pretrain import pretrain as run

        first = int(os.environ.get("RANK", "0")) == 0
        shown = reporter("tokens", ("loss",))
        try:
            if resume:
                result = resume_pretrain(out, given, reporter=shown)
            else:
                try:
                    config = PretrainConfig(**given)
                except (TypeError, ValueError) as error:
                    name, _, rest = str(error).partition(" ")
                    told_name = f"--{name.replace('_', '-')} {rest}" if name in _FIELDS else str(error)
                    raise typer.BadParameter(told_name) from error
                result = run(config, out, reporter=shown)
        finally:
            shown.close()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    if result.interrupted:
        if first:
            typer.echo(
                f"stopped at step {result.step} of {result.total}, saved. Go on with:\n"
                f"  fastgan pretrain --out {out} --resume"
            )
        raise typer.Exit(130)
    if first:
        typer.echo(_summary(result))


def _summary(result) -> str:
    text = f"finished: {result.step} steps, {result.parameters / 1e6:.1f} million parameters in {result.folder}"
    if result.stopped_early:
        text += f"; stopped early, of {result.total} steps"
    if result.figures:
        figures = result.figures
        return (
            f"{text}\n  validation: generator {figures['generator_loss']:.4f} nats per masked word, discriminator "
            f"{figures['discriminator_loss']:.4f} per token, {figures['accuracy']:.2%} of the tokens right"
        )
    if result.validation_loss is not None:
        text += f"\n  validation loss {result.validation_loss:.4f} nats per token"
    if result.validation_loss_per_character is not None:
        text += f", {result.validation_loss_per_character:.4f} per character"
    return text
