"""The commands that need no model: klimb derive, target, divergence.

Nothing heavy is imported before one of them runs.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from klimb.problems import Given

CHECKS = (
    "reversed_kl",
    "no_beta",
    "beta_upside_down",
    "wrong_sign",
    "entropy_for_kl",
    "reward_in_log",
    "log_mean_exp",
    "forward_kl",
    "z_dropped_early",
    "z_kept",
    "z_averaged",
    "z_moves",
    "constant",
    "rescaled",
    "undivided",
    "z_to_the_end",
)
"""what --check knows besides orders; written out so that --help needs no torch"""

Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, nothing else there.")]
# text, so that what is no number is told as everywhere, and 1/2 is one
Beta = Annotated[str | None, typer.Option(metavar="NUMBER", help="Reward per nat of KL.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("derive")(derive_)
    app.command("target")(target_)
    app.command("divergence")(divergence_)


def derive_(
    run: Annotated[
        Path | None, typer.Argument(help="Directory of a run: derive it on its own draws.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML with beta, ref and reward.")
    ] = None,
    ref: Annotated[str | None, typer.Option(help="Probabilities of the reference: 0.6,0.3,0.1")] = None,
    reward: Annotated[str | None, typer.Option(help="As many rewards: 1,0,2 (-inf forbids)")] = None,
    beta: Beta = None,
    policy: Annotated[
        str | None, typer.Option(help="A policy to show it at; left out: a random one.")
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="ORDER|NAME",
            help="Check your own derivation: an order of the steps, such as 1,2,4,3,5,6, or a changed objective: "
            + ", ".join(CHECKS)
            + ".",
        ),
    ] = None,
    policies: Annotated[int, typer.Option(min=1, max=100_000, help="Random policies to try it at.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the random policies.")] = 0,
    json_: Json = False,
) -> None:
    """Derive min KL(pi||p) from max reward - beta KL, each line with both sides as numbers."""
    given = _given(run, config, ref, reward, beta, policy)
    import torch

    from klimb.exact.check import check as checked
    from klimb.exact.derivation import derive, values_at
    from klimb.exact.divergences import entropy
    from klimb.exact.remarks import remarks

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    if check is not None:
        found = checked(check, given.problem, num_random=policies, generator=generator())
        return _result({"check": asdict(found)}, json_, lambda screen: screen.verdict(found))
    log_pi = given.log_pi
    shown = "the run's policy" if given.run else "yours"
    if log_pi is None:
        log_pi, shown = given.problem.random_policies(1, generator=generator())[0], "a random policy"
    chain = derive(given.problem, log_pi, num_random=policies, generator=generator())
    notes = remarks(given.problem, num_random=policies, generator=generator())
    about = None
    if given.run is not None:
        width = entropy(log_pi).exp().mean().item()
        about = {**given.run, "effective": width, "restricted": values_at(given.problem, log_pi)}
    small = given.problem.log_ref.numel() <= 10_000
    record = {
        "source": given.source,
        "beta": given.problem.beta,
        "prompts": _laws(given, log_pi) if small else None,
        "shown": shown,
        "derivation": asdict(chain),
        "remarks": [asdict(note) for note in notes],
        "run": about,
    }
    _result(
        record,
        json_,
        lambda screen: screen.derivation(
            chain,
            notes,
            given.problem,
            log_pi.exp().tolist(),
            source=given.source,
            shown=shown,
            run=about,
        ),
    )


def target_(
    ref: Annotated[str, typer.Option(help="Probabilities of the reference: 0.6,0.3,0.1")],
    reward: Annotated[str, typer.Option(help="As many rewards: 1,0,2 (-inf forbids)")],
    beta: Beta = None,
    sweep: Annotated[str | None, typer.Option(help="Several betas, a row each: 0.1,0.5,1")] = None,
    json_: Json = False,
) -> None:
    """The best policy p = ref exp(r/beta) / Z of a small example: p, log Z, KL both ways, entropy."""
    if (beta is None) == (sweep is None):
        raise ValueError("target: expected one of --beta 0.5 and --sweep 0.1,0.5,1")
    from klimb.exact.problem import best
    from klimb.problems import from_words, number, numbers

    betas = numbers(sweep or "", name="sweep") if beta is None else [number(beta, name="beta")]
    given = [from_words(ref, reward, at).problem for at in betas]
    found = [best(problem) for problem in given]
    laws, rewards = given[0].log_ref[0].exp().tolist(), given[0].reward[0].tolist()
    if sweep is None:
        record = {"ref": laws, "reward_of": rewards, **asdict(found[0])}
    else:
        record = {"ref": laws, "reward_of": rewards, "sweep": [asdict(row) for row in found]}
    _result(record, json_, lambda screen: screen.target(found, laws, rewards))


def divergence_(
    p: Annotated[str, typer.Argument(metavar="P", help="Probabilities: 0.5,0.5")],
    q: Annotated[str, typer.Argument(metavar="Q", help="As many probabilities: 0.9,0.1")],
    alpha: Annotated[str, typer.Option(help="Orders of the alpha and Rényi families.")] = "0.5,2",
    share: Annotated[float, typer.Option(help="Of P in the skewed mixtures.")] = 0.1,
    json_: Json = False,
) -> None:
    """Every divergence between two laws, both ways, and what their asymmetry says."""
    from klimb.exact.divergences import all_divergences, asymmetry
    from klimb.exact.problem import law
    from klimb.problems import numbers

    log_p, log_q = (law(numbers(text, name=name), name=name) for text, name in ((p, "P"), (q, "Q")))
    rows = all_divergences(log_p, log_q, alphas=numbers(alpha, name="alpha"), share=share)
    found = asymmetry(log_p, log_q)
    record = {
        "p": log_p.exp().tolist(),
        "q": log_q.exp().tolist(),
        "divergences": [asdict(row) for row in rows],
        "asymmetry": asdict(found),
    }
    _result(record, json_, lambda screen: screen.divergences(rows, found))


def _given(
    run: Path | None,
    config: Path | None,
    ref: str | None,
    reward: str | None,
    price: str | None,
    policy: str | None,
) -> Given:
    """The one thing that was given; nothing at all is the built-in example."""
    words = ref is not None or reward is not None or policy is not None
    if [run is not None, config is not None, words].count(True) > 1:
        raise ValueError("derive: expected one of a run, -c FILE, and --ref with --reward")
    from klimb import problems

    beta = None if price is None else problems.number(price, name="beta")
    if run is not None:
        return problems.from_run(run, beta=beta)
    if config is not None:
        return problems.from_yaml(config, beta=beta)
    if not words:
        return problems.built_in(beta=beta)
    if ref is None or reward is None or beta is None:
        raise ValueError(
            "derive: expected --ref 0.6,0.3,0.1 --reward 1,0,2 --beta 0.5, all three, or none of them"
        )
    return problems.from_words(ref, reward, beta, policy=policy)


def _laws(given: Given, log_pi: Any) -> list[dict[str, Any]]:
    """Ref, reward, p, policy and log Z of every prompt, without the padding."""
    problem = given.problem
    rows = []
    for x in range(len(problem.log_ref)):
        inside = problem.log_ref[x] > -float("inf")
        rows.append(
            {
                "ref": problem.log_ref[x][inside].exp().tolist(),
                "reward": problem.reward[x][inside].tolist(),
                "p": problem.log_p[x][inside].exp().tolist(),
                "policy": log_pi[x][inside].exp().tolist(),
                "log_z": problem.log_z[x].item(),
            }
        )
    return rows


def _result(record: dict[str, Any], json_: bool, render: Any) -> None:
    if json_:
        from klimb.store import as_json

        print(as_json(record))
        return
    from rich.console import Console

    from klimb import screen_derive

    Console(highlight=False).print(render(screen_derive))
