"""The command line: klimb plan, train, measure, sample, climb, report, diagnose, schema, env, data, methods, derive, target, divergence.

Nothing heavy is imported before a command needs it, so that `klimb --help` is there at once. Exit status: 0 done,
2 the user can mend it (one message on stderr, no traceback unless KLIMB_DEBUG=1), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klimb import cli_data, cli_derive, cli_diagnose, cli_explore, cli_methods, cli_report, launch

if TYPE_CHECKING:
    from klimb.config import Config
    from klimb.ranks import Ranks
    from klimb.watch import Watch

HINT = (
    "Any field of the configuration is an option: --learning_rate 1e-3 --family.r 8; klimb schema lists them."
)

app = typer.Typer(
    help="klimb moves a language model up a reward inside a budget of KL: plan, train, measure, sample. "
    + HINT,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; options go over it.")]
Resume = Annotated[Path | None, typer.Option(help="Go on with this run.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", "--dry_run", help="Print the resolved configuration and stop.")
]
Nproc = Annotated[int | None, typer.Option(min=1, help="Processes of this machine that share the work.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Profile = Annotated[
    bool,
    typer.Option("--profile", help="Say where time and memory of a step went: profile.json, trace.json.gz."),
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, nothing else there.")]
Policy = Annotated[Path | None, typer.Option(help="Folder of a trained policy; left out: RUN/policy.")]


# written last first, because a decorator nearest to the function comes first in the list of commands
@app.command("climb", context_settings=FREE, epilog=HINT, help="Plan, train, measure and report in one go.")
@app.command(
    "train",
    context_settings=FREE,
    epilog=HINT,
    help="Train a policy towards the target (--plan RUN takes an earlier plan's pool).",
)
@app.command(
    "plan",
    context_settings=FREE,
    epilog=HINT,
    help="Predict the best policy for every beta, from draws of the reference. They are kept as they come: "
    "--resume RUN goes on with a plan that was killed, and draws nothing twice.",
)
def plan_train_climb_(
    ctx: typer.Context,
    config: ConfigFile = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    profile: Profile = False,
    nproc: Nproc = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """One command under three names: they take the same options and differ in which function of `klimb.run` they call."""
    name = ctx.command.name
    assert name is not None
    if profile and name == "plan":
        raise ValueError(
            "plan: got --profile, which looks at the steps of a training; use it with train or climb"
        )
    settings = _settings(ctx, config, resume)
    if dry_run:
        return _print_config(settings)
    if nproc is not None and nproc > 1:
        named = {"--config": config, "--resume": resume}
        flags = {"--profile": profile, "--quiet": quiet, "--json": json_}
        raise typer.Exit(_launched(nproc, name, ctx.args, named, flags))
    from klimb import screen

    stopped: str | None = None
    with _watched(quiet=quiet, json_=json_) as (ranks, watch):
        from klimb import run

        verb: Any = {"plan": run.run_plan, "train": run.run_train, "climb": run.climb}[name]
        settings, resumed = ranks.from_first(lambda: _again(settings, resume))
        try:
            outcome = verb(
                settings,
                resume=resumed,
                watch=watch,
                ranks=ranks,
                **({"profile": True} if profile else {}),
            )
        except KeyboardInterrupt:
            stopped = settings.output_dir
    if not ranks.first:
        raise typer.Exit(130 if stopped or outcome.interrupted else 0)
    if stopped is None and outcome.interrupted:
        stopped = str(outcome.path)
    if stopped is not None:
        began = (Path(stopped) / "config.yaml").is_file()
        print(
            f"klimb: stopped; go on with: klimb {name} --resume {stopped}" if began else "klimb: stopped",
            file=sys.stderr,
        )
        raise typer.Exit(130)
    record: dict[str, Any] = {
        "run": str(outcome.path),
        "product": settings.product,
        "beta": outcome.beta,
        "step": outcome.step,
        "plan": outcome.plan,
        "measure": outcome.measurement,
        "report": None if outcome.report is None else str(outcome.report),
    }
    if profile:
        record["profile"] = outcome.profile
    _result(record, json_, lambda: screen.outcome(record))


@app.command("measure", context_settings=FREE, epilog=HINT)
def measure_(
    ctx: typer.Context,
    config: ConfigFile = None,
    policy: Policy = None,
    dry_run: DryRun = False,
    nproc: Nproc = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Certify how far a policy is from the best (or audit a reward model): klimb measure RUN, or -c FILE --policy FOLDER, of which nothing is written. Killed, it goes on when typed again."""
    path, settings = _run_or_config(ctx, config)
    if dry_run:
        return _print_config(settings)
    if path is None and policy is None:
        raise ValueError("measure: give the directory of a run, or -c FILE with --policy FOLDER")
    if nproc is not None and nproc > 1:
        named, flags = {"--config": config, "--policy": policy}, {"--quiet": quiet, "--json": json_}
        raise typer.Exit(_launched(nproc, "measure", ctx.args, named, flags))
    from klimb import screen

    folder = policy if policy is not None or path is None else path / settings.product
    with _watched(quiet=quiet, json_=json_) as (ranks, watch):
        from klimb.run import report, run_measure

        # a certificate in the run's folder is of the run's own policy
        is_own = path is None or policy is None or policy.resolve() == (path / settings.product).resolve()
        own = path if is_own else None
        record = run_measure(settings, policy_folder=str(folder), output_dir=own, watch=watch, ranks=ranks)
        if own is not None and ranks.first:
            report(own)
    if ranks.first:
        _result(record, json_, lambda: screen.measurement(record))


@app.command("sample", context_settings=FREE, epilog=HINT)
def sample_(
    ctx: typer.Context,
    config: ConfigFile = None,
    policy: Policy = None,
    method: Annotated[str, typer.Option(help="ancestral, best_of or rejection.")] = "ancestral",
    num_draws: Annotated[
        int, typer.Option("--num_draws", "--num-draws", min=1, help="Completions a prompt.")
    ] = 4,
    n: Annotated[int, typer.Option("--n", min=1, help="Candidates of best_of.")] = 4,
    bound: Annotated[float | None, typer.Option(help="Upper bound of the reward, for rejection.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many prompts.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Completions to print.")] = 5,
    nproc: Nproc = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Draw completions of the held-out prompts without training: klimb sample RUN, or -c FILE. Killed, it goes on when typed again."""
    path, settings = _run_or_config(ctx, config)
    folder = policy
    if folder is None and path is not None and (path / "policy").is_dir():
        folder = path / "policy"
    output = Path(settings.output_dir) if path is None else path
    if nproc is not None and nproc > 1:
        of_law = {"--method": method, "--num-draws": num_draws, "--n": n, "--bound": bound}
        named = {"--config": config, "--policy": policy, **of_law, "--limit": limit, "--show": show}
        flags = {"--quiet": quiet, "--json": json_}
        raise typer.Exit(_launched(nproc, "sample", ctx.args, named, flags))
    from klimb import screen

    with _watched(quiet=quiet, json_=json_) as (ranks, watch):
        from klimb.sampling import run_sample

        record = run_sample(
            settings,
            output_dir=output,
            method=method,
            num_draws=num_draws,
            n=n,
            bound=bound,
            limit=limit,
            policy_folder=folder,
            watch=watch,
            ranks=ranks,
        )
    if ranks.first:
        _result(record, json_, lambda: screen.samples(record, show))


@app.command("schema")
def schema_() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from klimb.config import schema

    print(json.dumps(schema(), indent=2))


@app.command("env")
def env_() -> None:
    """Print what klimb runs on: versions, machine, git revision."""
    from klimb.store import environment

    print(json.dumps(environment(), indent=2))


cli_report.register(app)
cli_diagnose.register(app)
cli_data.register(app)
cli_methods.register(app)
cli_derive.register(app)
cli_explore.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; ends in SystemExit."""
    # nothing is printed half-way: a message that the user can act on, or a traceback of ours
    try:
        app(args=None if arguments is None else list(arguments), prog_name="klimb")
    except ValueError as error:
        if os.environ.get("KLIMB_DEBUG") == "1":
            raise
        if os.environ.get("RANK", "0") == "0":  # of several processes, all of which say the same
            print(f"klimb: {error}", file=sys.stderr)
        sys.exit(2)
    except ConnectionError as error:
        if "RANK" not in os.environ:
            raise
        print(f"klimb: process {os.environ.get('RANK')}: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if os.environ.get("KLIMB_DEBUG") == "1" or error.filename is None:
            raise
        print(
            f"klimb: {error.filename}: {error.strerror}; see to it that it is there and yours to read and write",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("klimb: stopped", file=sys.stderr)
        sys.exit(130)


def _settings(ctx: typer.Context, config: Path | None, resume: Path | None) -> Config:
    from klimb.config import load

    if resume is None:
        return load(config, ctx.args, others=_own_options(ctx))
    if config is not None or ctx.args:
        raise ValueError(
            f"--resume {resume} goes on with the run's own configuration; leave the other options out"
        )
    return _of_run(resume, ())


@contextmanager
def _watched(*, quiet: bool, json_: bool) -> Generator[tuple[Ranks, Watch]]:
    """Within this context this process is one of its ranks; the first one shows how far it is."""
    from klimb import screen
    from klimb.ranks import joined
    from klimb.watch import UNWATCHED

    _quieten()
    with joined() as ranks:
        shown = screen.watching(_console(json_), quiet=quiet or json_)
        with shown if ranks.first else nullcontext(UNWATCHED) as watch:
            yield ranks, watch


def _launched(
    nproc: int, name: str, arguments: Sequence[str], named: Mapping[str, object], flags: Mapping[str, bool]
) -> int:
    """The same command in several processes, all options but --nproc passed on; its exit status."""
    given = [part for flag, value in named.items() if value is not None for part in (flag, str(value))]
    return launch.launch(nproc, [name, *arguments, *given, *(flag for flag, on in flags.items() if on)])


def _again(settings: Config, resume: Path | None) -> tuple[Config, bool]:
    """The configuration, and whether a run is to be gone on with: one named, or this one, whose processes died."""
    began = (Path(settings.output_dir) / "config.yaml").is_file()
    if resume is None and began and launch.taken_up_again():
        return _of_run(Path(settings.output_dir), ()), True
    return settings, resume is not None


def _of_run(run: Path, arguments: Sequence[str], own: Sequence[str] = ()) -> Config:
    from klimb.config import load

    if not (run / "config.yaml").is_file():
        from klimb.nearest import nearest_run

        raise ValueError(
            f"{run}: holds no run{nearest_run(run)}; expected the output_dir of a run that was started"
        )
    return load(run / "config.yaml", [*arguments, "--output_dir", str(run)], others=own)


def _run_or_config(ctx: typer.Context, config: Path | None) -> tuple[Path | None, Config]:
    """The directory of a run if the first argument is one, and the configuration of it or of a file."""
    from klimb.config import load

    arguments, own = ctx.args, _own_options(ctx)
    # no typer argument: with options of any name let through, it would take an option's name for itself
    run = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    if config is None and not arguments:
        raise ValueError("expected the directory of a run, or -c FILE")
    if run is not None and config is not None:
        raise ValueError(f"got the run {run} and -c {config}, expected one of them")
    return (
        (None, load(config, arguments, others=own))
        if run is None
        else (run, _of_run(run, arguments[1:], own))
    )


def _own_options(ctx: typer.Context) -> list[str]:
    """Names of the options that are the command's own, and not of the configuration."""
    return [option[2:] for one in ctx.command.params for option in one.opts if option.startswith("--")]


def _print_config(settings: Config) -> None:
    import yaml

    print(yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True), end="")


def _result(record: dict[str, Any], json_: bool, panel: Any) -> None:
    if json_:
        from klimb.store import as_json

        print(as_json(record))
    else:
        _console(False).print(panel())


def _console(json_: bool) -> Any:
    from rich.console import Console

    return Console(stderr=json_, highlight=False)


def _quieten() -> None:
    """Keep the bars and notes of other libraries off the screen; ours says what is going on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # for developers, not for whoever runs this
