"""The report in a browser: its slider computes what the library says, its tables find and sort, hostile text stays text."""

import json
import math
import re

import pytest
import torch

from klimb import store
from klimb.data import Draws, Example
from klimb.numbers.frontier import default_betas, frontier
from klimb.numbers.tilt import log_partition, tilted_kl, tilted_mean
from klimb.numbers.weights import effective_sample_size
from klimb.report import write_report
from klimb.report.draws import token_lengths

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

HOSTILE = [
    "</script><script>document.title = 'stolen'</script>",
    "<img src=x onerror=\"document.title = 'stolen'\">",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "x" * 100_000,
    "nul \x00 bell \x07 escape \x1b",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467 and \U0001f525",
    "<!-- {{ 7 * 7 }} -->",
    "]]> &lt; \u2028 \u2029",
]


def as_record(point):
    return {name: x.as_dict() if hasattr(x, "as_dict") else x for name, x in vars(point).items()}


def write_run(run, *, num_prompts=16, num_draws=40, binary=False):
    """A run whose plan is what the library predicts from its draws; measured, with token log-probabilities."""
    g = torch.Generator().manual_seed(5)
    run.mkdir()
    examples = [Example(f"Review thing {p}.") for p in range(num_prompts)]
    reward = 0.2 + 0.3 * torch.randn(num_prompts, num_draws, generator=g)
    if binary:
        reward = (reward > 0.4).float()
    reward[0] = 0.5 if not binary else 0.0  # a dead prompt
    lengths = torch.full((num_prompts, num_draws), 3)
    texts = [
        [HOSTILE[d] if p == 1 and d < len(HOSTILE) else f"words of {p}-{d}" for d in range(num_draws)]
        for p in range(num_prompts)
    ]
    completions = [[torch.arange(3) for _ in row] for row in lengths]
    log_ref = -10 - torch.rand(num_prompts, num_draws, generator=g)
    draws = Draws(examples, completions, finished=lengths > 0, texts=texts, log_q=log_ref, full_support=True)
    betas = default_betas(reward)
    points = frontier(reward, betas, generator=g, num_resamples=200)
    beta = betas[30]
    here = frontier(reward, [beta], generator=g, num_resamples=200)[0]
    plan = {
        "target": {"kind": "tilt"},
        "beta": {"value": beta, "why": "given"},
        "optimum": as_record(here),
        "frontier": [as_record(point) for point in points],
        "reference": {"reward": here.reward.as_dict()},
        "prompts": [
            {"id": e.id, "prompt": e.prompt, "dead": bool((r == r[0]).all())}
            for e, r in zip(examples, reward, strict=True)
        ],
    }
    (run / "draws").mkdir()
    store.write_json(run / "plan.json", plan)
    common = {"hashes": {"model": "aa"}, "reward": reward, "log_ref": log_ref}
    store.write_draws(run / "draws" / "plan.parquet", draws, verb="plan", **common)
    away = 0.3 * torch.randn(num_prompts, num_draws, generator=g)
    common["log_pi"] = log_ref + away
    for name in ("measure", "measure-reference"):
        store.write_draws(run / "draws" / f"{name}.parquet", draws, verb="measure", **common)
    return run, reward, points


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with hostile completions and its page: folder, rewards, the points of its frontier."""
    found = write_run(tmp_path_factory.mktemp("browser") / "run")
    write_report(found[0])
    return found


def slide(page, beta):
    """Put the slider at a beta; the beta it really took."""
    page.evaluate(
        "(x) => { const s = document.getElementById('beta-slider'); s.value = -Math.log(x); s.dispatchEvent(new Event('input')); }",
        beta,
    )
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return float(page.get_attribute("#beta-value", "data-beta"))


def number(page, name, end="value"):
    return float(page.get_attribute(f"#live-{name}", f"data-{end}"))


def test_it_loads_without_a_word_from_the_console_and_asks_for_nothing(run, open_page):
    page = open_page(run[0] / "report.html")
    assert page.errors == []
    assert page.asked == []
    assert "stolen" not in page.title()


@pytest.mark.parametrize("binary", [False, True])
def test_the_slider_says_what_the_library_says(tmp_path, open_page, binary):
    """E_p[r], KL, log Z, ESS and the word of trust at betas of the grid, between them, and where nothing is trusted."""
    run, reward, points = write_run(tmp_path / "run", binary=binary)
    page = open_page(write_report(run))
    betas = [points[0].beta, points[12].beta, math.sqrt(points[20].beta * points[21].beta), points[-1].beta]
    words = set()
    for wanted in betas:
        beta = slide(page, wanted)
        assert beta == pytest.approx(wanted, rel=1e-9)
        for name, estimate in (
            ("reward", tilted_mean(reward.double(), beta)),
            ("kl", tilted_kl(reward.double(), beta)),
            ("log-z", log_partition(reward.double(), beta)),
            ("ess", effective_sample_size(reward.double() / beta)),
        ):
            assert number(page, name) == pytest.approx(estimate.mean().item(), abs=1e-9), name
            plug_in = tilted_mean(reward.double(), beta, correct=False).mean().item()
        if wanted == betas[1] and not binary:  # the mutant: without the jackknife it is another number
            assert number(page, "reward") != pytest.approx(plug_in, abs=1e-9)
        words.add(page.inner_text("#live-trust b"))
    trusted = [p for p in points if p.reliable]
    for point in (trusted[0], points[-1]):
        slide(page, point.beta)
        assert page.inner_text("#live-trust b") == ("trusted" if point.reliable else "unreliable")
    assert "trusted" in words


def test_intervals_are_the_librarys_on_the_grid_and_between_its_neighbours_elsewhere(run, open_page):
    page = open_page(run[0] / "report.html")
    points = run[2]
    for i in (0, 7, 25):
        slide(page, points[i].beta)
        for name, e in (("reward", points[i].reward), ("kl", points[i].kl), ("log-z", points[i].log_z)):
            assert number(page, name, "low") == pytest.approx(e.low, abs=1e-6)
            assert number(page, name, "high") == pytest.approx(e.high, abs=1e-6)
    slide(page, math.sqrt(points[10].beta * points[11].beta))
    widths = [p.kl.high - p.kl.low for p in points[10:12]]
    assert number(page, "kl", "high") - number(page, "kl", "low") == pytest.approx(sum(widths) / 2, rel=1e-6)


def test_what_depends_on_beta_moves_with_the_slider(run, open_page):
    """The ring, the histogram, the re-weighted draws and the prompts; weights are those of the library."""
    page = open_page(run[0] / "report.html")
    reward, points = run[1], run[2]

    def seen():
        return {
            "ring": page.inner_html("#chart-frontier svg"),
            "bars": page.inner_html("#chart-histogram svg"),
            "sample": page.inner_text("#sample-table tbody"),
            "prompts": page.inner_text("#prompt-table tbody"),
        }

    slide(page, points[2].beta)
    page.wait_for_timeout(200)
    first = seen()
    beta = slide(page, points[-5].beta)
    page.wait_for_timeout(200)
    then = seen()
    assert all(first[name] != then[name] for name in first)
    largest = (torch.softmax(reward.double() / beta, -1) * reward.shape[1]).max().item()
    shown = page.inner_text("#sample-table tbody th >> nth=0")
    assert float(shown.split()[0]) == pytest.approx(largest, rel=0.01)
    page.click("#beta-reset")
    assert float(page.get_attribute("#beta-value", "data-beta")) == pytest.approx(points[30].beta)


def test_the_slider_obeys_the_keyboard_and_says_where_it_is(run, open_page):
    page = open_page(run[0] / "report.html")
    page.focus("#beta-slider")
    before = page.get_attribute("#beta-slider", "aria-valuetext")
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(100)
    after = page.get_attribute("#beta-slider", "aria-valuetext")
    assert before != after
    assert "KL" in after
    assert "nats" in after


def test_no_slider_where_the_plan_is_of_another_reward(tmp_path):
    run, _, _ = write_run(tmp_path / "run")
    plan = store.read_json(run / "plan.json")
    for point in plan["frontier"]:
        point["reward"]["value"] += 0.5
    (run / "plan.json").write_text(json.dumps(plan))
    assert 'id="beta-slider"' not in write_report(run).read_text(encoding="utf-8")


def test_a_beta_outside_of_the_plans_grid_has_a_slider_too(tmp_path, open_page):
    run, _, points = write_run(tmp_path / "run")
    plan = store.read_json(run / "plan.json")
    far = 50 * max(point.beta for point in points)
    plan["beta"] = {**plan["beta"], "value": far} if isinstance(plan["beta"], dict) else far
    store.write_json(run / "plan.json", plan)
    page = open_page(write_report(run))
    assert page.errors == []
    slide(page, points[5].beta)
    assert page.errors == []


@pytest.mark.parametrize(
    ("width", "scheme"), [(360, "light"), (1440, "light"), (360, "dark"), (1440, "dark")]
)
def test_nothing_overflows_and_axe_has_no_complaint(run, open_page, complaints, width, scheme):
    page = open_page(run[0] / "report.html", width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints(page) == []
    # the mutant: a field without a label, and a line that cannot break
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<input><div style=width:2000px>x</div>')")
    assert page.evaluate("document.documentElement.scrollWidth") > width
    assert any(line.startswith("label") for line in complaints(page))


def shown(page):
    return page.locator("#draws-table tbody tr").all_inner_texts()


def test_search_sort_and_filters_find_what_they_should(run, open_page):
    page = open_page(run[0] / "report.html")
    count = page.locator("#count")
    page.fill("[name=search]", "WORDS 7-3")
    assert shown(page)
    assert all("words of" in text and "7-3" in text for text in shown(page))
    page.click("#filters [type=reset]")
    page.wait_for_timeout(50)
    page.select_option("[name=show]", "all")
    total = int(count.inner_text().split()[0].replace(",", ""))
    page.select_option("[name=who]", "policy")
    assert 0 < int(count.inner_text().split()[0].replace(",", "")) < total
    assert all("policy" in text for text in shown(page))
    page.fill("[name=from]", "0.3")
    page.fill("[name=to]", "0.6")
    rewards = [float(text.split()[0].replace("\u2212", "-")) for text in shown(page)]
    assert rewards
    assert all(0.2995 <= r <= 0.6005 for r in rewards)
    assert rewards == sorted(rewards, reverse=True)
    page.click("#draws-table thead button >> nth=0")
    page.click("#draws-table thead button >> nth=0")
    flipped = [float(text.split()[0].replace("\u2212", "-")) for text in shown(page)]
    assert page.get_attribute("#draws-table thead th >> nth=0", "aria-sort") in ("ascending", "descending")
    assert flipped == sorted(flipped, reverse=True)
    page.click("#draws-table thead button >> nth=0")
    rising = [float(text.split()[0].replace("\u2212", "-")) for text in shown(page)]
    assert rising == sorted(rising)
    page.fill("[name=least]", "1.2")
    weights = [float(text.split()[-2]) for text in shown(page)]
    assert weights
    assert min(weights) >= 1.2
    page.select_option("[name=prompt]", "4")
    assert len(set(page.locator("#draws-table .prompt").all_inner_texts())) <= 1
    page.fill("[name=search]", "nothing says this")
    assert shown(page) == ["No draw matches."]


def test_what_the_policy_says_now_comes_first_by_its_log_ratio(run, open_page):
    page = open_page(run[0] / "report.html")
    page.select_option("[name=show]", "new")
    ratios = [float(text.split()[-3].replace("\u2212", "-")) for text in shown(page)]
    stored = store.read_draws(run[0] / "draws" / "measure.parquet")
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == pytest.approx((stored.log_pi - stored.log_ref).max().item(), abs=0.006)
    assert all("policy" in text for text in shown(page))


def test_hostile_completions_are_shown_as_text(run, open_page):
    """As they were written, control characters as their pictures, long lines cut with a word about it."""
    page = open_page(run[0] / "report.html")
    choices = page.locator("[name=prompt] option").all_inner_texts()
    (chosen,) = [text for text in choices if text.endswith(": Review thing 1.")]
    page.select_option("[name=prompt]", label=chosen)
    seen = []
    while True:
        seen += shown(page)
        button = page.locator("#draws-table .pager button >> nth=1")
        if button.is_disabled() or not button.is_visible():
            break
        button.click()
    text = "\n".join(seen)
    for said in (
        HOSTILE[0],
        HOSTILE[1],
        "\u05e9\u05dc\u05d5\u05dd",
        "nul \u2400 bell \u2407",
        HOSTILE[5],
        HOSTILE[6],
    ):
        assert said in text, said
    assert "more characters" in text
    assert "stolen" not in page.title()
    assert page.locator("img").count() == 0
    assert page.errors == []


def test_policy_and_reference_stand_side_by_side(run, open_page):
    page = open_page(run[0] / "report.html")
    heads = page.locator("#beside h4").all_inner_texts()
    assert heads == ["policy", "reference"]
    before = page.inner_text("#beside")
    page.click("#beside-after")
    assert page.inner_text("#beside") != before


def test_the_page_of_a_real_run_has_coloured_tokens_and_no_complaint(
    make_run, options, klimb, open_page, complaints, tmp_path
):
    """A run of the tiny model through the command line: tokens cover their text, some are marked, axe is content."""
    settings = make_run(tmp_path) | {"learning_rate": 0.05, "max_steps": 10}
    assert klimb("climb", *options(settings))[0] == 0
    run = tmp_path / "run"
    page = open_page(run / "report.html")
    assert page.errors == []
    page.select_option("[name=show]", "all")
    marks = page.locator("#draws-table [class^=up], #draws-table [class^=down]")
    assert marks.count() > 0
    assert "nats" in marks.first.get_attribute("title")
    told = page.locator("#draws-table td:nth-child(4) .text").all_inner_texts()
    drawn = {
        t
        for name in ("measure", "measure-reference")
        for row in store.read_draws(run / "draws" / f"{name}.parquet").draws.texts
        for t in row
    }
    assert told
    assert set(told) <= drawn
    assert complaints(page) == []


def test_each_of_several_rewards_stands_in_a_table(make_run, options, klimb, open_page, complaints, tmp_path):
    """Name, mean under policy and reference, agreement, as measure.json has them; of a plan alone without the policy."""
    settings = make_run(tmp_path)
    settings["reward_funcs"] = [settings["reward_funcs"], {"func": "length", "target": 12}]
    assert klimb("climb", *options(settings), "--reward_weights", "[1, 0.5]")[0] == 0
    run = tmp_path / "run"
    written = store.read_json(run / "measure.json")["rewards"]
    assert list(written) == ["good", "length"]

    def told(page):
        table = page.get_by_role("region", name="Each reward by itself").locator("table")
        rows = [row.locator("th, td").all_inner_texts() for row in table.locator("tr").all()]
        return rows[0], {name: cells for name, *cells in rows[1:]}

    for width in (360, 1440):
        page = open_page(run / "report.html", width=width)
        heads, rows = told(page)
        assert heads == ["reward", "policy", "reference", "agreement"]
        assert list(rows) == list(written)
        for name, cells in rows.items():
            for key, cell in zip(heads[1:], cells, strict=True):
                shown = [float(x) for x in re.findall(r"-?[\d.]+", cell.replace("\u2212", "-"))]
                e = written[name][key]
                assert shown == pytest.approx([e["value"], e["low"], e["high"]], abs=0.006), (name, key)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert complaints(page) == []
    assert rows["good"][0] != rows["length"][0]
    (run / "measure.json").unlink()
    planned = store.read_json(run / "plan.json")["rewards"]
    heads, rows = told(open_page(write_report(run)))
    assert (heads, list(rows)) == (["reward", "reference", "agreement"], list(planned))


def test_token_lengths_add_up_to_the_text(tiny_model):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert token_lengths(words, words.encode("good film").ids, "good film") == [4, 5]
    assert token_lengths(words, words.encode("good film").ids, "another text") is None
    letters = tokenizers.ByteLevelBPETokenizer()
    letters.train_from_iterator(["a"], vocab_size=256 + 1)
    ids = letters.encode("a\U0001f525b").ids  # four bytes of one letter: it counts with the last of them
    assert token_lengths(letters, ids, "a\U0001f525b") == [1, 0, 0, 0, 1, 1]
