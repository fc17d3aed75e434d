"""The page itself: what was found, in words, figures and tables, as one HTML file that needs nothing else.

Samples are untrusted text: the template escapes everything, figures are handed over as escaped JSON, and the page's
own policy lets no script run but the two that klimb wrote into it, and nothing be fetched from anywhere.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from klimb.numbers.estimate import Estimate
from klimb.report import words
from klimb.report.audit import reliability_chart, scores_chart
from klimb.report.chart import Spec
from klimb.report.compared import Comparison, compare
from klimb.report.draws import as_json, cut, draw_table, opening, spoken, table_record
from klimb.report.figures import figures_of, warnings_of
from klimb.report.found import (
    Found,
    as_estimate,
    chosen_beta,
    frontier,
    read_run,
)
from klimb.report.frontier_chart import frontier_chart
from klimb.report.held_out import held_out
from klimb.report.histogram_chart import histogram_chart
from klimb.report.overlay import overlay_chart
from klimb.report.pool import CarriedPool, bin_edges, carried_pool, histogram_rows
from klimb.report.step_charts import HEALTH, step_charts
from klimb.report.time_chart import seconds_spent, time_chart
from klimb.store import write_whole


def write_report(run: str | Path, *, to: str | Path | None = None) -> Path:
    """Write RUN/report.html: everything the run has to show so far, in one page that opens without a network.

    Sections whose files are not there yet say so. The page stays below 3 MB: it carries at most 2,000 draws and
    names the files with the rest. Estimates are shown as they were written, with their 95 % intervals.

    Args:
        run: a run directory, with at least one of config.yaml, env.json, plan.json, metrics.jsonl, measure.json.
        to: where the page is written, in place of RUN/report.html.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no run, a file of it cannot be read, altair is not installed, or the disk is full.

    Example:
        >>> import tempfile
        >>> from klimb.store import write_json
        >>> with tempfile.TemporaryDirectory() as run:
        ...     reward = {"value": 0.3, "low": 0.2, "high": 0.4, "n": 512, "warnings": []}
        ...     write_json(Path(run, "plan.json"), {"reference": {"reward": reward}})
        ...     page = write_report(run)
        ...     "The reference earns 0.30 [0.20 to 0.40]" in page.read_text(encoding="utf-8")
        True
    """
    found = read_run(run)
    path = found.path / "report.html" if to is None else Path(to)
    write_whole(path, render(found))
    return path


def write_comparison(runs: Sequence[str | Path], to: str | Path) -> Comparison:
    """Write a page that shows several runs on one frontier, with their differences, and return what it says.

    Args:
        runs: directories of measured runs, two or more.
        to: where the page is written.

    Raises:
        ValueError: as `klimb.report.compared.compare`; altair is not installed; the disk is full.
    """
    compared = compare(runs)
    write_whole(Path(to), render_comparison(compared))
    return compared


def charts_of(found: Found) -> dict[str, Spec]:
    """Every chart that the run has numbers for, by name."""
    return _charts(found, carried_pool(found))


def _charts(found: Found, pool: CarriedPool | None) -> dict[str, Spec]:
    bins = None if pool is None else histogram_rows(pool.reward, pool.beta, bin_edges(pool.reward))
    charts: dict[str, Spec | None] = {
        "frontier": frontier_chart(found),
        "histogram": histogram_chart(bins),
        **step_charts(found),
        "reliability": reliability_chart(found),
        "scores": scores_chart(found),
        "time": time_chart(found),
    }
    return {name: spec for name, spec in charts.items() if spec is not None}


def render(found: Found) -> str:
    """The page as text."""
    beta, why = chosen_beta(found)
    tokenizer = found.path / "policy" / "tokenizer.json"
    held = held_out(found)
    table = draw_table(found.draws, beta=beta, tokenizer=tokenizer)
    prompts, rows = table_record(table)
    pool = carried_pool(found)
    charts = _charts(found, pool)
    who = {row.who for row in table.rows}
    spent = seconds_spent(found)
    headline, lede = words.headline(found)
    scripts = _scripts()
    return (
        _environment()
        .get_template("page.html")
        .render(
            found=found,
            name=found.path.resolve().name,
            headline=headline,
            lede=lede,
            diagnosis=found.measurement.get("diagnosis") or {},
            beta=beta,
            why=why,
            figures=figures_of(found),
            warnings=warnings_of(found),
            dead=dead_prompts(found),
            rewards=each_reward(found),
            charts=charts,
            held=held,
            spoken=spoken,
            opening=opening(
                [row.prompt for row in held] or [p.get("prompt") for p in found.plan.get("prompts") or ()]
            ),
            marked=tokenizer.is_file(),
            health=[name for name in HEALTH if name in charts],
            pool=None if pool is None else _pool(pool),
            frontier=frontier(found),
            spent=spent,
            total=sum(spent.values()),
            table=table,
            prompts=prompts,
            draws=as_json({"prompts": prompts, "rows": rows}),
            policy_drawn="policy" in who,
            compared=who == {"policy", "reference"},
            coloured=any(row.tokens for row in table.rows),
            audited=found.measurement if "reward_model" in found.measurement else {},
            aside=found.measurement.get("side_by_side") or [],
            command=command(found),
            config=cut(found.config, 20_000),
            hashes=[script_hash(script) for script in scripts.values()],
            **scripts,
        )
    )


def render_comparison(compared: Comparison) -> str:
    """The page of several runs as text."""
    scripts = _scripts()
    rows = [
        {
            "name": side.name,
            **{name: as_estimate(side.found.measurement.get(name)) for name in ("reward", "kl", "gap")},
            "attained": words.both(as_estimate(side.found.measurement.get("attained")), percent=True),
            "beta": compared.betas[side.name],
            "steps": len(side.found.steps),
            "seconds": side.seconds,
        }
        for side in compared.sides
    ]
    return (
        _environment()
        .get_template("compared.html")
        .render(
            compared=compared,
            names=[side.name for side in compared.sides],
            same_beta=len({round(beta or 0.0, 9) for beta in compared.betas.values()}) == 1,
            rows=rows,
            charts={"overlay": overlay_chart(compared)},
            hashes=[script_hash(script) for script in scripts.values()],
            **scripts,
        )
    )


def _scripts() -> dict[str, Markup]:
    """What runs in a page: the drawing of charts, and the page's own."""
    own = "\n".join(_part(name) for name in ("table.js", "tilt.js", "slider.js", "draws.js", "page.js"))
    return {"bundle": Markup(chart_bundle()), "script": Markup(own)}


def _pool(pool: CarriedPool) -> dict[str, object]:
    """What the template says of the slider; its ends are logarithms of beta."""
    return {
        "json": as_json(pool.as_dict()),
        "beta": pool.beta,
        "start": math.log(pool.beta),
        "least": math.log(pool.betas[-1]),
        "most": math.log(pool.betas[0]),
        "draws": pool.reward.shape[1],
        "num_prompts": pool.reward.shape[0],
        "all": pool.reward.numel(),
        "texts": len(pool.rows),
        "file": pool.file,
    }


def each_reward(found: Found) -> dict[str, dict[str, Estimate | None]]:
    """Where several rewards are asked: each one's mean under policy and reference, and its agreement with their sum."""
    written = found.measurement.get("rewards") or found.plan.get("rewards") or {}
    return {
        name: {key: as_estimate(part.get(key)) for key in ("policy", "reference", "agreement")}
        for name, part in written.items()
    }


def dead_prompts(found: Found) -> list[str]:
    """Beginnings of the plan's prompts whose draws all have the same reward: nothing can be learned from them."""
    every = [p for p in found.plan.get("prompts") or () if isinstance(p, dict)]
    said_once = opening([p.get("prompt") for p in every])
    dead = [p for p in every if p.get("dead")]
    return [cut(spoken(p.get("prompt") or p.get("id") or "", without=said_once), 160)[0] for p in dead]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": words.number, "short": words.short, "both": words.both}
    environment.filters |= {"visible": words.visible, "counted": words.counted}
    return environment


def command(found: Found) -> str:
    """What to type to do it again: as it was noted in env.json, else from the resolved config."""
    noted = found.environment.get("command")
    if isinstance(noted, str):
        return noted
    if isinstance(noted, Sequence):
        return shlex.join(str(part) for part in noted)
    return shlex.join(["klimb", "climb", "-c", str(found.path / "config.yaml")]) if found.config else ""


@functools.cache
def chart_bundle() -> str:
    """The JavaScript that draws Vega-Lite charts, 0.9 MB; it takes seconds to make, so it is made once."""
    try:
        import vl_convert
    except ImportError as error:
        raise ValueError(
            "the report draws its charts with vl-convert, which is not installed: pip install 'klimb[report]'"
        ) from error
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in bundle.lower()
    assert "<!--" not in bundle
    return bundle


def _part(name: str) -> str:
    return (resources.files("klimb.report") / name).read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """How a page's policy names a script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
