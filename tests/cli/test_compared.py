"""klimb report of several runs: one frontier, differences that are paired, and a name only where it is earned."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from klimb import store
from klimb.data import Draws, Example
from klimb.report.compared import compare
from klimb.report.files import on_paper

BETA, PROMPTS, DRAWS = 0.5, 20, 12


def written(
    run, *, better=0.0, kl=0.2, seed=0, prompts=PROMPTS, first=0, hashes=(), config=(), forbidden=False
):
    """A measured run whose rewards and log-ratios are known: on each prompt `better` more than the prompt itself gives."""
    (run / "draws").mkdir(parents=True)
    g = torch.Generator().manual_seed(seed)
    hard = torch.arange(first, first + prompts).double()[:, None] % 7  # the same for every run
    reward = hard + better + 0.1 * torch.randn(prompts, DRAWS, generator=g, dtype=torch.float64)
    log_ref = -5 + torch.randn(prompts, DRAWS, generator=g)
    if forbidden:
        reward[0, 0] = -torch.inf
    draws = Draws(
        examples=[Example(f"prompt <b>{i}</b>") for i in range(first, first + prompts)],
        completions=[[torch.tensor([1, 2])] * DRAWS] * prompts,
        finished=torch.ones(prompts, DRAWS, dtype=torch.bool),
        texts=[["word"] * DRAWS] * prompts,
        log_q=log_ref,
    )
    store.write_draws(
        run / "draws" / "measure.parquet",
        draws,
        verb="measure",
        hashes={"model": "m", "reward": "r", "template": "t", "max_completion_length": "2", **dict(hashes)},
        reward=reward,
        log_ref=log_ref,
        log_pi=log_ref + kl,
    )
    store.write_yaml(run / "config.yaml", {"learning_rate": 1e-3, "family": {"r": 8}, **dict(config)})

    def estimate(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 240, "warnings": []}

    mean = reward.mean().item() if not forbidden else 0.0
    numbers = {
        name: estimate(value)
        for name, value in (("reward", mean), ("kl", kl), ("gap", 0.3), ("attained", 0.5))
    }
    store.write_json(run / "measure.json", {"beta": BETA, **numbers})
    store.append_jsonl(
        run / "metrics.jsonl",
        *(
            {"step": i, "reward": estimate(i / 9), "kl": estimate(0.1 * i), "seconds": {"draw": 2.0}}
            for i in (1, 2, 3)
        ),
    )
    return run


@pytest.fixture
def three(tmp_path):
    good = written(tmp_path / "good", better=0.5, seed=1, config={"learning_rate": 1e-2})
    plain = written(tmp_path / "plain", seed=2)
    same = written(tmp_path / "same", seed=3)
    return good, plain, same


def test_the_better_one_is_named_and_the_numbers_are_those_of_the_draws(klimb, three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = klimb("report", *three, "--json")
    assert (status, err) == (0, ""), err
    record = json.loads(out)
    assert record["best"] == "good"
    assert record["prompts"] == PROMPTS
    found = {(d["one"], d["other"]): d for d in record["differences"]}
    assert set(found) == {("plain", "good"), ("same", "good"), ("same", "plain")}
    rewards = {run.name: store.read_draws(run / "draws" / "measure.parquet").reward for run in three}
    expected = (rewards["plain"] - rewards["good"]).mean().item()
    assert found["plain", "good"]["reward"]["value"] == pytest.approx(expected, abs=1e-6)
    assert found["plain", "good"]["objective"]["value"] == pytest.approx(
        expected, abs=1e-6
    )  # both spend as much
    assert found["plain", "good"]["objective"]["high"] < 0 < 0.05 < found["same", "plain"]["p_value"]
    assert record["options"] == {"learning_rate": ["0.01", "0.001", "0.001"]}
    page = (tmp_path / "klimb-report.html").read_text(encoding="utf-8")
    assert "good is nearer to the best policy than each of the 2 others" in page
    assert "★ best" in page
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page


def test_reward_that_costs_as_much_as_it_is_worth_is_no_better(tmp_path):
    dear = written(tmp_path / "dear", better=0.5, kl=1.2, seed=1)
    cheap = written(tmp_path / "cheap", kl=0.2, seed=2)
    found = compare([dear, cheap])
    assert found.best is None
    assert "do not tell whether" in found.words
    assert found.pairs["cheap", "dear"].reward.high < 0  # it has less reward
    assert found.pairs["cheap", "dear"].objective.low < 0 < found.pairs["cheap", "dear"].objective.high


def test_only_shared_prompts_are_compared(tmp_path):
    one, other = written(tmp_path / "one", seed=1), written(tmp_path / "other", seed=2, first=5, better=0.3)
    found = compare([one, other])
    assert (found.prompts, found.left_out) == (15, 10)
    # the mutant: first against first, where prompts differ by whole units
    assert found.pairs["other", "one"].reward.value == pytest.approx(0.3, abs=0.1)


def test_names_are_as_long_as_they_have_to_be(tmp_path):
    one, other = written(tmp_path / "a" / "run", seed=1), written(tmp_path / "b" / "run", seed=2)
    assert [side.name for side in compare([one, other]).sides] == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hashes": {"reward": "another"}}, "differ in reward;"),
        ({"hashes": {"model": "x", "template": "y"}}, "differ in reference, chat template"),
        ({"first": 100}, "0 prompts in common"),
        ({"forbidden": True}, "draws what is forbidden"),
    ],
)
def test_what_cannot_be_compared_is_refused(klimb, tmp_path, change, said):
    one, other = written(tmp_path / "one"), written(tmp_path / "other", **change)
    status, out, err = klimb("report", one, other, "-o", tmp_path / "page.html")
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "page.html").exists()


def test_mistakes_of_a_tired_person(klimb, three, tmp_path):
    good = three[0]
    store.write_json(tmp_path / "same" / "measure.json", {"beta": BETA})
    for arguments, said in (
        ((good, good), "is given twice"),
        ((good, tmp_path / "goof"), "goof: no such folder"),
        ((good, tmp_path / "same"), "has no measured reward"),
        ((good, "-o", tmp_path), "expected the name of a file"),
        ((good, "-o", tmp_path / "no" / "page.html"), "expected the name of a file"),
        ((good, "--figures", good / "config.yaml"), "name a folder that can be written"),
    ):
        status, _, err = klimb("report", *arguments)
        assert status == 2, arguments
        assert said in err
        assert "Traceback" not in err


def test_figures_are_pictures_in_the_pages_colours(klimb, three, tmp_path):
    status, out, err = klimb(
        "report", *three[:2], "-o", tmp_path / "page.html", "--figures", tmp_path / "figures"
    )
    assert (status, err) == (0, "")
    svg, png = tmp_path / "figures" / "overlay.svg", tmp_path / "figures" / "overlay.png"
    assert str(svg) in out
    root = ElementTree.parse(svg).getroot()
    assert root.tag.endswith("svg")
    assert "var(--" not in svg.read_text()
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert on_paper({"a": "var(--accent)"})["a"] == "#1f5fa8"


def test_one_run_elsewhere_with_its_figures_and_numbers(klimb, three, tmp_path):
    page = tmp_path / "elsewhere.html"
    status, out, err = klimb("report", three[0], "-o", page, "--figures", tmp_path / "figures", "--json")
    assert (status, err) == (0, "")
    record = json.loads(out)
    assert record["report"] == str(page)
    assert page.is_file()
    assert not (three[0] / "report.html").exists()
    assert record["measure"]["kl"]["value"] == 0.2
    assert [step["step"] for step in record["steps"]] == [1, 2, 3]
    assert {p.name for p in (tmp_path / "figures").iterdir()} >= {"reward.svg", "kl.png", "time.svg"}
