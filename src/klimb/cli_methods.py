"""klimb methods: the table, and what becomes of an objective on a space small enough to sum over.

Nothing heavy is imported before one of the commands runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from klimb.exact.linter import Findings

LAWS = ("policy", "reference", "other")

Json = Annotated[bool, typer.Option("--json", help="As JSON on stdout, nothing else there.")]
Beta = Annotated[float, typer.Option(help="Reward per nat, on rewards from 0 to 1.")]


class Table(TyperGroup):
    """The commands of the table; a word that is none of them may be a method."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names.

        Raises:
            ValueError: there is no such command.
        """
        if args[0] not in self.commands:
            raise ValueError(
                f"methods: no command {args[0]!r}; klimb methods inspect {args[0]} looks at a method of that name"
            )
        return super().resolve_command(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    methods = typer.Typer(invoke_without_command=True, cls=Table)
    methods.callback()(methods_)
    methods.command("inspect")(inspect_)
    app.add_typer(methods, name="methods")


def methods_(
    ctx: typer.Context,
    filter_: Annotated[
        str | None, typer.Option("--filter", help="Only rows in which this text stands.")
    ] = None,
    claim: Annotated[
        str | None, typer.Option(help="Only rows that claim gradient, minimiser, value or law.")
    ] = None,
    json_: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As the page of the documentation.")] = False,
) -> None:
    """Print the table of methods: what each knows, makes small, where it stops, and where its claim ends."""
    if ctx.invoked_subcommand is not None:
        return
    from klimb.methods import KL_PENALTIES, METHODS, NOT_PROVIDED, TARGETS
    from klimb.nearest import nearest
    from klimb.objectives.kl_penalty import CELLS, TRAPS

    penalties = {name: CELLS[key].says for name, key in KL_PENALTIES.items()}
    claims = sorted({row.claim for row in METHODS.values()})
    if claim is not None and claim not in claims:
        raise ValueError(
            f"--claim: got {claim!r}{nearest(claim, claims)}, expected one of {', '.join(claims)}"
        )
    rows = {name: row.as_dict() for name, row in METHODS.items() if claim in (None, row.claim)}
    if filter_ is not None:
        rows = {
            name: row
            for name, row in rows.items()
            if filter_.lower() in f"{name} {' '.join(map(str, row.values()))}".lower()
        }
    if json_:
        targets = {name: vars(row) for name, row in TARGETS.items()}
        found = {
            "methods": rows,
            "targets": targets,
            "kl_penalties": penalties,
            "not_provided": dict(NOT_PROVIDED),
        }
        print(json.dumps(found, indent=2))
        return
    if markdown:
        targets = {name: vars(row) for name, row in TARGETS.items()}
        print(page(rows, targets, NOT_PROVIDED, penalties, TRAPS), end="")
        return
    if not rows:
        raise ValueError(f"--filter: no row holds {filter_!r}; klimb methods lists all {len(METHODS)}")
    whole = filter_ is None and claim is None
    _show(
        rows,
        {name: vars(row) for name, row in TARGETS.items()} if whole else {},
        NOT_PROVIDED if whole else {},
    )


def inspect_(
    method: Annotated[
        str, typer.Argument(help="A method of the table, alpha(0.3), or your own: file.py:function.")
    ],
    beta: Beta = 0.5,
    draws: Annotated[
        str, typer.Option(help="Whose: policy, reference, or other (a law that stays).")
    ] = "policy",
    num_draws: Annotated[
        int, typer.Option("--num_draws", "--num-draws", min=1, max=4, help="Draws a prompt.")
    ] = 3,
    kl_penalty: Annotated[
        str | None,
        typer.Option(
            "--kl_penalty",
            "--kl-penalty",
            help="How KL is charged (rloo, grpo, ...): k1_in_reward, k2_as_loss, ...",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Find where an objective stops, how far that is from the target, and its bias and noise: exactly, by summation.

    Your own objective is a function of numbers that gives one value a prompt; it asks for them by name: log_pi,
    log_target, log_ref, log_q, log_w, reward, beta [P, G], token_log_pi, token_log_ref, token_log_old, row [N], ...
    """
    from klimb.nearest import nearest

    if draws not in LAWS:
        raise ValueError(f"--draws: got {draws!r}{nearest(draws, LAWS)}, expected one of {', '.join(LAWS)}")
    if not beta > 0 or beta == float("inf"):
        raise ValueError(
            f"--beta: got {beta:g}, expected a positive number: without a price on KL there is no target"
        )
    objective, derived = _objective(method, kl_penalty)
    from klimb.exact.linter import inspect, toy, verdict

    at = toy(beta=beta)
    try:
        found = inspect(objective, at, num_draws=num_draws, draws=draws, derived=derived)
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from error
    said = verdict(found, draws)
    if json_:
        plain = {name: x if isinstance(x, str | float) else x.tolist() for name, x in vars(found).items()}
        print(
            json.dumps({"method": method, "beta": beta, "draws": draws, **plain, "verdict": said}, indent=2)
        )
        return
    _tell(method, found, said, [ids.tolist() for ids in at.space.completions], at.reward.tolist())


def _objective(
    method: str, kl_penalty: str | None
) -> tuple[Callable[..., Any], Mapping[str, Callable[..., Any]]]:
    if ":" in method or method.endswith(".py"):
        from klimb.rewards.load import load_function

        if kl_penalty is not None:
            raise ValueError(
                f"--kl_penalty is for methods of the table; {method} is your own and has its KL inside"
            )
        return load_function(method), {}
    from klimb.methods import NOT_PROVIDED, with_penalty
    from klimb.methods import method as row_of

    if method in NOT_PROVIDED:
        raise ValueError(f"{method}: not a method of its own, it {NOT_PROVIDED[method]}")
    row = row_of(method)
    if row.objective is None:
        raise ValueError(f"{method}: it draws and trains nothing, so there is no objective to inspect")
    if kl_penalty is not None:
        row = with_penalty(row, kl_penalty)
        assert row.objective is not None
    return row.objective, row.derived


def page(
    rows: Mapping[str, Mapping[str, object]],
    targets: Mapping[str, Mapping[str, object]],
    not_provided: Mapping[str, str],
    penalties: Mapping[str, str],
    traps: Mapping[str, str],
) -> str:
    """docs/methods.md: the tables, a row a method, a target and a KL penalty."""
    columns = {
        "knows": "knows of the target",
        "divergence": "makes small",
        "draws": "draws of",
        "claim": "claim",
        "fixed_point": "stops at",
        "caveat": "caveat",
        "source": "source",
    }

    def cells(*texts: object) -> str:
        return "| " + " | ".join(str(text).replace("|", "\\|") for text in texts) + " |"

    lines = [
        "# Methods",
        "",
        "Every method is target x divergence x draws x family. A claim is a test that the row passes: *gradient*, its mean",
        "update is the divergence's gradient; *minimiser*, it stops at the target for any draws of full support; *value*, it",
        "stops at another law, which is named; *law*, its draws have the law named. A caveat is tested too.",
        "`klimb methods inspect METHOD` finds the fixed point of any of them, or of your own `file.py:function`.",
        "",
        cells("method", *columns.values()),
        "|" + "---|" * (len(columns) + 1),
        *(cells(f"`{name}`", *(row[key] for key in columns)) for name, row in rows.items()),
        "",
        "## Targets",
        "",
        "What is said of the target above holds for each of these (`klimb.target`; `entropy_bonus` and `length_normalized` also as a run's `target:`).",
        "",
        "| target | maximises | law, up to Z | caveat | source |",
        "|---|---|---|---|---|",
        *(cells(f"`{name}`", *row.values()) for name, row in targets.items()),
        "",
        "## How KL is charged",
        "",
        "For `rloo`, `grpo`, `dr_grpo`, `dapo`, `gspo`, `cispo` it is a choice (`kl_penalty`): an estimator (k1 = log pi/ref, k2 its half",
        "square, k3 = ref/pi - 1 - log ref/pi), in the reward or as a loss. As values k1 and k3 are right; their gradients are another matter:",
        "",
        "| `kl_penalty` | its expected gradient |",
        "|---|---|",
        *(cells(f"`{name}`", says) for name, says in penalties.items()),
        "",
        "That is beside `rloo`'s advantage. A group-centred one (`dr_grpo`) gives (G - 1) / G of the reward's gradient, so a loss beside it",
        "counts as beta G / (G - 1); one divided by the group's deviation (`grpo`, `dapo`, ...) prices each prompt's KL differently. Token by token:",
        "",
        *(f"- {what}: {says}" for what, says in traps.items()),
        "",
        "## Not rows of their own",
        "",
        *(f"- `{name}` {why}" for name, why in not_provided.items()),
        "",
    ]
    return "\n".join(lines)


def _show(
    rows: Mapping[str, Mapping[str, object]],
    targets: Mapping[str, Mapping[str, object]],
    not_provided: Mapping[str, str],
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for name, row in rows.items():
        console.print(Text.assemble((name, "bold"), f"  {row['divergence']}"), soft_wrap=True)
        table = Table.grid(padding=(0, 2))
        for label, key in (("draws", "draws"), (str(row["claim"]), "fixed_point"), ("but", "caveat")):
            table.add_row("", Text(f"{label:<9}", style="dim"), Text(str(row[key])))
        console.print(table)
    if targets:
        console.print(
            "\nTargets (klimb.target; entropy_bonus and length_normalized also as a run's target):",
            style="bold",
        )
        for name, row in targets.items():
            console.print(Text.assemble((name, "bold"), f"  {row['maximises']}"), soft_wrap=True)
            table = Table.grid(padding=(0, 2))
            for label, key in (("law", "law"), ("but", "caveat")):
                table.add_row("", Text(f"{label:<9}", style="dim"), Text(str(row[key])))
            console.print(table)
    if not_provided:
        console.print("\nNot rows of their own:", style="bold")
        table = Table.grid(padding=(0, 2))
        for name, why in not_provided.items():
            table.add_row("", name, Text(why))
        console.print(table)
        console.print(
            "\nklimb methods inspect METHOD shows where one stops; --json prints every column.", style="dim"
        )


def _tell(method: str, found: Findings, said: str, strings: list[list[int]], rewards: list[float]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text.assemble((method, "bold"), f": {said}."))
    numbers = Table.grid(padding=(0, 2))
    for label, value in (
        ("KL(fixed point||p)", f"{abs(found.kl_to_target):.3g} nats"),
        ("KL(p||fixed point)", f"{abs(found.kl_from_target):.3g} nats"),
        ("cosine with grad KL(pi||p)", f"{found.alignment:.6f}"),
        ("length against it", f"{found.scale:.4g}"),
        ("noise at the target, at ref", f"{found.noise_at_target:.3g}, {found.noise_at_reference:.3g}"),
        ("drift at the target", f"{found.drift_at_target:.3g}"),
    ):
        numbers.add_row(label, value)
    console.print(numbers)
    table = Table("completion", "reward", "target", "fixed point", box=None, header_style="dim")
    for ids, reward, p, pi in zip(
        strings, rewards, found.target.tolist(), found.fixed_point.tolist(), strict=True
    ):
        text = "".join("." if t == 0 else "ab"[t - 1] for t in ids)
        table.add_row(text, f"{reward:.2f}", f"{p:.4f} {_bar(p)}", f"{pi:.4f} {_bar(pi)}")
    console.print(table)


def _bar(share: float) -> str:
    return "█" * round(20 * share) or "▏"
