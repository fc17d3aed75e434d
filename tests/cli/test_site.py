"""The documentation as a site: every page in the navigation, every link and anchor leads somewhere, nothing is fetched.

The first tests read the sources; the last ones build the site with zensical and read that, and open it with Chromium where it is.
"""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FETCHED = re.compile(r"(?:src|href)=[\"']?(?:https?:)?//|url\([\"']?(?:https?:)?//|@import")


def named(nav):
    """The files of a navigation, in order."""
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from named(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once():
    nav = list(named(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == [page.name for page in PAGES]


def slug(heading):
    """A heading's anchor, as Markdown's toc makes it."""
    plain = re.sub(r"[`*]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def without_code(text):
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.S | re.M)


def anchors(page):
    return {slug(h) for h in re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.M)}


def broken(text, folder):
    """The relative links of a Markdown text that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        there = (folder / file).resolve() if file else None
        if (there is not None and not there.exists()) or (anchor and anchor not in anchors(there)):
            yield link


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_and_anchors_lead_somewhere(page):
    assert list(broken(page.read_text(), page.parent)) == []


def test_a_broken_link_is_found():
    wrong = "[a](nowhere.md) [b](methods.md#not-there) [c](methods.md#how-kl-is-charged) [d](run.md)"
    assert list(broken(wrong, DOCS)) == ["nowhere.md", "methods.md#not-there"]


INNER = re.compile(
    r"klimb\.(__main__|cli|cli_\w+|screen|screen_\w+|report\.\w+|explorer\.\w+|launch|nearest|spans|backward|steps|batch|offline|records|checkpoint|profile"
    r"|loaded|named_models|choice|aim|training|planning|beginning|judging|measuring|config\.(options|kinds|methods|together|values)|rewards\.(errors|texts|post)|samplers\.shared"
    r"|models\.(attended|between_products|compiled|cpu_kernels|decoding|fused_attention|llama|llama_on_cpu|low_rank|products|recomputed|recorded|room|sharded|shared_attention|tiled_attention|written_out))$"
)
"""what nobody calls from Python: how the verbs and the command line are made, and how layers are written out"""


def test_every_public_module_is_in_the_reference():
    pages = "".join(page.read_text() for page in DOCS.glob("reference*.md"))
    shown = re.findall(r"^::: (klimb[\w.]*)$", pages, re.M)
    assert len(shown) == len(set(shown))
    source = ROOT / "src" / "klimb"
    public = {
        ".".join(("klimb", *path.relative_to(source).with_suffix("").parts))
        for path in source.rglob("*.py")
        if path.name != "__init__.py" and re.search(r"^(?:def|class) (?!_)", path.read_text(), re.M)
    }
    missing = sorted(name for name in public if not INNER.match(name) and name not in shown)
    assert missing == [], "name it in docs/reference*.md, or in INNER if nobody calls it from Python"
    assert set(shown) <= public


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly and without a network, from a copy."""
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings_handlers.python")
    place = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, place / "docs")
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", place)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=place,
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "site"


class Page(HTMLParser):
    """Addresses that a page loads by itself (`found`), its links to follow, and the places that links can lead to."""

    def __init__(self, text=""):
        super().__init__()
        self.found, self.links, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if "id" in given:
            self.ids.add(given["id"])
        loaded = given.get("src") or (given.get("href") if tag == "link" else None)
        if loaded and re.match(r"(?:https?:)?//", loaded):
            self.found.append(loaded)
        if tag == "a" and "href" in given and "://" not in given["href"]:
            self.links.append(given["href"])


def test_no_page_fetches_anything(site):
    pages = sorted(site.glob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        assert Page(page.read_text()).found == [], page.name
    for style in site.rglob("*.css"):
        assert not FETCHED.search(style.read_text()), style


def lost(site):
    """(page, link) of the built site that leads out of it, to a page that is not there, or to no place on it."""
    pages = {path.name: Page(path.read_text()) for path in site.glob("*.html")}
    for name, page in pages.items():
        for link in page.links:
            file, _, anchor = link.partition("#")
            there = (site / (file or name)).resolve()
            inside = there.is_relative_to(site.resolve()) and there.exists()
            if not inside or (anchor and there.name in pages and anchor not in pages[there.name].ids):
                yield name, link


def test_links_of_the_built_site_stay_in_it(site, tmp_path):
    assert [(page, link) for page, link in lost(site) if page != "404.html"] == []
    (tmp_path / "a.html").write_text(
        '<a href="../b.html">b</a><a href="a.html#x">x</a><a id="y" href="#y">y</a>'
    )
    assert [link for _, link in lost(tmp_path)] == ["../b.html", "a.html#x"]


def test_what_a_page_would_fetch_is_found():
    reader = Page(
        '<script src="https://unpkg.com/x"></script><link href="//fonts.x/y" rel="stylesheet"><a href="https://a.b">a</a>'
    )
    assert len(reader.found) == 2
    assert FETCHED.search("@import url(x.css)")
    assert FETCHED.search("src:url(https://fonts.gstatic.com/a.woff2)")


def test_pages_open_from_a_file_without_a_network(site, browser):
    context = browser.new_context(offline=True)
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.append(asked.url) if asked.url.startswith("http") else None)
    for name in sorted(path.name for path in site.glob("*.html") if path.name != "404.html"):
        page.goto(f"file://{site}/{name}")
        page.wait_for_load_state()
        assert said == [], name
        for width in (360, 1440):
            page.set_viewport_size({"width": width, "height": 900})
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{name} is {wide} wide at {width}"
        assert page.locator(".katex-error").count() == 0, name
        assert page.locator(".arithmatex").count() == page.locator(".arithmatex .katex").count(), name
    page.goto(f"file://{site}/idea.html")
    assert page.locator(".katex-display").count() >= 7
    assert page.evaluate("document.fonts.load('16px KaTeX_Math').then(found => found.length)") >= 1
    page.keyboard.press("Control+k")
    page.keyboard.type("log_variance")
    # the index is a script, since a file may not be fetched
    page.locator("text=/^[0-9]+ results$/").wait_for(timeout=10_000)
    assert said == []
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_can_be_read_and_used_by_everybody(site, browser, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = browser.new_context(color_scheme=scheme, viewport={"width": 360, "height": 900}).new_page()
    for name in ("index", "idea", "from_trl"):
        page.goto(f"file://{site}/{name}.html")
        page.wait_for_function("document.fonts.status === 'loaded'")
        found = [v for v in axe.run(page).response["violations"] if v["impact"] in ("serious", "critical")]
        assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []
    page.set_content("<html><body><p style='color: #ccc; background: #fff'>grey</p></body></html>")
    assert "color-contrast" in {v["id"] for v in axe.run(page).response["violations"]}
