"""Every block of code in the README and in docs/ is run: configurations by the loader, commands and Python on the tiny model.

What a page shows stands for itself: a YAML block that begins with `# NAME.yaml` and a Python block that begins with `# NAME.py`
are files of the folder in which the page's commands run, and examples/ and the runs of the examples are there too. Only sizes
are changed (`small`). A command whose comment begins with "refused" has to be.
"""

import json
import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import yaml

from klimb.config import load
from klimb.numbers.rules import TABLE
from klimb.rewards.builtin import BUILTIN

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"yaml", "python", "console", "json", "text"}
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.M)


def blocks(text):
    """(language, code, line) of each fenced block."""
    for found in FENCE.finditer(text):
        indent, language, code = found.groups()
        yield (
            language.strip(),
            re.sub(f"^{indent}", "", code, flags=re.M),
            text[: found.start()].count("\n") + 1,
        )


def of(page, language):
    return [(code, line) for name, code, line in blocks(page.read_text(encoding="utf-8")) if name == language]


def having(*languages):
    pages = [page for page in PAGES if any(of(page, language) for language in languages)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


def commands(page):
    """The lines of a console block that call klimb: (arguments, comment)."""
    for code, _ in of(page, "console"):
        for line in code.replace("\\\n", " ").splitlines():
            if line.startswith("$ klimb "):
                said = shlex.split(line[2:], comments=True)[1:]
                comment = line.partition(" # ")[2].strip()
                yield said, comment


def file_name(code):
    """The name in the first line of a block that is a file."""
    found = re.match(r"# ([\w/]+\.(?:py|yaml))\b", code)
    return found.group(1) if found else None


def small(config, model):
    """A configuration as it is, but of a size that a test has time for."""
    config = {**config, "model_name_or_path": model, "dtype": "float32", "device": "cpu", "max_prompts": 8}
    config["max_steps"] = min(config.get("max_steps", 2), 2)
    # the tiny model has few words, and cannot choose much better ones than it does
    for name, most in (("warmup_steps", 1), ("replay_steps", 1), ("prompts_per_step", 4), ("kl_budget", 0.3)):
        if name in config:
            config[name] = min(config[name], most)
    if config.get("method") != "reward_model":
        config |= {"measure_prompts": 4, "measure_draws": 8}
    if config.get("family", {}).get("layers"):
        config["family"] = {**config["family"], "layers": 1}
    if "teacher" in config.get("target", {}) and not config["target"]["teacher"].startswith("runs/"):
        config["target"] = {"teacher": model}
    return config


@pytest.fixture(scope="session")
def roomy(tiny_model, tmp_path_factory):
    """The tiny model with positions for a context of a hundred words."""
    folder = tmp_path_factory.mktemp("docs") / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 512}))
    return str(folder)


@pytest.fixture(scope="session")
def walked(roomy, tmp_path_factory):
    """A folder with the examples and two of their runs, as after `make climb`, of which every page gets a copy."""
    pytest.importorskip("vaderSentiment")
    place = tmp_path_factory.mktemp("walked")
    shutil.copytree(ROOT / "examples", place / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (place / "examples").glob("*.yaml"):
        file.write_text(yaml.safe_dump(small(yaml.safe_load(file.read_text()), roomy)))
    (place / "prompts.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "prompt": f"write a review of the {thing}",
                    "answer": "12",
                    "rules": [{"max_words": 3}],
                    "split": split,
                }
            )
            + "\n"
            for split in ("train", "test")
            for thing in (
                "film",
                "meal",
                "room",
                "kind film",
                "cold meal",
                "warm room",
                "poor film",
                "fine meal",
            )
        )
    )
    shutil.copy(ROOT / "examples/data/pairs.jsonl", place / "pairs.jsonl")
    shutil.copy(ROOT / "examples/data/critic.txt", place / "critic.txt")
    (place / "mine.py").write_text(
        "import torch\n\n\ndef honest(completions, **columns):\n    return [float(len(text)) for text in completions]\n\n\n"
        "def objective(log_pi, log_target):\n    return (log_target - log_pi).var(-1) / 2\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("klimb.run.report", lambda path, watch=None: None)
        for name in ("reviews", "dpo"):
            call(["climb", "-q", "-c", f"examples/{name}.yaml"])
    return place


@pytest.fixture
def place(walked, tmp_path, monkeypatch):
    """The current folder of a page's blocks."""
    shutil.copytree(walked, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def call(arguments):
    """The exit status of a command, run in this process."""
    from klimb.cli import main

    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


def put_files(page, model):
    """Write the blocks of a page that are files."""
    for code, _ in of(page, "python"):
        if name := file_name(code):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(code)
    for code, _ in of(page, "yaml"):
        if name := file_name(code):
            Path(name).write_text(yaml.safe_dump(small(yaml.safe_load(code), model)))


def test_every_block_says_what_it_is():
    wrong = [
        f"{p.name}:{line} {name!r}"
        for p in PAGES
        for name, _, line in blocks(p.read_text())
        if name not in LANGUAGES
    ]
    assert wrong == []
    assert list(blocks("a\n  ```python\n  x = 1\n  ```\n")) == [("python", "x = 1\n", 2)]


def read_configurations(page):
    """A part of a configuration is one with prompts and a reward."""
    for code, line in of(page, "yaml"):
        given = yaml.safe_load(code)
        taught = {"context", "context_file", "teacher"} & set(given.get("target", {}))
        whole = {"dataset_name": "prompts.jsonl", **given}
        if "reward_funcs" not in given and not taught and given.get("learn_from") != "data":
            whole["reward_funcs"] = "mine.py:honest"
        file = Path("whole.yaml")
        file.write_text(yaml.safe_dump(whole))
        try:
            load(file)
        except ValueError as error:
            raise AssertionError(f"{page.name}:{line}: {error}") from error


def run_commands(page, model, capsys):
    """Each ends as it should: 0, or 2 where the page says that it is refused."""
    put_files(page, model)
    Path("small.yaml").write_text(yaml.safe_dump(small({}, model)))
    for arguments, comment in commands(page):
        said = [model if part == "smollm2-135m" else part for part in arguments]
        for name, least in (("--max_steps", "2"), ("--num-draws", "4")):
            if name in said:
                said[said.index(name) + 1] = least
        if said[0] in ("plan", "train", "climb") and not {"--resume", "-c", "--help"} & set(said):
            said += ["-c", "small.yaml"]
        if "-c" in said and said[0] in ("plan", "train", "climb"):
            file = Path(said[said.index("-c") + 1])
            written = (
                yaml.safe_load(file.read_text()).get("output_dir", "runs/klimb") if file.is_file() else ""
            )
            written = said[said.index("--output_dir") + 1] if "--output_dir" in said else written
            if written and not comment.startswith("refused"):
                shutil.rmtree(written, ignore_errors=True)
        status = call(said)
        err = capsys.readouterr().err
        assert status == (2 if comment.startswith("refused") else 0), (
            f"{page.name}: klimb {' '.join(said)}\n{err}"
        )
        assert "Traceback" not in err


def run_python(page, model):
    """The blocks of a page one after the other, with what the earlier ones named."""
    put_files(page, model)
    names = {"__name__": page.stem}
    for code, line in of(page, "python"):
        if "from trl" in code:
            pytest.importorskip("trl")
        for shown in ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"):
            code = code.replace(shown, model)
        code = re.sub(r"max_steps=\d+", "max_steps=2", re.sub(r"limit=\d+", "limit=8", code))
        with warnings.catch_warnings():
            if "from trl" in code:
                warnings.simplefilter("ignore")
            exec(compile("\n" * line + code, str(page), "exec"), names)


@having("yaml")
def test_configurations_are_taken(page, place):
    read_configurations(page)


@having("json")
def test_rows_are_json(page):
    for code, line in of(page, "json"):
        assert all(json.loads(row) for row in code.splitlines()), f"{page.name}:{line}"


@having("console")
def test_commands_run(page, place, roomy, capsys, monkeypatch):
    report = lambda path, watch=None: Path(path) / "report.html"  # noqa: E731  it has tests of its own
    monkeypatch.setattr("klimb.run.report", report)
    run_commands(page, roomy, capsys)


@having("python")
def test_python_runs(page, place, roomy, capsys):
    run_python(page, roomy)


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("```yaml\nlearning_rat: 1\n```\n", lambda page, *_: read_configurations(page)),
        ("```yaml\nbeta: 0\n```\n", lambda page, *_: read_configurations(page)),
        ("```console\n$ klimb target --ref 0.5,0.5 --reward 1,0 --beta 0\n```\n", run_commands),
        ("```console\n$ klimb target --ref 0.5,0.5 --reward 1,0 --beta 1   # refused\n```\n", run_commands),
        ("```python\nassert 1 + 1 == 3\n```\n", lambda page, model, _: run_python(page, model)),
    ],
)
def test_a_wrong_block_is_found(text, run, place, tmp_path, roomy, capsys):
    page = tmp_path / "wrong.md"
    page.write_text(text)
    with pytest.raises(AssertionError):
        run(page, roomy, capsys)


def first_cells(page, header):
    """What stands in the first column of the table that begins with this header."""
    table = re.search(
        rf"^\| {re.escape(header)} \|.*\n(?:\|.*\n)+", (ROOT / "docs" / page).read_text(), re.M
    ).group()
    return [row.split("|")[1].strip() for row in table.splitlines()[2:]]


def test_the_tables_of_rewards_and_verdicts_are_the_codes():
    assert {name.strip("`") for name in first_cells("rewards.md", "name")} == set(BUILTIN)
    assert first_cells("diagnosis.md", "verdict") == [rule.name for rule in TABLE]


def test_every_file_and_every_record_of_a_run_is_explained(walked):
    said = (ROOT / "docs/run.md").read_text()
    run = walked / "runs/reviews"
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    unknown = {name for name in step if f"`{name}`" not in said}
    assert unknown == set()
    tops = {path.name for path in run.iterdir()}
    explained = " ".join(first_cells("run.md", "file"))
    assert {name for name in tops if f"`{name}" not in explained} == set()
    assert not any(f"`{name}`" in said for name in ("los", "klimb.json"))
