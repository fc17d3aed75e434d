"""The report of a run: it says what is there and what is not, opens offline, and holds untrusted text inert."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from klimb import store
from klimb.data import Draws, Example
from klimb.numbers.frontier import default_betas
from klimb.numbers.frontier import frontier as library_frontier
from klimb.report import draws as report_draws
from klimb.report import found as report_found
from klimb.report import frontier_chart, page, reached, step_charts, time_chart, words, write_report
from klimb.report.draws import opening

pytest.importorskip("altair")
vl_convert = pytest.importorskip("vl_convert")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = (
    "</td></script><script>document.title = 'stolen'</script><img src=x onerror=\"document.title='stolen'\">"
)
THINGS = ["a kettle", "a night train", "an umbrella", "a small bakery", "a bicycle bell", "a winter coat"]


def est(value, width, *, n=2048, warnings=()):
    return {
        "value": value,
        "low": value - width,
        "high": value + width,
        "n": n,
        "warnings": list(warnings),
    }


def make_plan(*, num=40):
    """A Gaussian reward of mean 0.3: reward 0.3 + 0.3/beta at KL 0.15/beta (schematic), less sure as beta falls."""
    frontier = []
    for i in range(num):
        kl = 0.01 * 260 ** (i / (num - 1))
        reliable = kl < 1.7
        width = 0.02 + 0.015 * kl**2
        said = [] if reliable else ["unreliable: log(draws) - KL = 1.9 nats, below 2.5; needs about 92 draws"]
        frontier.append(
            {
                "beta": 0.1 / math.sqrt(kl),
                "reward": est(0.3 + 0.28 * math.sqrt(kl), width, warnings=said),
                "kl": est(kl, 0.08 * kl, warnings=said),
                "log_z": est(2 * kl, 0.1 * kl, warnings=said),
                "ess": 64 * math.exp(-kl),
                "pareto_k": 0.2 + 0.2 * kl,
                "reliable": reliable,
            }
        )
    best = [
        {
            "n": n,
            "reward": est(0.3 + 0.2 * math.sqrt(math.log(n)), 0.02),
            "kl": est(math.log(n) - (n - 1) / n, 0),
        }
        for n in (1, 2, 4, 8, 16)
    ]
    return {
        "beta": {"value": 0.1, "why": "the beta at which the best policy spends 1 nat"},
        "frontier": frontier,
        "best_of_n": best,
        "reference": {"reward": est(0.3, 0.02), "reward_std": 0.31},
        "prompts": [{"id": str(i), "prompt": "p", "dead": i < 3} for i in range(96)],
        "of a later version": 1,
    }


MEASUREMENT = {
    "reward": est(0.52, 0.025),
    "kl": est(1.18, 0.11),
    "beta": 0.1,
    "gap": est(0.061, 0.014),
    "warnings": ["3 of 96 prompts gave all draws the same reward"],
    "log_z": est(4.1, 0.3),
    "attained": {"value": 0.62, "low": 0.55, "high": 0.69, "n": 2048, "warnings": []},
    "reference": {"reward": est(0.29, 0.02)},
    "optimum": {"reward": est(0.60, 0.03), "kl": est(1.02, 0.09)},
    "frontier_efficiency": est(0.74, 0.06),
    "diagnosis": {
        "verdict": "undertrained",
        "because": "KL and reward are both below the best policy's",
        "advice": "Train longer or with a larger learning rate.",
    },
}


def make_steps(num):
    g = torch.Generator().manual_seed(3)
    for step in range(1, num + 1):
        up = 1 - math.exp(-step / 12)
        noise = 0.03 * torch.randn(3, generator=g)
        reward, kl = 0.3 + 0.25 * up + noise[0].item(), max(1.2 * up + noise[1].item(), 0.0)
        record = {
            "step": step,
            "estimates": {}
            if step == 1  # a step that only replays
            else {
                "reward": est(reward, 0.06),
                "kl": est(kl, 0.1),
                "regularised_reward": est(reward - 0.1 * kl, 0.06),
            },
            "numbers": {"grad_norm": 0.8},
            "seconds": {"draw": 5.3 + noise[2].item(), "score": 3.3, "update": 6.0},
        }
        if step % 2:
            record |= record.pop("estimates")  # both are understood
        if step % 10 == 0:
            record["evaluation"] = {"reward": est(0.3 + 0.22 * up, 0.03), "kl": est(1.18 * up, 0.08)}
            record["evaluation"]["objective"] = est(0.3 + 0.1 * up, 0.03)
        yield record


def make_draws(num_prompts, num_draws, *, better=0.0, text=None):
    g = torch.Generator().manual_seed(11)
    examples = [
        Example(f"Write a short review of {THINGS[p % len(THINGS)]}.", {"topic": p})
        for p in range(num_prompts)
    ]
    lengths = torch.randint(3, 9, (num_prompts, num_draws), generator=g)
    feelings = [
        "It was fine, I suppose.",
        "Lovely! I would go back at once.",
        "Cold, late and loud.",
        "Wonderful.",
    ]
    texts = [
        [
            text or f"{feelings[(p + d) % 4]} Number {p}-{d} of a long list of opinions."
            for d in range(num_draws)
        ]
        for p in range(num_prompts)
    ]
    draws = Draws(
        examples,
        [[torch.arange(int(n)) for n in row] for row in lengths],
        finished=lengths < 8,
        texts=texts,
        log_q=-torch.rand(num_prompts, num_draws, generator=g) * 40,
        full_support=True,
    )
    return draws, better + torch.randn(num_prompts, num_draws, generator=g).mul(0.3)


def write_draws(run, name, verb, size, **options):
    draws, reward = make_draws(*size, **options)
    (run / "draws").mkdir(exist_ok=True)
    known = {"reward": reward, "log_ref": draws.log_q - 1.25, "log_pi": draws.log_q}
    store.write_draws(run / "draws" / f"{name}.parquet", draws, verb=verb, hashes={"model": "aa"}, **known)


def make_run(run, *, steps=60, size=(24, 16), measured=True, text=None):
    """A whole run, as the verbs would leave it."""
    run.mkdir(exist_ok=True)
    store.write_yaml(run / "config.yaml", {"model_name_or_path": "smollm2-135m", "kl_budget": 1.0, "seed": 7})
    store.write_json(run / "env.json", store.environment(seed=7, reward_hashes={"reward": "c0ffee"}))
    store.write_json(run / "plan.json", make_plan())
    store.append_jsonl(run / "metrics.jsonl", *make_steps(steps))
    write_draws(run, "plan", "plan", size)
    write_draws(run, "train-000060", "train", (4, 8), better=0.1)
    if measured:
        store.write_json(run / "measure.json", MEASUREMENT)
        write_draws(run, "measure-policy", "measure", size, better=0.25, text=text)
        write_draws(run, "measure-reference", "measure", size)
    return run


def hash_of(script):
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


class Page(HTMLParser):
    """The draws it carries, texts of all elements, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.words, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if (
            data.strip()
            and self.inside == "script"
            and self.tags[-1] == ("script", {"type": "application/json", "id": "draws-data"})
        ):
            for who, _, completion, more, *_, extreme in (row[:9] for row in json.loads(data)["rows"]):
                name = "reference" if who else "policy"
                self.rows.append({"who": name, "text": completion, "more": more, "extreme": extreme})
        if self.inside not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_the_verdicts_stand_at_the_top(tmp_path):
    run = make_run(tmp_path / "run", steps=10, size=(8, 4))
    second = {"name": "mode dropped", "confidence": "likely", "says": "It gave up modes.", "advice": HOSTILE}
    first = {"name": "undertrained", "confidence": "sure", "says": "KL is below.", "advice": "Go on."}
    diagnosis = {
        "verdict": "undertrained",
        "confidence": "sure",
        "because": "KL 0.51",
        "advice": "Go on.",
        "command": "klimb climb --max_steps 112",
        "verdicts": [first, second],
    }
    store.write_json(run / "measure.json", {**MEASUREMENT, "diagnosis": diagnosis})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    top = page.text.partition("Estimates")[0]
    assert "of the way from the reference to the best policy" in top
    assert "KL is below. It gave up modes." in top
    assert "Diagnosis: undertrained (sure)." in top
    assert "klimb climb --max_steps 112" in top
    assert "Also: mode dropped (likely)." in top
    assert not [tag for tag, _ in page.tags if tag == "img"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run with a hostile completion, its page as text and as tags."""
    run = make_run(tmp_path_factory.mktemp("run") / "reviews", text=HOSTILE)
    page = write_report(run).read_text(encoding="utf-8")
    return run, page, Page(page)


def charts_of(page):
    return json.loads(re.search(r'id="charts">(.*?)</script>', page, re.DOTALL).group(1))


def rows_of(spec, layer):
    return spec["datasets"][layer.get("data", spec.get("data"))["name"]]


# A whole run.


def test_the_headline_says_how_far_the_policy_went(whole):
    assert (
        "The policy went 62 % [55 to 69] of the way from the reference to the best policy at beta 0.1."
        in whole[2].text
    )


def test_every_estimate_of_the_panel_stands_with_its_interval(whole):
    text = whole[2].text
    for value in (
        "0.52 [0.49 to 0.55]",
        "1.18 [1.07 to 1.29] nats",
        "62 % [55 to 69]",
        "0.06 [0.05 to 0.07]",
    ):
        assert value in text, value
    assert "Diagnosis: undertrained." in text
    assert "3 of 96 prompts gave all draws the same reward" in text


def test_the_page_is_in_the_run_and_nothing_else_is_left(whole):
    run = whole[0]
    assert (run / "report.html").is_file()
    assert not list(run.glob(".*"))


def test_nothing_is_fetched_from_anywhere(whole):
    _, page, parsed = whole
    for tag, attributes in parsed.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    head = page[: page.index("<body>")]
    assert "default-src 'none'" in head
    assert "@import" not in head
    assert "url(" not in head


def test_the_policy_of_the_page_names_exactly_its_own_scripts(whole):
    page = whole[1]
    named = re.findall(r"'(sha256-[^']+)'", page[: page.index("<body>")])
    found = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert [hash_of(script) for script in found] == named
    assert len(named) == 2
    assert "'unsafe-inline'" not in re.search(r"script-src[^\"]*", page).group(0)


def test_a_hostile_completion_stays_text(whole):
    _, page, parsed = whole
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    data = [{"type": "application/json", "id": name} for name in ("charts", "draws-data")]
    assert scripts == [*data, {}, {}]
    assert not [tag for tag, attributes in parsed.tags if tag == "img" or "onerror" in attributes]
    shown = [row["text"] for row in parsed.rows if row["who"] == "policy"]
    assert shown
    assert all(HOSTILE in text for text in shown)  # the mutant below loses it
    written = HOSTILE.replace("<", "\\u003c").replace(">", "\\u003e").replace('"', '\\"')
    assert written in page
    assert len(re.findall("<script", page.replace(written, HOSTILE))) > len(re.findall("<script", page))


def test_hostile_words_elsewhere_stay_text(tmp_path):
    run = make_run(tmp_path / "run", steps=12, size=(8, 4))
    plan = make_plan()
    plan["beta"]["why"] = plan["frontier"][-1]["reward"]["warnings"][0] = HOSTILE
    store.write_json(run / "plan.json", plan)
    store.write_json(run / "measure.json", {**MEASUREMENT, "diagnosis": {"verdict": HOSTILE}})
    store.write_json(run / "env.json", {"command": ["klimb", HOSTILE], "versions": {HOSTILE: HOSTILE}})
    (run / "config.yaml").write_text(HOSTILE)
    records = [{**record, "seconds": {HOSTILE: 1.0}} for record in make_steps(12)]
    (run / "metrics.jsonl").unlink()
    store.append_jsonl(run / "metrics.jsonl", *records)
    page = write_report(run).read_text(encoding="utf-8")
    tags = Page(page).tags
    assert len([tag for tag, _ in tags if tag == "script"]) == 4
    assert not [tag for tag, _ in tags if tag == "img"]
    assert charts_of(page)["time"]["encoding"]["color"]["scale"]["domain"] == [HOSTILE]


def test_tables_have_headers_and_fields_have_labels(whole):
    tags = whole[2].tags
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in tags if tag == "th")
    fields = [tag for tag, attributes in tags if tag in ("input", "select")]
    assert len(fields) == len([tag for tag, _ in tags if tag == "label"]) == 8
    regions = [attributes for tag, attributes in tags if attributes.get("class") == "scroll"]
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in regions)
    charts = [attributes for tag, attributes in tags if attributes.get("class") == "chart"]
    assert len(charts) == 5
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)


# The figures.


def test_the_charts_are_drawn_without_a_warning(whole, capfd):
    charts = charts_of(whole[1])
    assert list(charts) == ["frontier", "kl", "regularised_reward", "reward", "time"]  # as tojson sorts them
    for name, spec in charts.items():
        svg = vl_convert.vegalite_to_svg({**spec, "width": 600})
        assert svg.count("<path") > 5, name
    assert "WARN" not in capfd.readouterr().err


def test_the_frontier_shows_what_was_planned_and_reached(whole):
    spec = charts_of(whole[1])["frontier"]
    rows = [row for layer in spec["layer"] for row in rows_of(spec, layer)]
    marks = {row["name"]: row for row in rows if "kind" in row}
    assert (marks["reference"]["kl"], marks["reference"]["reward"]) == (0, 0.3)
    assert [name for name in marks if name.startswith("best of")] == [f"best of {n}" for n in (2, 4, 8, 16)]
    policy = marks["trained policy, held-out prompts"]
    assert (policy["kl"], policy["reward"]) == (1.18, 0.52)
    assert (policy["kl_low"], policy["kl_high"]) == pytest.approx((1.07, 1.29))
    assert (policy["low"], policy["high"]) == pytest.approx((0.495, 0.545))


def test_what_is_not_trusted_is_hatched_and_dashed_and_only_that(whole):
    spec = charts_of(whole[1])["frontier"]
    layers = spec["layer"]
    plan = make_plan()
    border = max(point["kl"]["value"] for point in plan["frontier"] if point["reliable"])
    (hatch,) = [layer for layer in layers if "kl2" in rows_of(spec, layer)[0]]
    strokes = rows_of(spec, hatch)
    assert len(strokes) > 10
    assert min(stroke["kl"] for stroke in strokes) >= border
    assert max(stroke["kl2"] for stroke in strokes) <= plan["frontier"][-1]["kl"]["value"] + 1e-9
    (line,) = [layer for layer in layers if "strokeDash" in layer["encoding"]]
    for row in rows_of(spec, line):
        assert row["trusted"] == (row["kl"] <= border) or row["kl"] == border
    assert any("not trusted" in str(layer["encoding"].get("text")) for layer in layers)


def test_a_glitch_in_the_middle_leaves_the_rest_trusted():
    plan = make_plan(num=10)
    for i, point in enumerate(plan["frontier"]):
        point["reliable"] = i != 4
    points = report_found.frontier(found_with(plan=plan))
    trusted = {}
    for row in frontier_chart._curve(points):
        trusted.setdefault(row["piece"], []).append((row["trusted"], row["kl"]))
    kl = [point["kl"]["value"] for point in plan["frontier"]]
    assert [[x for _, x in piece] for piece in trusted.values()] == [kl[:4], kl[3:6], kl[5:]]
    assert [piece[0][0] for piece in trusted.values()] == [True, False, True]


def test_steps_that_only_replay_are_left_out_and_evaluations_are_shown(whole):
    assert (
        len(charts_of(whole[1])["regularised_reward"]["layer"]) == 5
    )  # three of the steps, two of evaluations
    spec = charts_of(whole[1])["reward"]
    drawn = rows_of(spec, spec["layer"][0])
    assert [row["step"] for row in drawn] == list(range(2, 61))
    tested = rows_of(spec, spec["layer"][-1])
    assert [row["step"] for row in tested] == [10, 20, 30, 40, 50, 60]


def test_the_time_sums_up(whole):
    spent = time_chart.seconds_spent(report_found.read_run(whole[0]))
    assert list(spent) == ["update", "draw", "score"]
    assert spent["update"] == pytest.approx(360)
    assert spent["score"] == pytest.approx(198)
    assert "seconds in 60 steps" in whole[2].text


def test_the_prediction_between_two_points_of_the_grid():
    """Linear in log beta: half way between the betas 1 and 0.25, at 0.5, value and ends are the means."""
    grid = [
        {"beta": beta, "reward": est(reward, width), "kl": est(kl, 0.1), "reliable": True}
        for beta, reward, width, kl in ((1.0, 0.2, 0.1, 0.5), (0.25, 0.6, 0.3, 2.0))
    ]
    point = report_found.predicted(found_with(plan={"beta": 0.5, "frontier": grid}))
    assert (point.reward.value, point.reward.low, point.reward.high) == pytest.approx((0.4, 0.2, 0.6))
    assert point.kl.value == pytest.approx(1.25)
    for beta, reward in ((1.0, 0.2), (0.25, 0.6)):
        assert report_found.predicted(
            found_with(plan={"beta": beta, "frontier": grid})
        ).reward.value == pytest.approx(reward)
    for outside in (1.01, 0.2):
        assert report_found.predicted(found_with(plan={"beta": outside, "frontier": grid})) is None


def found_with(**files):
    nothing = {"config": "", "environment": {}, "plan": {}, "steps": [], "measurement": {}, "draws": []}
    return report_found.Found(path=Path("run"), **{**nothing, **files})


def test_the_ellipse_is_that_of_resampled_prompts(tmp_path):
    """Its half widths are those of a bootstrap over prompts, by the root of the quantiles' ratio; the mutant is one axis'."""
    run = make_run(tmp_path / "run", steps=2, size=(64, 8))
    draws, reward = make_draws(64, 8, better=0.25)
    away = reward + 0.5 * torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    known = {"reward": reward, "log_pi": draws.log_q, "log_ref": draws.log_q - away}
    (run / "draws" / "measure-policy.parquet").unlink()
    store.write_draws(run / "draws" / "measure.parquet", draws, verb="measure", hashes={}, **known)
    found = report_found.read_run(run)
    policy = report_found.as_point(found.measurement)
    rows = reached.ellipse_rows(found, policy)
    means = torch.stack([away.mean(1), reward.mean(1)]).double()
    picks = torch.randint(64, (4000, 64), generator=torch.Generator().manual_seed(3))
    resampled = means[:, picks].mean(-1)
    wide = [resampled[i].std().item() * math.sqrt(reached.CHI2) for i in (0, 1)]
    for i, (name, centre) in enumerate((("kl", policy.kl.value), ("reward", policy.reward.value))):
        assert max(row[name] for row in rows) - centre == pytest.approx(wide[i], rel=0.06)
        assert max(row[name] for row in rows) - centre != pytest.approx(wide[1 - i], rel=0.06)
    together = [(row["kl"] - policy.kl.value) * (row["reward"] - policy.reward.value) for row in rows[:-1]]
    expected = torch.cov(resampled)[0, 1].item() * reached.CHI2 / 2
    assert sum(together) / len(together) == pytest.approx(expected, rel=0.1)


def test_the_ceiling_is_never_below_the_frontier():
    g = torch.Generator().manual_seed(1)
    reward = torch.randn(32, 64, generator=g)
    points = library_frontier(reward, default_betas(reward), generator=g, num_resamples=200)
    plan = {
        "frontier": [
            {n: x.as_dict() if hasattr(x, "as_dict") else x for n, x in vars(p).items()} for p in points
        ]
    }
    found = report_found.frontier(found_with(plan=plan))
    rows = reached.ceiling_rows(found, found[-1].kl.value)
    kl = [p.kl.value for p in found]
    for row in rows[1:]:
        at = min(range(len(kl)), key=lambda i: abs(kl[i] - row["kl"]))
        assert row["reward"] > found[at].reward.value - 0.05
    assert [row["reward"] for row in rows] == sorted(row["reward"] for row in rows)


def test_the_way_of_training_is_means_of_its_stretches():
    steps = [{"step": i, "reward": est(float(i), 0.1), "kl": est(i / 10, 0.1)} for i in range(1, 17)]
    rows = reached.trajectory_rows(found_with(steps=steps), 4)
    assert [row["reward"] for row in rows] == [2.5, 6.5, 10.5, 14.5]
    assert [row["steps"] for row in rows] == ["1 to 4", "5 to 8", "9 to 12", "13 to 16"]


# What is not there yet.


def test_a_run_that_only_planned(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    store.write_json(run / "plan.json", make_plan())
    write_draws(run, "plan", "plan", (6, 8))
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "Nothing has been trained yet." in text
    assert (
        "The best policy at beta 0.1 would earn 0.58 [0.55 to 0.62]; the reference earns 0.30 [0.28 to 0.32]."
        in text
    )
    for missing in (
        "no measure.json yet",
        "no metrics.jsonl",
        "no step has been timed",
        "no env.json",
        "no config.yaml",
    ):
        assert missing in text, missing
    assert "3 of the 96 prompts teach nothing" in text
    assert "these are the reference's" in text


def test_a_system_message_that_all_share_is_said_once(tmp_path):
    """A long one would be all that is seen of each prompt."""
    system = {"role": "system", "content": "Write as if for a friend. " * 20}
    asked = [f"Review thing number {i}." for i in range(4)]
    chats = [[system, {"role": "user", "content": text}] for text in asked]
    assert opening(chats) == system
    assert opening(asked) is None
    assert opening([*chats, [{"role": "user", "content": "alone"}]]) is None
    assert opening([*chats, asked[0]]) is None
    assert opening([chat[1:] for chat in chats]) is None

    draws, reward = make_draws(4, 8)
    chat_draws = replace(draws, examples=[Example(chat, {}) for chat in chats])
    (tmp_path / "draws").mkdir()
    store.write_draws(
        tmp_path / "draws/plan.parquet",
        chat_draws,
        verb="plan",
        hashes={"model": "aa"},
        reward=reward,
        log_ref=draws.log_q,
    )
    plan = make_plan()
    plan["prompts"] = [{"id": str(i), "prompt": chat, "dead": False} for i, chat in enumerate(chats)]
    store.write_json(tmp_path / "plan.json", plan)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "system: Write as if for a friend." in Page(page).text
    for text in asked:
        assert f"user: {text}" in page
    assert page.count("system: Write as if") <= 3  # in the words above a table, not once a prompt


def test_a_run_that_is_not_measured(tmp_path):
    run = make_run(tmp_path / "run", steps=20, size=(8, 8), measured=False)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert re.search(
        r"trained for 20 steps: reward from \S+ \[.*?\] to \S+ \[.*?\]\.\s+It has not been measured yet",
        page.text,
    )
    shown = [row["who"] for row in page.rows]
    assert (shown.count("policy"), shown.count("reference")) == (32, 64)
    assert "train-000060.parquet" in page.text


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "This run has only begun" in text
    assert "no scored draws" in text
    assert f"klimb climb -c {tmp_path / 'config.yaml'}" in text


def test_every_step_only_replayed(tmp_path):
    store.append_jsonl(tmp_path / "metrics.jsonl", {"step": 1, "estimates": {}, "seconds": {"update": 2.0}})
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "No step has drawn from the policy yet" in text
    assert "trained for 1 step." in text


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder that holds at least one of config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "name"), [("altair", "altair"), ("vl_convert", "vl-convert")])
def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch, module, name):
    store.write_json(tmp_path / "plan.json", make_plan())
    bundle = (
        page.chart_bundle.__wrapped__ if module == "vl_convert" else lambda: ""
    )  # not the one made before
    monkeypatch.setattr(page, "chart_bundle", bundle)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{name}, which is not installed: pip install 'klimb\[report\]'"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_torn_draws_file_is_named(tmp_path):
    run = make_run(tmp_path / "run", steps=2, size=(2, 2))
    (run / "draws" / "measure-policy.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"measure-policy\.parquet: not a Parquet file"):
        write_report(run)


# Words.


def test_doubt_is_said():
    doubtful = est(0.62, 0.07, warnings=["unreliable: needs about 92 draws a prompt, has 32"])
    found = found_with(measurement={**MEASUREMENT, "attained": doubtful})
    assert "62 % [55 to 69] (unreliable)" in words.headline(found)[0]
    text = Page(page.render(found)).text
    assert "⚠ unreliable" in text
    assert "needs about 92 draws a prompt, has 32" in text


@pytest.mark.parametrize(
    ("attained", "sentence"),
    [
        (
            est(-0.05, 0.1),
            "has come no nearer to the best policy at beta 0.1: share attained −5 % [−15 to 5].",
        ),
        ({"value": None, "low": None, "high": None, "n": 8, "warnings": []}, "cannot be told."),
        (None, "cannot be told."),
        (est(1.0, 0.0), "went 100 % [100 to 100] of the way"),
    ],
)
def test_headlines_of_other_runs(attained, sentence):
    assert sentence in words.headline(found_with(measurement={**MEASUREMENT, "attained": attained}))[0]


def test_numbers_that_are_not_there_draw_nothing():
    nothing = {"value": None, "low": None, "high": None, "n": 0, "warnings": []}
    steps = [{"step": 1, "estimates": {"reward": nothing, "kl": math.inf}}, {"step": 2}]
    found = found_with(plan={"frontier": [{"reward": nothing, "kl": 1.0}, None]}, steps=steps)
    assert frontier_chart.frontier_chart(found) is None
    assert step_charts.step_charts(found) == {}
    assert time_chart.time_chart(found) is None


# Draws and sizes.


def test_the_best_and_the_worst_of_every_prompt_come_first(tmp_path):
    draws, reward = make_draws(30, 20)
    path = tmp_path / "plan.parquet"
    store.write_draws(path, draws, verb="plan", hashes={}, reward=reward)
    table = report_draws.draw_table([path], max_rows=100)
    assert [row.reward for row in table.rows] == sorted((row.reward for row in table.rows), reverse=True)
    assert len(table.rows) == 100
    assert table.drawn == 600
    kept = {}
    for row in table.rows:
        kept.setdefault(row.prompt_id, set()).add(row.reward)
    for example, rewards in zip(draws.examples, reward, strict=True):
        assert {rewards.max().item(), rewards.min().item()} <= kept[example.id]
    flat = sorted(reward.flatten().tolist())
    extreme = [row.reward for row in table.rows if row.extreme]
    assert extreme == [*reversed(flat[-10:]), *reversed(flat[:10])]
    of_all = [*flat[:50], *flat[-50:]]  # the mutant: the best and worst of all leave out some prompt's own
    assert not all({r.max().item(), r.min().item()} <= set(of_all) for r in reward)


def test_held_out_draws_go_before_those_of_training(tmp_path):
    run = make_run(tmp_path / "run", steps=2, size=(3, 4))
    table = report_draws.draw_table(sorted((run / "draws").glob("*.parquet")))
    assert list(table.files) == ["measure-policy.parquet", "measure-reference.parquet"]


def test_a_page_of_a_large_run_stays_below_three_megabytes(tmp_path):
    run = make_run(tmp_path / "run", steps=2000, size=(200, 12), text="<&\"' \x00\u202eé" * 400)
    (run / "config.yaml").write_text("x: " + "&" * 300_000)
    page = write_report(run)
    assert page.stat().st_size <= 3_000_000
    parsed = Page(page.read_text(encoding="utf-8"))
    assert 300 < len(parsed.rows) <= 1400
    assert all("␀" in row["text"] for row in parsed.rows if row["who"] == "policy")
    assert not any("\x00" in row["text"] for row in parsed.rows)
    assert any(row["more"] for row in parsed.rows)


def test_1400_plain_draws_are_there(tmp_path):
    run = make_run(tmp_path / "run", steps=5, size=(100, 12))
    page = write_report(run)
    assert len(Page(page.read_text(encoding="utf-8")).rows) == 1400
    assert page.stat().st_size <= 3_000_000


# In a browser.


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser_it_draws_filters_and_runs_nothing_else(whole, tmp_path):
    """Opened from a file: five charts, a search that finds what was typed, and no script that klimb did not write."""
    typed = "filters.elements.search.value = 'NUMBER 3-7'; filters.elements.search.dispatchEvent(new Event('input'));"
    allowed = f"script-src '{hash_of(typed)}'"  # the test's own hand on the page
    stolen = "<script>document.title = 'stolen'</script>"
    page = whole[1].replace("script-src", allowed, 1) + f"{stolen}<script>{typed}</script>"
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    )
    done = subprocess.run(
        [
            CHROMIUM,
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "<title>reviews · klimb report</title>" in done.stdout
    assert done.stdout.count('<svg xmlns="http://www.w3.org/2000/svg"') == 5
    table = re.search(r'id="draws-table"[^>]*>(.*?)</table>', done.stdout, re.DOTALL).group(1)
    found = sorted(re.findall(r"Number (\S+) of", table))
    assert found == ["13-7", "23-7", "3-7"]  # the reference's: the policy's all say the hostile thing
    assert "3 of 768 draws shown" in done.stdout


def test_every_chart_has_its_place_in_the_page(tmp_path):
    run = make_run(tmp_path / "run", steps=0, size=(8, 4))
    seen = {"value": 0.4, "low": 0.3, "high": 0.5, "n": 64, "warnings": []}
    estimates = dict.fromkeys(("reward", "kl", "regularised_reward", "self_gap", "entropy"), seen)
    numbers = dict.fromkeys(step_charts.HEALTH, 1.5) | {
        "tokens_per_second": {"drawn": 500.0, "trained": 700.0}
    }
    del numbers["drawn"], numbers["trained"]
    store.append_jsonl(
        run / "metrics.jsonl",
        *({"step": i, **estimates, **numbers, "seconds": {"draw": 1.0, "update": 2.0}} for i in (1, 2, 3)),
    )
    charts = page.charts_of(report_found.read_run(run))
    assert set(charts) >= {*estimates, *step_charts.HEALTH, "time", "frontier"}
    written = write_report(run).read_text(encoding="utf-8")
    assert [name for name in charts if f'id="chart-{name}"' not in written] == []
    assert "policy/tokenizer.json</code>" in written  # why no token is marked
