"""The command line: generates options from the configuration dataclasses, prints one-line errors, and sets exit codes.

In: the command-line arguments. Out: the given options, keyed by dotted name, for a command's `main`.
Invariant: an error that the user can fix prints one message without a traceback and exits with code 2.
Click handles parsing, completion and help. `config/options.py` checks values, as it does for recipes and the Python
API.
"""

import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from pipelines.launcher import REPORTED, Fit, LaunchConfig, launch
from scalekd_cache.config.options import DryRun, Option, options_class, options_of, plain_values, take
from scalekd_cache.config.plain_names import PLAIN_NAMES
from scalekd_cache.config.recipes import DEMO, OTHER, recipe_names
from scalekd_cache.errors import (
    CLEAR_LINE,
    RunInterrupted,
    UserError,
    shell_command,
    unknown_name,
    worker_failures,
)

Given = dict[str, Any]
"""The given options: dotted name -> text."""
COMPLETION = "_SCALEKD_COMPLETE"
"""Variable set by the completion script: `eval "$(_SCALEKD_COMPLETE=bash_source scalekd)"`."""
HELP: dict[str, Any] = {"help_option_names": ["--help", "-h"], "max_content_width": 110}
"""Click settings for all help texts."""
FIRST = 10
"""Number of options in the first group in `--help`."""
WORKERS = "default: based on the number of cores and the free memory"
"""Description of the default of `workers`, for commands that compute it."""
PATHS = {"backbone", "cache", "ckpt", "classes", "data", "deepspeed", "devkit", "download_dir", "folder", "hostfile",
         "init", "out", "path", "pixels_from", "recipe", "run", "runs", "source", "teacher_weights", "to", "url",
         "weights", "weights_dir"}  # fmt: skip
"""Text options that take a file or a folder, by the last part of their name: the shell completes their paths."""
STAGE1_DEFAULTS = {
    "recipe": f"default: {DEMO} for --data demo, otherwise {OTHER}",
    "cache.path": "default: caches/<dataset name>",
    "workers": WORKERS,
}
"""Descriptions of the defaults for stage 1."""


class Command(click.Command):
    """A command whose options are generated from configuration dataclasses.

    Args:
        name: the command name.
        main: takes the given options and returns the exit code (None for 0).
        config_classes: the dataclasses with the options. With `LaunchConfig`, the command can start multiple processes.
        about: the help text; its first line is the summary.
        lock: a lock that the launching process holds while the command runs.
        check: called by the launching process before it starts the other processes, with their number on this node.
        check_values: called instead of the command if `--check-values` is set.
        argument: the option that can also be given as a positional argument.
        recipe_options: returns the options set by a named recipe, for the defaults shown in the help.
        defaults: help text for defaults that are computed.
        fit: with several GPUs and no `--nproc`, how many of them the command can use (default: all).
    """

    def __init__(
        self,
        name: str,
        main: Callable[[Given], int | None],
        config_classes: Sequence[type],
        about: str | None,
        lock: Callable[[Given], contextlib.AbstractContextManager[None]] | None = None,
        check: Callable[[Given, int], None] = lambda given, nproc: None,
        check_values: Callable[[Given], None] = lambda given: None,
        argument: str | None = None,
        recipe_options: Callable[[str], Mapping[str, Any]] | None = None,
        defaults: Mapping[str, str] = MappingProxyType({}),
        fit: Fit = lambda given, gpus: gpus,
    ) -> None:
        self.main_function, self.config_classes = main, tuple(config_classes)
        self.lock = lock if lock and "RANK" not in os.environ else lambda given: contextlib.nullcontext()
        self.fit, self.check, self.check_values, self.plain = fit, check, check_values, PLAIN_NAMES[name]
        found = [option for config_class in config_classes for option in options_of(config_class)]
        self.dotted = {option.name.replace(".", "__"): option.name for option in found}
        self.own = {option.name: option for option in found}
        self.recipe_options, self.defaults = recipe_options, defaults
        self.argument = [_argument(argument)] if argument else []
        self.dotted |= {f"{argument}_": argument} if argument else {}
        shown: dict[str, list[str]] = {}
        for plain, dotted in self.plain.items():
            shown.setdefault(dotted, []).append(plain)
        super().__init__(
            name,
            params=[
                *self.argument,
                *(_click_option(option, shown.get(option.name, [])) for option in found),
                *_common(),
            ],
            help=about,
            short_help=str(about).partition("\n")[0],
            callback=self._call,
            context_settings={**HELP, "token_normalize_func": lambda word: word.replace("-", "_")},
        )

    def _call(
        self, plugin: str | None, debug: bool, local_rank: str | None, check_values: bool, **values: str | None
    ) -> int | None:
        """Run the command in this process, or launch multiple processes that run it."""
        import_plugin(plugin)
        given = self.given(values)
        if check_values:
            return self.check_values(given)
        with self.lock(given):
            if LaunchConfig in self.config_classes:
                status = launch(take(given, LaunchConfig), str(self.name), given, sys.argv, self._checked, self._fit)
                if status is not None:
                    return status
            return self.main_function(given)

    def _fit(self, given: Given, gpus: int) -> int:
        """`fit`, with a note on standard error if some GPUs stay unused."""
        with contextlib.redirect_stdout(io.StringIO()):
            nproc = self.fit(given, gpus)
        if nproc < gpus:
            print(f"note: using {nproc} of {gpus} GPUs, because the batch is divided into few micro-batches "
                  "(for more, lower --train.micro_batch_size)", file=sys.stderr, flush=True)  # fmt: skip
        return nproc

    def _checked(self, given: Given, nproc: int) -> None:
        """Run the checks without printing, because rank 0 will print the same lines."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.check(dict(given), nproc)

    def run_here(self, words: Sequence[str]) -> int | None:
        """Run the command in this process, without launcher, lock or preliminary checks; return its exit code."""
        with self.make_context(self.name, list(words)) as context:
            return self.main_function(self.given(context.params))

    def given_by(self, words: Sequence[str]) -> Given:
        """Parse command-line words into options keyed by dotted name."""
        return self.given(self.make_context(self.name, list(words)).params)

    def given(self, values: Mapping[str, str | None]) -> Given:
        """Convert click's parameters to options keyed by dotted name."""
        return plain_values(
            {self.dotted[name]: text for name, text in values.items() if name in self.dotted and text is not None}
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. Errors are one line long and suggest the closest option."""
        words = list(args)  # click removes words as it parses them
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            typed = error.option_name.replace("_", "-") if "." not in error.option_name else error.option_name
            raise unknown_name("option", typed, self._option_names(), "--help lists all", listed=0) from error
        except click.UsageError as error:
            extra = [word for word in words if not word.startswith("-") and f"({word})" in error.message]
            if extra:
                text = f"unexpected argument {extra[0]}: put an option name before each value"
                raise UserError(f"{text}, and commas between the values of a list (--help)") from error
            raise UserError(f"{error.format_message().rstrip('.')} (--help)") from error

    def _option_names(self) -> list[str]:
        return [name for option in self.params for name in option.opts if name.startswith("--")]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the most common options first, then the others in groups."""
        order = {dotted: index for index, dotted in enumerate(dict.fromkeys(self.plain.values()))}

        def group(param: click.Parameter) -> tuple[int, str]:
            dotted = self.dotted.get(str(param.name), "")
            if order.get(dotted, FIRST) < FIRST:
                return 0, "Options"
            if dotted in order or not dotted:
                return 1, "More options"
            prefix = dotted.partition(".")[0] if "." in dotted else ""
            return 2, f"{prefix}.*" if prefix else "Other options"

        params = [param for param in self.get_params(ctx) if param not in self.argument and param.get_help_record(ctx)]
        params.sort(key=lambda param: (group(param), order.get(self.dotted.get(str(param.name), ""), len(order))))
        recipes = self._recipes(ctx.params.get("recipe"))
        for (_, title), members in groupby(params, key=group):
            records = [
                (record[0], record[1] + self._default(self.dotted.get(str(param.name), ""), recipes))
                for param in members
                if (record := param.get_help_record(ctx))
            ]
            with formatter.section(title):
                formatter.write_dl(records, col_max=38)

    def _recipes(self, given: str | None) -> dict[str, Mapping[str, Any]]:
        """The recipes whose values appear in the help: the given one, or the default ones."""
        if self.recipe_options is None:
            return {}
        return {name: self.recipe_options(name) for name in ([given] if given else [DEMO, OTHER])}

    def _default(self, dotted: str, recipes: Mapping[str, Mapping[str, Any]]) -> str:
        """An option's default for the help; empty if the description already states it."""
        if dotted in self.defaults:
            return f"  [{self.defaults[dotted]}]"
        info = self.own[dotted].info if dotted in self.own else None
        default = info.get_default(call_default_factory=True) if info and not info.is_required() else None
        values = {name: _text(options.get(dotted, default)) for name, options in recipes.items()}
        if any(value != _text(default) for value in values.values()):
            return "  [default: " + ", ".join(f"{text} (recipe {name})" for name, text in values.items() if text) + "]"
        return f"  [default: {_text(default)}]" if _text(default) not in ("", "false") else ""


@options_class()
class JsonOutput:
    """The `json` option, for commands that print results."""

    json: bool = False
    """Print one JSON object; everything else goes to standard error."""

    @contextlib.contextmanager
    def printed(self, facts: dict[str, Any]) -> Iterator[None]:
        """With `json`, redirect prints to standard error, then print the facts collected in this block."""
        if not self.json:
            yield
            return
        with contextlib.redirect_stdout(sys.stderr):
            yield
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(facts))


@options_class()
class Output(DryRun, JsonOutput):
    """Output options for long-running commands."""


def _click_option(option: Option, plain: list[str]) -> click.Option:
    """The click option for one field. A switch needs no value: `--deep` means `--deep true`."""
    kind = option.info.annotation
    literal = [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []
    known = [*literal, *(recipe_names() if option.name == "recipe" else [])]
    names = [f"--{name.replace('_', '-') if '.' not in name else name}" for name in (*plain, option.name)]
    switch: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if kind is bool else {}
    has_path = kind in (str, str | None) and option.name.rpartition(".")[2] in PATHS
    return click.Option(
        [option.name.replace(".", "__"), *dict.fromkeys(names)],
        **switch,
        metavar="" if switch else "|".join(literal) or _kind(kind),
        help=option.help,
        is_eager=option.name == "recipe",  # `--recipe name --help` shows this recipe's defaults
        shell_complete=partial(_completions, known, has_path),
    )


def _argument(name: str) -> click.Argument:
    """The click argument for an option that can also be given without its name."""
    complete = partial(_completions, (), name in PATHS)
    return click.Argument([f"{name}_"], required=False, metavar=name.upper(), shell_complete=complete)


def _completions(
    known: Sequence[str], has_path: bool, ctx: click.Context, param: click.Parameter, start: str
) -> list[CompletionItem]:
    """The known values that begin with `start`; if there are none, paths for an option that takes one."""
    found = [CompletionItem(word) for word in known if word.startswith(start)]
    return found or ([CompletionItem(start, type="file")] if has_path else [])


def _kind(kind: Any) -> str:
    """The metavar for a type: INT, FLOAT or TEXT."""
    kinds = {part for part in (kind, *get_args(kind)) if part in (int, float)}
    return "INT" if int in kinds else "FLOAT" if float in kinds and get_origin(kind) is not tuple else "TEXT"


def _text(value: object) -> str:
    """A default as a user would type it; empty if there is none."""
    if isinstance(value, tuple | list):
        return "[" + ",".join(f"{part:.3g}" for part in value) + "]"
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _common() -> Iterator[click.Option]:
    """Options shared by all commands."""
    yield click.Option(["--plugin"], metavar="MODULE", help="Import this Python module first, e.g. for custom models.")
    yield click.Option(["--debug"], is_flag=True, help="Print tracebacks for errors.")
    # Added by DeepSpeed's launcher. `distributed.py` reads the same value from the environment.
    yield click.Option(["--local_rank"], hidden=True)
    # `make distill` checks the stage-2 options before it creates a missing cache.
    yield click.Option(["--check-values"], is_flag=True, hidden=True)


def import_plugin(name: str | None) -> None:
    """Import a module that registers custom teachers or students."""
    if name is None:
        return
    sys.path.insert(0, os.getcwd())
    try:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ImportError("not a module's name")
        importlib.import_module(name)
    except ImportError as error:
        expected = "a Python module (not a path) that can be imported from this folder, such as examples.my_teacher"
        where = f"--plugin {shlex.quote(name)}"
        raise UserError("cannot import the plugin", got=error, expected=expected, where=where) from error


def typed_command(name: str, options: Mapping[str, str | int | None], dotted: Sequence[str] = ()) -> str:
    """Format a command for the user to run. Under make, it is a make command with the same VENV= and PYTHON=.

    Args:
        name: the command name.
        options: plain name -> value; options without a value are omitted.
        dotted: additional options, such as `train.epochs=2`.
    """
    given = {option: value for option, value in options.items() if value}
    if "MAKELEVEL" not in os.environ:
        return " ".join([shell_command(name, **given), *(shlex.quote(f"--{pair}") for pair in dotted)])
    words = [f"{option.upper()}={value}" for option, value in given.items()]
    words += [f"SET={' '.join(dotted)}"] if dotted else []
    flags = re.findall(r"(?:\\.|\S)+", os.environ.get("MAKEFLAGS", ""))  # make escapes blanks, but no quotes
    make = [re.sub(r"\\(.)", r"\1", word) for word in flags if word.startswith(("VENV=", "PYTHON="))]
    return shlex.join(["make", name, *words, *make])


def run(command: click.Command, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit.

    Exit codes: 0 success, 1 check failed, 2 usage error or invalid input, 75 checkpointed: rerun to resume,
    130 interrupted, 141 broken pipe.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # latin-1, for example, cannot show every file name
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        if COMPLETION in os.environ:
            command.main(words, prog_name="scalekd", complete_var=COMPLETION)
        # Do not use `command.main`: it turns a broken pipe into exit code 1.
        with worker_failures(), command.make_context(_program(command), words) as context:
            status = command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:  # after --help
        sys.exit(stop.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr, flush=True)
        _exit(2)
    except UserError as error:
        if debug:
            raise
        if _first_to_report(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        _exit(2)
    except click.ClickException as error:
        print(f"error: {error.format_message()}", file=sys.stderr, flush=True)
        _exit(2)
    except RunInterrupted as stop:
        if _first_to_report(str(stop)):
            _print_over(str(stop))
        _exit(stop.exit_code)
    except BrokenPipeError:  # the reader of our output (head, less) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(141)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            _print_over("interrupted; rerun the same command to resume")
        _exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _print_over(text: str) -> None:
    """Print a message after Ctrl-C. In a terminal, it replaces the line with ^C and an unfinished progress bar."""
    print(f"{CLEAR_LINE if sys.stderr.isatty() else ''}{text}", file=sys.stderr, flush=True)


def _first_to_report(text: str) -> bool:
    """Whether this rank is the first to print this error; most errors occur on all ranks."""
    folder = os.environ.get(REPORTED)
    if folder is None:
        return True
    try:
        (Path(folder) / hashlib.sha256(text.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the folder is gone or on another node; printing twice is better than not at all
        return True
    return True


def _program(command: click.Command) -> str:
    """The program name shown in help texts."""
    return "scalekd" if isinstance(command, click.Group) else f"scalekd {command.name}"


def _exit(status: int) -> NoReturn:
    """Exit without waiting for other ranks or loader workers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
