"""``fastgan finetune``: a model and a task's files in, the fine-tuned model and its figures out."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from fastgan.cli.failures import in_one_line
from fastgan.cli.train import _source

app = typer.Typer(no_args_is_help=True, help="Fine-tune a language model for a task, or train one from scratch.")

# The defaults shown are the configurations' own (a test compares them): reading them would import torch for `--help`.
OUT = typer.Option(..., help="The run's folder, and the model's in the end.")
MODEL = typer.Option(None, help="Begin with the model in this folder, or with one of the hub.")
FROM_SCRATCH = typer.Option(None, help="Or begin with nothing: small.")
MAX_STEPS = typer.Option(0, help="Stop after so many steps, before the epochs are over; 0: never.")
WARMUP = typer.Option(0.1, help="Share of the steps until the learning rate is reached; then it falls linearly to 0.")
WEIGHT_DECAY = typer.Option(0.01)
PRECISION = typer.Option("float32", help="float32, bfloat16 or float16 (on a GPU).")
SEED = typer.Option(0, help="Same seed, same weights.")
ACCUMULATION = typer.Option(1, help="Batches to a step.")
EVAL_EVERY = typer.Option(0, help="Steps between evaluations, each with a checkpoint; 0: an epoch.")
EARLY_STOPPING = typer.Option(0, help="Stop after so many evaluations that are no better; 0: never.")
AVERAGE = typer.Option(0, help="Try the mean of the weights of the last so many evaluations; 0: do not.")
OWN_DROPOUT = typer.Option(None, help="Default: the model's own.")
LENGTH = typer.Option(128, help="Tokens of a text; longer ones are cut, and counted.")
BATCH_SIZE = typer.Option(16, help="Examples at a time, in each process; those of like lengths together.")


def _ending(
    report_to: str = typer.Option("none", help="tensorboard, wandb, ..., parted by commas."),
    attention: str = typer.Option("fastgan", help="fastgan, or transformers' own: sdpa, eager."),
    adversary: str | None = typer.Option(
        None, help="Train against noise, r-drop, r3f, fgm, pgd, freelb, smart or vat; sentiment also against gan-bert."
    ),
    adversary_steps: int | None = typer.Option(
        None, help="Perturbed passes of a step, or ascents; default: the method's."
    ),
    adversary_radius: float | None = typer.Option(
        None, help="Of a perturbation, in mean norms of a word vector; default: the method's."
    ),
    adversary_lr: float | None = typer.Option(
        None, help="An ascent's, default: the radius; gan-bert's generator's, default: --lr."
    ),
    adversary_norm: str | None = typer.Option(None, help="l2 (of a sentence) or linf; default: the method's."),
    adversary_weight: float | None = typer.Option(
        None, help="Of the divergence between two passes; default: the method's."
    ),
    adversary_masks: str | None = typer.Option(
        None, help="Dropout's in a step's passes: shared or fresh; default: the method's."
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in --out."),
) -> None:
    """The options that end every command; what is given of them is read from the context."""


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Makes a command of a function: its own options, and those of ``_ending``."""
    own, ending = (inspect.signature(each, eval_str=True).parameters for each in (function, _ending))

    @functools.wraps(function)
    def command(**given: Any) -> None:
        function(**{name: given[name] for name in own})

    parameters = [*own.values(), *ending.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return app.command()(command)


@app.callback()
def _finetune() -> None:
    """Fine-tune a language model for a task, or train one from scratch.

    --train and --validation name files, or data sets of the hub: OWNER/NAME with @CONFIG, :SPLIT and #COLUMN behind it
    where they are needed, as in nyu-mll/glue@sst2 or wmt/wmt16@de-en:train#de.
    """


@_command
def sentiment(
    context: typer.Context,
    train: Path = typer.Option(None, help="Texts with labels: .tsv, .csv or .jsonl, also with .gz."),
    validation: Path = typer.Option(None, help="The same, for choosing the best weights."),
    out: Path = OUT,
    model: str | None = MODEL,
    from_scratch: str | None = FROM_SCRATCH,
    text_column: str | None = typer.Option(None, help="Name of the column or key. Default: text, sentence, ..."),
    label_column: str | None = typer.Option(None, help="Default: label, sentiment, ..."),
    unlabelled: Path | None = typer.Option(
        None,
        help="Texts for gan-bert, vat, smart, r3f: one a line; of a .tsv, .csv or .jsonl the labels are not looked at.",
    ),
    epochs: int = typer.Option(2, help="Times that all texts are seen."),
    max_steps: int = MAX_STEPS,
    batch_size: int = BATCH_SIZE,
    lr: float = typer.Option(5e-5, help="Learning rate."),
    warmup: float = WARMUP,
    weight_decay: float = WEIGHT_DECAY,
    dropout: float | None = OWN_DROPOUT,
    length: int = LENGTH,
    precision: str = PRECISION,
    seed: int = SEED,
    gradient_accumulation: int = ACCUMULATION,
    eval_every: int = EVAL_EVERY,
    early_stopping: int = EARLY_STOPPING,
    average: int = AVERAGE,
) -> None:
    """Fine-tune an encoder to tell classes of texts apart, or go on with a run.

    Two columns, text and label, or a header that names them. The weights that are best on the validation file are
    kept. Ctrl-C saves; a run killed in any way goes on by --resume, and ends with the same weights, bit for bit.

    For example: fastgan finetune sentiment --model bert-base-uncased --train train.tsv --validation dev.tsv --out
    runs/mine

    Then: fastgan evaluate sentiment --model runs/mine --data test.tsv
    """
    result = _run(context, "sentiment", out)
    figures = result.figures
    typer.echo(
        f"  accuracy on validation {figures['accuracy']:.2%} at step {result.best_step} (always the commonest label of "
        f"training: {figures['majority']:.2%})"
    )


@_command
def translate(
    context: typer.Context,
    train: tuple[Path, Path] = typer.Option(None, help="Two parallel files, source and target; plain or .gz."),
    validation: tuple[Path, Path] = typer.Option(None, help="The same, for choosing the best weights."),
    out: Path = OUT,
    model: str | None = MODEL,
    from_scratch: str | None = FROM_SCRATCH,
    layers: int = typer.Option(3, help="Of the encoder, and as many of the decoder (from scratch, as the next three)."),
    width: int = typer.Option(256, help="Of the hidden states; an even multiple of heads."),
    heads: int = typer.Option(4),
    vocab_size: int = typer.Option(8000, help="Of the vocabulary of both languages, learnt on the training files."),
    label_smoothing: float = typer.Option(0.1),
    beams: int = typer.Option(5, help="Of the last evaluation; those on the way are greedy."),
    epochs: int = typer.Option(15, help="Times that all pairs are seen."),
    max_steps: int = MAX_STEPS,
    batch_size: int = typer.Option(64, help="Pairs at a time, in each process; those of like lengths together."),
    lr: float = typer.Option(1e-3, help="Learning rate."),
    warmup: float = WARMUP,
    weight_decay: float = WEIGHT_DECAY,
    dropout: float | None = typer.Option(0.15),
    length: int = typer.Option(100, help="Tokens of a side; longer ones are cut, and counted."),
    precision: str = PRECISION,
    seed: int = SEED,
    gradient_accumulation: int = ACCUMULATION,
    eval_every: int = EVAL_EVERY,
    early_stopping: int = EARLY_STOPPING,
    average: int = typer.Option(5, help="Try the mean of the weights of the last so many evaluations."),
) -> None:
    """Train a translator on parallel lines, from scratch or from a pretrained one, or go on with a run.

    The weights whose greedy translations of the validation file have the best BLEU are kept. Ctrl-C saves; a run killed
    in any way goes on by --resume, and ends with the same weights, bit for bit.

    For example: fastgan finetune translate --from-scratch small --train train.de train.en --validation val.de val.en
    --out runs/de-en

    Then: fastgan evaluate translate --model runs/de-en --data test.de test.en
    """
    result = _run(context, "translate", out)
    figures = result.figures
    searched = "".join(f", {value:.2f} with {name.rpartition('_')[2]} beams" for name, value in figures.items()
                       if name.startswith("bleu_beam"))  # fmt: skip
    typer.echo(f"  BLEU on validation {figures['bleu']:.2f} greedily at step {result.best_step}{searched}")


@_command
def summarize(
    context: typer.Context,
    train: Path = typer.Option(None, help="JSONL, a document and its summary or summaries a line; plain or .gz."),
    validation: Path = typer.Option(None, help="The same, for choosing the best weights."),
    out: Path = OUT,
    model: str | None = MODEL,
    from_scratch: str | None = FROM_SCRATCH,
    layers: int = typer.Option(3, help="Of the encoder, and as many of the decoder (from scratch, as the next three)."),
    width: int = typer.Option(256, help="Of the hidden states; an even multiple of heads."),
    heads: int = typer.Option(4),
    vocab_size: int = typer.Option(8000, help="Of the vocabulary, learnt on the training file."),
    label_smoothing: float = typer.Option(0.1),
    beams: int = typer.Option(5, help="Of the last evaluation; those on the way are greedy."),
    epochs: int = typer.Option(3, help="Times that all summaries are seen."),
    max_steps: int = MAX_STEPS,
    batch_size: int = typer.Option(8, help="Documents at a time, in each process; those of like lengths together."),
    lr: float = typer.Option(5e-5, help="Learning rate."),
    warmup: float = WARMUP,
    weight_decay: float = WEIGHT_DECAY,
    dropout: float | None = OWN_DROPOUT,
    length: int = typer.Option(512, help="Tokens of a document; longer ones are cut, and counted."),
    target_length: int = typer.Option(64, help="Tokens of a summary."),
    sentences: int = typer.Option(1, help="Of a document, that an encoder alone takes."),
    precision: str = PRECISION,
    seed: int = SEED,
    gradient_accumulation: int = ACCUMULATION,
    eval_every: int = EVAL_EVERY,
    early_stopping: int = EARLY_STOPPING,
    average: int = AVERAGE,
) -> None:
    """Fine-tune a model to summarise documents, or go on with a run.

    An encoder with a decoder (BART, T5) writes summaries; an encoder alone (BERT, MiniLM) takes the document's best
    --sentences. The weights whose (greedy) summaries of the validation file have the best ROUGE-1 are kept; that of the
    documents' first sentences stands beside. Ctrl-C saves; a run killed in any way goes on by --resume, and ends with
    the same weights, bit for bit.

    For example: fastgan finetune summarize --model facebook/bart-base --train train.jsonl --validation dev.jsonl --out
    runs/mine

    Then: fastgan evaluate summarize --model runs/mine --data test.jsonl
    """
    result = _run(context, "summarize", out)
    figures = result.figures
    searched = next((f", {value:.2f} with {name.rpartition('_')[2]} beams" for name, value in figures.items()
                     if name.startswith("rouge1_beam")), "")  # fmt: skip
    greedily = " greedily" if searched else ""
    typer.echo(
        f"  ROUGE-1 on validation {figures['rouge1']:.2f}{greedily} at step {result.best_step}{searched} (the first "
        f"sentence: {figures['first_sentence_rouge1']:.2f})"
    )


@_command
def qa(
    context: typer.Context,
    train: Path = typer.Option(None, help="Questions in SQuAD's JSON, 1.1 or 2.0; plain or .gz."),
    validation: Path = typer.Option(None, help="The same, for choosing the best weights."),
    out: Path = OUT,
    model: str | None = MODEL,
    from_scratch: str | None = FROM_SCRATCH,
    epochs: int = typer.Option(4, help="Times that all questions are seen."),
    max_steps: int = MAX_STEPS,
    batch_size: int = BATCH_SIZE,
    lr: float = typer.Option(5e-5, help="Learning rate."),
    warmup: float = WARMUP,
    weight_decay: float = WEIGHT_DECAY,
    dropout: float | None = OWN_DROPOUT,
    length: int = typer.Option(256, help="Tokens of question and text together; longer texts are read in windows."),
    stride: int = typer.Option(96, help="Tokens that a window shares with the next."),
    precision: str = PRECISION,
    seed: int = SEED,
    gradient_accumulation: int = ACCUMULATION,
    eval_every: int = EVAL_EVERY,
    early_stopping: int = EARLY_STOPPING,
    average: int = AVERAGE,
) -> None:
    """Fine-tune an encoder to point at the answer to a question in a text, or go on with a run.

    The weights with the best F1 on the validation file are kept. Where the training file has questions without an
    answer, the model may say that there is none. Ctrl-C saves; a run killed in any way goes on by --resume, and ends
    with the same weights, bit for bit.

    For example: fastgan finetune qa --model bert-base-uncased --train train.json --validation dev.json --out runs/mine

    Then: fastgan evaluate qa --model runs/mine --data test.json
    """
    result = _run(context, "qa", out)
    figures = result.figures
    typer.echo(
        f"  F1 on validation {figures['f1']:.2f}, exact match {figures['exact_match']:.2f}, at step {result.best_step}"
    )


@_command
def generate(
    context: typer.Context,
    train: Path = typer.Option(None, help="Text, plain or .gz."),
    validation: Path = typer.Option(None, help="The same, for choosing the best weights."),
    out: Path = OUT,
    model: str | None = MODEL,
    from_scratch: str | None = FROM_SCRATCH,
    layers: int = typer.Option(4, help="From scratch, as the next three."),
    width: int = typer.Option(256, help="Of the hidden states; a multiple of heads."),
    heads: int = typer.Option(4),
    vocab_size: int = typer.Option(2000, help="Of the vocabulary that is learnt; 261 are the bytes themselves."),
    epochs: int = typer.Option(3, help="Times that all of the text is seen."),
    max_steps: int = MAX_STEPS,
    batch_size: int = typer.Option(16, help="Blocks at a time, in each process."),
    lr: float = typer.Option(5e-4, help="Learning rate."),
    warmup: float = WARMUP,
    weight_decay: float = WEIGHT_DECAY,
    dropout: float | None = OWN_DROPOUT,
    length: int = typer.Option(128, help="Tokens of a block."),
    precision: str = PRECISION,
    seed: int = SEED,
    gradient_accumulation: int = ACCUMULATION,
    eval_every: int = EVAL_EVERY,
    early_stopping: int = typer.Option(2, help="Stop after so many evaluations that are no better; 0: never."),
    average: int = AVERAGE,
) -> None:
    """Train a causal model on a text file, from scratch or from a pretrained one, or go on with a run.

    The weights with the least loss on the validation file are kept. Ctrl-C saves; a run killed in any way goes on by
    --resume, and ends with the same weights, bit for bit. For text that memory does not hold: fastgan prepare text, and
    fastgan pretrain.

    For example: fastgan finetune generate --model gpt2 --train a.txt --validation b.txt --out runs/mine

    Then: fastgan generate runs/mine --prompt "Once upon a time"
    """
    result = _run(context, "generate", out)
    figures = result.figures
    typer.echo(
        f"  validation loss {figures['loss']:.4f} nats per token, {figures['loss_per_character']:.4f} per character, "
        f"perplexity {figures['perplexity']:.2f}, at step {result.best_step}"
    )


def _task(name: str) -> Any:
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"finetune needs transformers ({error}): pip install 'fastgan[text]'") from None
    from fastgan.training.generate import GENERATE
    from fastgan.training.qa import QA
    from fastgan.training.sentiment import SENTIMENT
    from fastgan.training.summarize import SUMMARIZE
    from fastgan.training.translate import TRANSLATE

    return {task.name: task for task in (SENTIMENT, TRANSLATE, SUMMARIZE, QA, GENERATE)}[name]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(os.fspath, value))
    return os.fspath(value) if isinstance(value, Path) else value


def _run(context: typer.Context, name: str, out: Path) -> Any:
    """The finished run; leaves with status 130 where it was stopped, and silently in all processes but the first."""
    from fastgan.cli.progress import reporter

    resume = context.params["resume"]
    fields = [each for each in context.params if each not in ("out", "resume")]
    given = {each: context.params[each] for each in fields if _source(context, each) not in ("DEFAULT", "DEFAULT_MAP")}
    given = {each: _plain(value) for each, value in given.items()}
    with in_one_line():
        task = _task(name)
        if not resume:
            for each in task.config.FILES:
                if each not in given:
                    raise typer.BadParameter(f"--{each.replace('_', '-')} is needed for a new run")
            if ("model" in given) == ("from_scratch" in given):
                raise typer.BadParameter("--model, or else --from-scratch small, is needed for a new run")
        import torch

        from fastgan.training.finetune import finetune, resume_finetune
        from fastgan.training.language_run import first_process

        shown = reporter("examples", ("loss",))
        try:
            if resume:
                result = resume_finetune(task, out, given, reporter=shown)
            else:
                try:
                    config = task.config(**given)
                except (TypeError, ValueError) as error:
                    told, _, rest = str(error).partition(" ")
                    message = f"--{told.replace('_', '-')} {rest}" if told in fields else str(error)
                    raise typer.BadParameter(message) from error
                result = finetune(task, config, out, reporter=shown)
        finally:
            shown.close()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    if result.interrupted:
        if first_process():
            typer.echo(
                f"stopped at step {result.step} of {result.total}, saved. Go on with:\n"
                f"  fastgan finetune {name} --out {out} --resume"
            )
        raise typer.Exit(130)
    if not first_process():
        raise typer.Exit
    early = f"; stopped early, of {result.total} steps" if result.stopped_early else ""
    typer.echo(
        f"finished: {result.step} steps, {result.parameters / 1e6:.1f} million parameters in {result.folder}{early}"
    )
    return result
