"""The `hf-moe` command itself, how it ends when something is wrong, and the option that most commands share."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from safetensors import SafetensorError

PACKAGE = __package__.partition(".")[0]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turn a dense language model into a mixture of experts with a small key-value cache, prove that nothing was "
    "lost, and share it.",
)

MIXTURE, ATTENTION, NUMBERS, OUTPUT = "Mixture", "Attention", "Numbers", "Output"
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", rich_help_panel=OUTPUT)]


@contextmanager
def one_sentence(
    resumable: bool = False, model: bool = True, again: str = "run the same command again"
) -> Iterator[None]:
    """End with one line on standard error and a status above 0 where the user can do something about it.

    `model` says whether Transformers has to know ours, `again` how a command that is `resumable` goes on.
    """
    try:
        if model:
            _register()
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted{f'; {again} to go on from there' if resumable else ''}.", err=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or PACKAGE).startswith(PACKAGE):
            raise
        typer.echo(f"Error: this command needs {error.name}, which is not installed", err=True)
        sys.exit(1)
    except UnicodeDecodeError as error:
        # It knows no file's name.
        typer.echo(f"Error: a text that was named is not UTF-8, at byte {error.start}: convert it first", err=True)
        sys.exit(1)
    except (ValueError, OSError, SafetensorError) as error:
        message = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else error
        typer.echo(f"Error: {' '.join(str(message).split())}", err=True)
        sys.exit(1)


def _register() -> None:
    """Make the import of the package whole, where `hf_moe_command` entered it without."""
    package = sys.modules[PACKAGE]
    if not hasattr(package, "HfMoeConfig"):
        package.__spec__.loader.exec_module(package)  # type: ignore[union-attr]
