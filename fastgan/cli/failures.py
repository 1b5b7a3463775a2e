"""How the commands fail: in one line on standard error, and never with a traceback for what a user can mend.

Status 1: it could not be done; 2: it was asked for wrongly (Typer's own); 130: stopped by a signal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import typer


def failure(message: str) -> typer.Exit:
    """Says it in one line; the exit status is 1."""
    typer.echo(f"fastgan: {' '.join(message.split())}", err=True)
    return typer.Exit(1)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turns what can go wrong with files, data, runs and memory into one line. Other errors are bugs, and are shown."""
    from fastgan.data.sources import SourceError
    from fastgan.training.checkpoint import RunError

    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads our output any more: Typer ends without a word
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        raise failure(f"{named}{error.strerror or error}") from error
    except (RunError, SourceError, ImportError, ValueError) as error:
        raise failure(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        message = out_of_memory(error)
        if message is None:
            raise
        raise failure(message) from error


def out_of_memory(error: Exception) -> str | None:
    """What to say where memory ran out, or None for another error."""
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
        return f"not enough memory{f': {asked[1]} were asked for at once' if asked else ''}"
    return None
