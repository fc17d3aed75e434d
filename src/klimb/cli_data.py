"""klimb data: look at a file of judged completions before anything learns from it, write it in another format, make pairs of draws.

Nothing heavy is imported before one of the commands runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from klimb.comparisons import Judged
    from klimb.store import StoredDraws

SHOWN = 20
"""problems that are printed"""

Json = Annotated[bool, typer.Option("--json", help="As JSON on stdout, nothing else there.")]
File = Annotated[str, typer.Argument(help="A file, a folder, or the id of a data set.")]
Split = Annotated[str | None, typer.Option(help="Which part; left out: all rows of a file.")]
PromptColumn = Annotated[str, typer.Option("--prompt_column", help="The column of the prompt.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write: .jsonl, .csv or .parquet.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    data = typer.Typer(
        no_args_is_help=True,
        help="Judged completions: check a file of them, write it in another format, make pairs of draws.",
    )
    data.command("check")(check_)
    data.command("convert")(convert_)
    data.command("pairs")(pairs_)
    app.add_typer(data, name="data")


def check_(
    file: File,
    split: Split = None,
    prompt_column: PromptColumn = "prompt",
    model: Annotated[
        str | None, typer.Option("--model_name_or_path", help="Show it as this model will see it.")
    ] = None,
    max_completion_length: Annotated[
        int, typer.Option("--max_completion_length", min=1, help="Tokens; longer completions are cut.")
    ] = 512,
    json_: Json = False,
) -> None:
    """Say what a file of judged completions is, show three rows as a model will see them, and list what is wrong with it."""
    from klimb.comparisons import judged_rows, kind_of
    from klimb.dataset import read_rows

    rows, names = read_rows(file, split=split)
    judged, problems = judged_rows(file, rows, names, prompt_column=prompt_column)
    record: dict[str, Any] = {
        "file": file,
        "kind": kind_of(names),
        "columns": names,
        "rows": len(judged),
        "completions_a_row": len(judged[0].completions) if judged else 0,
        "better_is_longer": _better_is_longer(judged),
        "problems": problems,
    }
    if model is not None and judged:
        record |= _as_seen(judged, model, max_completion_length)
    elif judged:
        record["examples"] = [_example(row) for row in _spread(judged)]
    if json_:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _show(record)
    if problems:
        raise typer.Exit(2)


def convert_(
    file: File,
    to: Annotated[str, typer.Option(help="pairs, unpaired, ranked, completions, messages or prompts.")],
    output: Output,
    split: Split = None,
    prompt_column: PromptColumn = "prompt",
    form: Annotated[
        str | None,
        typer.Option(
            "--as", help="text or chat: what prompts and completions shall be; left out: as they are."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write judged completions in another of TRL's formats, and say what of them does not come along."""
    from klimb import store
    from klimb.convert import convert
    from klimb.nearest import nearest

    store.check_new(output, force=force)
    if form not in (None, "text", "chat"):
        raise ValueError(f"--as: got {form!r}{nearest(form, ('text', 'chat'))}, expected text or chat")
    made = convert(file, to, split=split, prompt_column=prompt_column, form=form)
    store.write_rows(output, made.rows)
    left = f"; {made.dropped} {made.unit} left out: {made.because}" if made.dropped else ""
    print(f"{output}: {len(made.rows)} rows of {to}, from {made.kind}{left}")


def pairs_(
    draws: Annotated[Path, typer.Argument(help="Draws that klimb wrote, or a run whose plan drew some.")],
    output: Output,
    num_pairs: Annotated[int, typer.Option("--num_pairs", min=1, help="Pairs a prompt, at most.")] = 4,
    whose: Annotated[
        str, typer.Option("--from", help="draws: all of them; target: those that rejection keeps.")
    ] = "draws",
    beta: Annotated[float | None, typer.Option(help="Of the target, reward per nat.")] = None,
    bound: Annotated[
        float | None,
        typer.Option(help="An upper bound of the reward; left out: the largest of each prompt's draws."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the rejection.")] = 0,
    force: Force = False,
) -> None:
    """Make pairs of draws that were rewarded: of two completions of a prompt the one with the larger reward is chosen.

    With --from target the pairs are of the target's own draws (RSO): each draw of the reference is kept with probability
    exp((reward - bound) / beta). Without a --bound the largest reward of a prompt's draws takes its place: what is kept is then
    nearer to the reference than the target is, the more so the fewer the draws.
    """
    from klimb import store

    store.check_new(output, force=force)
    _check_rejection(whose, beta, bound)
    found = store.read_draws(store.draws_path(draws, "plan") if draws.is_dir() else draws)
    if found.reward is None or found.draws.texts is None:
        raise ValueError(
            f"{draws}: these draws have no rewards or no texts; expected those of klimb plan or sample"
        )
    kept = None if beta is None else _kept(draws, found, beta, bound, seed)
    lines = []
    for p, example in enumerate(found.draws.examples):
        rewards, texts = found.reward[p].tolist(), found.draws.texts[p]
        here = list(range(len(texts))) if kept is None else kept[p].nonzero()[:, 0].tolist()
        said: set[tuple[str, str]] = set()
        for i, j in zip(here[:-1:2], here[1::2], strict=True):
            better, worse = (i, j) if rewards[i] > rewards[j] else (j, i)
            pair = (texts[better], texts[worse])
            if rewards[i] == rewards[j] or pair in said or not all(text.strip() for text in pair):
                continue
            said.add(pair)
            lines.append(_pair(example.prompt, example.columns, pair, (rewards[better], rewards[worse])))
            if len(said) == num_pairs:
                break
    if not lines:
        raise ValueError(
            f"{draws}: no two completions of a prompt {'that were kept ' * (kept is not None)}differ in reward; there is nothing "
            "to compare"
        )
    store.write_rows(output, lines)
    print(f"{output}: {len(lines)} pairs of {found.draws.num_prompts} prompts")
    if kept is not None:
        few = int((kept.sum(1) < 2).sum())
        print(f"rejection kept {int(kept.sum())} of {kept.numel()} draws; {few} prompts have fewer than two")


def _check_rejection(whose: str, beta: float | None, bound: float | None) -> None:
    if whose not in ("draws", "target"):
        raise ValueError(f"--from: got {whose!r}, expected draws or target")
    if whose == "draws" and (beta is not None or bound is not None):
        raise ValueError("--beta and --bound are of the target; use --from target, or leave them out")
    if whose == "target" and not (beta is not None and 0 < beta < float("inf")):
        raise ValueError(
            f"--from target: got --beta {beta}, expected a positive number, reward per nat, such as klimb plan found"
        )


def _kept(draws: Path, found: StoredDraws, beta: float, bound: float | None, seed: int) -> Tensor:
    """[P, G] which draws of the reference are draws of the target."""
    import torch

    from klimb.planning import NOT_THE_REFERENCE
    from klimb.samplers.rejection import acceptance

    if found.verb in NOT_THE_REFERENCE or found.draws.log_q is None or found.draws.full_support is False:
        raise ValueError(
            f"{draws}: --from target keeps draws of the reference, and these are "
            f"{NOT_THE_REFERENCE.get(found.verb, 'of another or an unknown law')}"
        )
    assert found.reward is not None
    chances = acceptance(found.reward, beta, bound)
    return torch.rand(chances.shape, generator=torch.Generator().manual_seed(seed)) < chances


def _pair(
    prompt: Any, columns: Mapping[str, object], pair: tuple[str, str], scores: tuple[float, float]
) -> dict[str, object]:
    def said(text: str) -> object:
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    return {
        "prompt": prompt,
        "chosen": said(pair[0]),
        "rejected": said(pair[1]),
        "score_chosen": scores[0],
        "score_rejected": scores[1],
        **{name: value for name, value in columns.items() if value is not None},
    }


def _spread(judged: Sequence[Judged], number: int = 3) -> list[Judged]:
    """Some rows, the first and the last among them."""
    size = min(number, len(judged))
    return [judged[i * (len(judged) - 1) // max(size - 1, 1)] for i in range(size)]


def _example(row: Judged) -> dict[str, Any]:
    return {
        "where": row.where,
        "prompt": row.example.prompt,
        "completions": [
            {"label": label, "text": t} for label, t in zip(row.labels, row.completions, strict=True)
        ],
    }


def _better_is_longer(judged: Sequence[Judged]) -> float | None:
    """Of the pairs whose labels and lengths differ, the share in which the better one has more characters."""
    found = [
        len(row.completions[i]) > len(row.completions[j])
        for row in judged
        for i, one in enumerate(row.labels)
        for j, other in enumerate(row.labels)
        if one > other and len(row.completions[i]) != len(row.completions[j])
    ]
    return sum(found) / len(found) if found else None


def _as_seen(judged: Sequence[Judged], model: str, max_completion_length: int) -> dict[str, Any]:
    """Tokens, what is cut, and three rows with the template applied."""
    from klimb.models.hub import load_model
    from klimb.models.policy import CausalPolicy

    policy = CausalPolicy(*load_model(model))
    lengths = [len(policy.spell(text, max_tokens=1 << 40)) for row in judged for text in row.completions]
    examples = []
    for row in _spread(judged):
        ids = policy.render(row.example)
        spelled = [policy.spell(text, max_tokens=max_completion_length) for text in row.completions]
        examples.append(
            {
                "where": row.where,
                "prompt": policy.tokenizer.decode(ids),
                "prompt_tokens": len(ids),
                "completions": [
                    {
                        "label": label,
                        "text": policy.tokenizer.decode(s),
                        "tokens": len(s),
                        "cut": int(s[-1]) not in policy.end,
                    }
                    for label, s in zip(row.labels, spelled, strict=True)
                ],
            }
        )
    return {
        "model": model,
        "completion_tokens": {"mean": sum(lengths) / len(lengths), "most": max(lengths)},
        "cut": sum(n > max_completion_length for n in lengths),
        "max_completion_length": max_completion_length,
        "examples": examples,
    }


def _show(record: Mapping[str, Any]) -> None:
    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False)
    said = f"{record['rows']} rows, {record['kind']}, {record['completions_a_row']} completions each"
    if record["better_is_longer"] is not None:
        said += f"; the better one is the longer one in {record['better_is_longer']:.0%}"
    if "cut" in record:
        tokens = record["completion_tokens"]
        said += (
            f"; {tokens['mean']:.0f} tokens a completion, at most {tokens['most']}; {record['cut']} are cut at "
            f"{record['max_completion_length']}"
        )
    console.print(Text(f"{record['file']}: {said}"))
    for row in record.get("examples", ()):
        prompt = (
            row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
        )
        parts = [Text(prompt, style="dim")]
        for one in row["completions"]:
            tail = f"  ({one['tokens']} tokens{', cut' if one['cut'] else ''})" if "tokens" in one else ""
            parts.append(Text.assemble((f"{one['label']:g}  ", "bold"), one["text"], (tail, "dim")))
        console.print(Panel(Group(*parts), title=Text(row["where"]), title_align="left"))
    for problem in record["problems"][:SHOWN]:
        console.print(Text(problem, style="red"))
    if len(record["problems"]) > SHOWN:
        console.print(Text(f"and {len(record['problems']) - SHOWN} more", style="red"))
