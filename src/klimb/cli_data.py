"""klimb data: look at a file of judged completions before anything learns from it, and make pairs of draws.

Nothing heavy is imported before one of the commands runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from klimb.comparisons import Judged

SHOWN = 20
"""problems that are printed"""

Json = Annotated[bool, typer.Option("--json", help="As JSON on stdout, nothing else there.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    data = typer.Typer(
        no_args_is_help=True, help="Judged completions: check a file of them, make pairs of draws."
    )
    data.command("check")(check_)
    data.command("pairs")(pairs_)
    app.add_typer(data, name="data")


def check_(
    file: Annotated[str, typer.Argument(help="A file, a folder, or the id of a data set.")],
    split: Annotated[str | None, typer.Option(help="Which part; left out: all rows of a file.")] = None,
    prompt_column: Annotated[
        str, typer.Option("--prompt_column", help="The column of the prompt.")
    ] = "prompt",
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
        "same_length": sum(len(set(map(len, row.completions))) == 1 for row in judged),
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


def pairs_(
    draws: Annotated[Path, typer.Argument(help="Draws that klimb wrote, or a run whose plan drew some.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of pairs, .jsonl.")],
    num_pairs: Annotated[int, typer.Option("--num_pairs", min=1, help="Pairs a prompt, at most.")] = 4,
) -> None:
    """Make pairs of draws that were rewarded: of two completions of a prompt the one with the larger reward is chosen."""
    from klimb import store

    if output.suffix != ".jsonl":
        raise ValueError(f"-o {output}: expected a file ending in .jsonl")
    found = store.read_draws(store.draws_path(draws, "plan") if draws.is_dir() else draws)
    if found.reward is None or found.draws.texts is None:
        raise ValueError(
            f"{draws}: these draws have no rewards or no texts; expected those of klimb plan or sample"
        )
    lines = []
    for p, example in enumerate(found.draws.examples):
        rewards, texts = found.reward[p].tolist(), found.draws.texts[p]
        said: set[tuple[str, str]] = set()
        for i, j in zip(range(0, len(texts) - 1, 2), range(1, len(texts), 2), strict=False):
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
            f"{draws}: no two completions of a prompt differ in reward; there is nothing to compare"
        )
    store.write_whole(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(f"{output}: {len(lines)} pairs of {found.draws.num_prompts} prompts")


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
