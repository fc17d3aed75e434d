"""The explorer in a browser: quiet, offline, at home on a phone, and its sliders and exercises say what they should."""

import math
import re
from functools import partial

import pytest
import torch

from klimb.exact.divergences import generalized_jensen_shannon, skew_kl

RIGHT = {
    *("why-z", "order", "larger-beta", "two-directions", "compute"),
    *("variant", "loss", "soften", "share", "mediocre"),
}


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    from klimb.explorer import write_explorer

    return write_explorer(tmp_path_factory.mktemp("explorer") / "page.html")


@pytest.fixture
def opened(open_page, explorer):
    """Open the explorer at a width."""
    return partial(open_page, explorer)


def number(page, element):
    return float(page.inner_text(f"#{element}").replace("−", "-").split()[0])


@pytest.mark.parametrize(
    ("width", "scheme"), [(1440, "light"), (1440, "dark"), (360, "light"), (360, "dark")]
)
def test_it_opens_quietly_and_nothing_overflows(opened, complaints, width, scheme):
    page = opened(width=width, scheme=scheme)
    assert page.errors == []
    assert page.asked == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints(page) == []


def test_it_is_small(explorer):
    assert explorer.stat().st_size < 1_500_000


def test_the_slider_moves_the_best_policy_and_both_sides_stay_equal(opened):
    page = opened()
    seen = []
    for exponent in (-1.0, -0.3, 1.0):
        page.fill("#beta", str(exponent))
        assert number(page, "left") == pytest.approx(number(page, "right"), abs=2e-4)
        seen.append((number(page, "n-bestReward"), number(page, "n-bestKl")))
    assert seen == sorted(seen, reverse=True)  # dearer: less reward, less KL
    assert seen[0][1] > 2 * seen[1][1] > 0
    page.click("[data-set=p]")
    assert number(page, "n-gap") == pytest.approx(0, abs=1e-3)
    assert page.inner_text("#share") == "100 %"
    page.click("[data-set=ref]")
    assert number(page, "n-kl") == pytest.approx(0, abs=1e-3)
    assert page.inner_text("#share").startswith("0")


def test_a_constant_moves_log_z_and_not_p(opened):
    page = opened()
    page.fill("#shift", "1.5")
    said = page.inner_text("#shift-says")
    assert "by c/β = 2.993" in said or "by c/β = 3.0" in said or "by c/β = 2.99" in said
    assert "0.000000000" in said


def test_the_two_directions_end_apart_and_a_prompt_does_not_reach_p(opened):
    page = opened()
    forward = page.inner_text("#student-says")
    page.select_option("#loss", "reverse")
    assert page.inner_text("#student-says") != forward
    page.click("#t-best")
    assert "The best prompt goes" in page.inner_text("#prompt-says")
    assert "goes 100 %" not in page.inner_text("#prompt-says")


def answer(page, name, right):
    """Answer an exercise rightly or wrongly, by what the page itself holds to be right."""
    box = f"#exercise-{name}"
    made = page.eval_on_selector(box, "form => ({ kind: form.made.kind, right: form.made.right })")
    if made["kind"] == "number":
        page.fill(f"{box} input", str(round(made["right"] if right else (made["right"] + 0.3) % 1, 3)))
    elif made["kind"] == "order":
        if right:  # bubble up with the buttons, as one does by hand
            for place in range(6):
                while True:
                    order = page.eval_on_selector_all(
                        f"{box} li", "all => all.map((x) => Number(x.dataset.step))"
                    )
                    now = order.index(place + 1)
                    if now == place:
                        break
                    page.click(f"{box} li:nth-child({now + 1}) button[aria-label^='move up']")
    else:
        inputs = page.query_selector_all(f"{box} input")
        for box_input in inputs:
            i = int(box_input.get_attribute("value"))  # options are shuffled
            wanted = i in made["right"] if right else i == (made["right"][0] + 1) % len(inputs)
            if wanted:
                box_input.check()
            elif made["kind"] == "several":
                box_input.uncheck()
    page.click(f"{box} button[type=submit]")
    return page.inner_text(f"{box} .answer")


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_each_exercise_knows_right_from_wrong_and_says_why(opened, name):
    page = opened()
    wrong = answer(page, name, right=False)
    assert wrong.startswith("✗ Not quite."), wrong
    assert len(wrong) > 60
    right = answer(page, name, right=True)
    assert right.startswith("✓ Right."), right
    assert page.inner_text("#solved") == "1 of 10 solved."
    page.click(f"#exercise-{name} button:text('other numbers')")
    assert answer(page, name, right=True).startswith("✓ Right.")
    assert page.errors == []


@pytest.mark.parametrize("name", ["why-z", "two-directions", "loss", "share", "mediocre"])
def test_the_place_of_an_option_does_not_give_the_answer_away(opened, name):
    page = opened()
    box, places, asked = f"#exercise-{name}", set(), set()
    for _ in range(12):
        right = page.eval_on_selector(box, "form => form.made.right[0]")
        order = page.eval_on_selector_all(f"{box} input", "all => all.map((x) => Number(x.value))")
        places.add(order.index(right))
        asked.add(page.inner_text(f"{box} legend"))
        page.click(f"{box} button:text('other numbers')")
    assert len(places) > 1
    assert name != "mediocre" or len(asked) > 6


def test_rewards_that_are_all_alike_leave_nothing_to_climb(opened):
    page = opened()
    for row in range(6):
        page.locator("#rows .row").nth(row).locator("input").nth(1).fill("1.5")
    assert page.inner_text("#share").startswith("nothing to climb")
    for text in ("#says", "#prompt-says"):
        assert page.inner_text(text).startswith("All rewards are alike")
    page.click("#exercise-mediocre button:text('other numbers')")  # numbers of its own, whatever the sliders
    assert answer(page, "mediocre", right=True).startswith("✓ Right.")
    assert page.errors == []


def test_keys_are_enough(opened):
    page = opened()
    page.focus("#beta")
    before = number(page, "n-bestReward")
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    assert number(page, "n-bestReward") > before


LIVE = "[role=status], [role=alert], [role=log], output, [aria-live]:not([aria-live=off])"
HEARD = """(live) => {
    window.hear?.disconnect();
    window.heard = [];
    window.hear = new MutationObserver((all) => window.heard.push(...new Set(all.map((m) => m.target.textContent))));
    for (const x of document.querySelectorAll(live)) window.hear.observe(x, { childList: true, characterData: true, subtree: true });
}"""


def test_a_screen_reader_hears_where_a_slider_came_to_rest_and_not_every_step(opened):
    page = opened()

    def heard(slider, key):
        page.evaluate(HEARD, LIVE)
        page.focus(slider)
        for _ in range(15):
            page.keyboard.press(key)
        page.wait_for_timeout(1000)
        return page.evaluate("window.heard")

    assert page.inner_text("#settled") == ""  # nothing is said of a page that only opened
    for slider, says in (
        ("#beta", "#says"),
        ("#shift", "#shift-says"),
        ("#s", "#student-says"),
        ("#t", "#prompt-says"),
    ):
        if slider == "#s":
            page.select_option("#loss", "jsd")
        page.wait_for_timeout(800)
        assert len(heard(slider, "ArrowLeft")) == 1
        assert page.text_content("#settled") == page.text_content(says)
    page.evaluate("document.getElementById('says').setAttribute('role', 'status')")  # as it was: the mutant
    assert len(heard("#beta", "ArrowRight")) > 5


def test_the_loss_menu_shows_its_words_whole(opened):
    """The widest option, with the arrow of the menu, fits into it: at its edge words would be cut."""
    for width in (360, 900, 1440):
        page = opened(width=width)
        wide, room = page.eval_on_selector(
            "#loss",
            """(menu) => {
                const style = getComputedStyle(menu), pen = document.createElement("canvas").getContext("2d");
                pen.font = `${style.fontSize} ${style.fontFamily}`;
                const widest = Math.max(...[...menu.options].map((option) => pen.measureText(option.text).width));
                const own = menu.getBoundingClientRect(), around = menu.closest(".controls").getBoundingClientRect();
                return [widest + 24, Math.min(own.right, around.right) - own.left - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight)];
            }""",
        )
        assert wide <= room


def test_the_slider_of_beta_says_beta(opened):
    page = opened()
    page.fill("#beta", "1")
    assert page.get_attribute("#beta", "aria-valuetext") == page.inner_text("#beta-value") == "10.00"


# What is right, from the words that a reader sees and not from what the page holds.


def numbers_in(text):
    return [float(x) for x in re.findall(r"[-\d.]*\d", text.replace("−", "-"))]


def is_target(asks):
    ref, reward = (numbers_in(x) for x in re.findall(r"\(([^)]*)\)", asks)[:2])
    beta = float(re.search(r"β = ([\d.]+\d|\d)", asks)[1])
    weights = [q * math.exp(r / beta) for q, r in zip(ref, reward, strict=True)]
    place = ["first", "second", "third"].index(re.search(r"of the (\w+) completion", asks)[1])
    return weights[place] / sum(weights)


def is_direction(asks):
    out, back = (float(x) for x in re.findall(r"= ([\d.]+) nats", asks))
    return "It left out something that p does" if back > out else "It does much that p never does"


def is_cause(asks):
    reward, start, _, planned, _ = numbers_in(asks.split(":", 1)[1])
    near = (reward - start) / (planned - start) > 0.5
    return "β is too high" if near else "Training stopped early"


def is_loss(asks):
    return "KL(student‖teacher)" if "never says" in asks else "KL(teacher‖student)"


def is_soften(asks):
    """The loss by klimb's own divergences, from the numbers of the question."""
    teacher, student = (torch.tensor(numbers_in(x)).log() for x in re.findall(r"\(([\d., ]+)\)", asks)[:2])
    share = float(re.search(r"at s = ([\d.]+\d)", asks)[1])
    if "+ (1 − s) KL(student‖m)" in asks:
        return generalized_jensen_shannon(teacher, student, share=share).item()
    if "KL(teacher‖m)" in asks:
        return skew_kl(teacher, student, share=share).item()
    assert "KL(student‖m), m = s · student" in asks
    return skew_kl(student, teacher, share=share).item()


def is_share(asks):
    """In the limit: which law the mixture stands for, and under which law the mean is."""
    share = float(re.search(r"s = ([\d.]+\d)", asks)[1])
    if "Jensen–Shannon" in asks:
        return "Over both" if share < 0.5 else "In one"
    return "Over both" if "KL(teacher‖s · teacher" in asks else "In one"


def is_variant(asks):
    from klimb.exact.variants import VARIANTS

    return next(v.says for v in VARIANTS.values() if f"writes {v.formula} in the place" in asks)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("why-z", lambda _: "The policy's parameters are not in it"),
        ("two-directions", is_direction),
        ("variant", is_variant),
        ("loss", is_loss),
        ("mediocre", is_cause),
        ("compute", is_target),
        ("soften", is_soften),
        ("share", is_share),
    ],
)
def test_what_a_reader_can_work_out_is_what_the_page_takes(opened, name, meant):
    page = opened()
    box = f"#exercise-{name}"
    for _ in range(12):
        asks = page.inner_text(f"{box} legend")
        if name in ("compute", "soften"):
            page.fill(f"{box} input", f"{meant(asks):.2f}")
        else:
            labels = page.locator(f"{box} fieldset label").all_inner_texts()
            place = next(i for i, text in enumerate(labels) if text.strip().startswith(meant(asks)))
            page.locator(f"{box} input").nth(place).check()
        page.click(f"{box} button[type=submit]")
        assert page.inner_text(f"{box} .answer").startswith("✓ Right."), asks
        page.click(f"{box} button:text('other numbers')")


def test_a_larger_beta_spends_and_earns_less_and_a_smaller_one_more(opened):
    page = opened()
    box = "#exercise-larger-beta"
    for _ in range(6):
        before, after = re.search(
            r"β goes from ([\d.]+) to ([\d.]+\d|\d)", page.inner_text(f"{box} legend")
        ).groups()
        moves = "falls" if float(after) > float(before) else "rises"
        for i, text in enumerate(page.locator(f"{box} fieldset label").all_inner_texts()):
            page.locator(f"{box} input").nth(i).set_checked(moves in text)
        page.click(f"{box} button[type=submit]")
        assert page.inner_text(f"{box} .answer").startswith("✓ Right.")
        page.click(f"{box} button:text('other numbers')")
