// A table that sorts by its headings and shows so many rows at a time, so that thousands stay smooth.
"use strict";

const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child != null));
  return made;
};

const MINUS = "\u2212";

/** A number with so many decimals and a true minus sign. */
function fixed(x, digits = 2) {
  if (x == null || Number.isNaN(x)) return "";
  if (!Number.isFinite(x)) return x > 0 ? "\u221e" : `${MINUS}\u221e`;
  const text = x.toFixed(digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", MINUS);
}

/** A number with three digits that count. */
function brief(x) {
  if (x == null || !Number.isFinite(x)) return fixed(x);
  const size = Math.abs(x);
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return x.toExponential(1).replaceAll("-", MINUS);
  return fixed(x, size === 0 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(size))));
}

/**
 * Rows in pages under headings that sort.
 * columns: [{ title, help, number, value(row), cell(row) }]; sort: [column, falling].
 * Returns show(rows), which keeps the order that was asked for.
 */
function pagedTable(host, { label, columns, sort, size = 10, empty = "Nothing matches." }) {
  let rows = [], page = 0, [by, falling] = sort;
  const heads = columns.map((column, i) => {
    const button = element("button", { type: "button", title: column.help || "" }, column.title);
    button.addEventListener("click", () => {
      falling = by === i ? !falling : Boolean(column.number);
      by = i;
      page = 0;
      order();
      draw();
    });
    return element("th", { scope: "col", className: column.number ? "n" : "" }, button);
  });
  const body = element("tbody");
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body);
  const scroll = element("div", { className: "scroll", tabIndex: 0 }, table);
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", label);
  const before = element("button", { type: "button" }, "← Previous");
  const after = element("button", { type: "button" }, "Next →");
  const where = element("span");
  where.setAttribute("role", "status");
  const pager = element("p", { className: "pager quiet" }, before, where, after);
  host.classList.add("paged");
  host.replaceChildren(scroll, pager);
  before.addEventListener("click", () => { page -= 1; draw(); });
  after.addEventListener("click", () => { page += 1; draw(); });

  function order() {
    const key = columns[by].value;
    const keyed = rows.map((row) => [key(row), row]);
    const sign = falling ? -1 : 1;
    keyed.sort(([a], [b]) => {
      if (a == null || b == null) return (a == null) - (b == null); // what is not known comes last
      return a < b ? -sign : a > b ? sign : 0;
    });
    rows = keyed.map(([, row]) => row);
  }

  function draw() {
    const pages = Math.max(Math.ceil(rows.length / size), 1);
    page = Math.min(Math.max(page, 0), pages - 1);
    const shown = rows.slice(page * size, (page + 1) * size);
    body.replaceChildren(...shown.map((row) => element("tr", {}, ...columns.map((column, i) => {
      const content = column.cell(row);
      const cell = element(i === 0 ? "th" : "td", { className: column.number ? "n" : "" }, content);
      if (i === 0) cell.scope = "row";
      return cell;
    }))));
    if (!rows.length) body.append(element("tr", {}, element("td", { colSpan: columns.length, className: "missing" }, empty)));
    heads.forEach((head, i) => {
      if (i === by) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    before.disabled = page === 0;
    after.disabled = page === pages - 1;
    pager.hidden = rows.length <= size && pages === 1;
    const count = (x) => x.toLocaleString("en");
    where.textContent = rows.length
      ? `${count(page * size + 1)} to ${count(page * size + shown.length)} of ${count(rows.length)}`
      : "0 rows";
  }

  return {
    show(found, restart = true) {
      rows = [...found];
      if (restart) page = 0;
      order();
      draw();
    },
    sortBy(column, down) {
      [by, falling, page] = [column, down, 0];
      order();
      draw();
    },
  };
}

/** Untrusted text, alone in its direction. */
function said(text, className = "text") {
  const made = element("div", { className }, text);
  made.dir = "auto";
  return made;
}

/** A completion and what was left out of it. */
function completion(text, more, finished = true) {
  const left = more ? `… and ${more.toLocaleString("en")} more characters` : finished ? "" : "… cut at the length limit";
  return [said(text), left ? element("span", { className: "more" }, left) : null];
}
