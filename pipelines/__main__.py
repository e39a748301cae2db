"""The `scalekd` command and its subcommands, also available as `python -m pipelines`.

In: the command-line arguments. Out: the command's exit code.
"""

import sys
from typing import NoReturn

try:
    import click

    from pipelines import (
        cache_teacher,
        costs,
        distill,
        evaluate,
        export,
        fetch,
        finetune,
        import_upstream,
        inspect_cache,
        plan,
        probe,
        prove,
        publish,
        pull,
        repair,
        report,
        verify,
    )
    from pipelines.command import HELP, run
    from scalekd_cache import __version__
    from scalekd_cache.errors import UserError, unknown_name
except KeyboardInterrupt:  # during startup, before `run` handles it
    sys.exit(130)

MODULES = (cache_teacher, distill, evaluate, probe, finetune, export, report, verify, repair,
           inspect_cache, plan, prove, publish, pull, fetch, costs, import_upstream)  # fmt: skip
"""The command modules, in the order shown by `scalekd --help`."""


class Commands(click.Group):
    """The command group. An unknown command raises a one-line error."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Command names in the order in which a user would run them."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. An option before the command raises a one-line error."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            named = next((word for word in args if word.replace("_", "-") in self.commands), "<command>")
            raise UserError(f"put the command before its options: scalekd {named} {error.option_name} ...") from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command. Underscores are accepted instead of hyphens."""
        name = args[0].replace("_", "-")
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:  # not in completion
            raise unknown_name("command", args[0], self.commands, "scalekd --help")
        return super().resolve_command(ctx, [name, *args[1:]])


SCALEKD = Commands(
    "scalekd",
    commands=[module.COMMAND for module in MODULES],
    context_settings=HELP,
    help="Run a frozen vision teacher once, store its features and logits, and train any number of students from them.",
    epilog="Exit codes: 0 success, 1 check failed, 2 usage error or invalid input, 75 checkpointed: rerun to resume, "
    "130 interrupted.",
)
click.version_option(__version__, message="scalekd %(version)s")(SCALEKD)


def main() -> NoReturn:
    """Console-script entry point."""
    run(SCALEKD)


if __name__ == "__main__":
    main()
